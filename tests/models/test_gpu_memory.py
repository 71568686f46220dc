"""What is done when memory runs out."""

import pytest
import torch

from lorasweep.models.gpu_memory import halved, is_out_of_memory, memory_for

FULL = torch.OutOfMemoryError("CUDA out of memory (made by the test)")


def test_the_halves_are_all_of_it_and_the_second_is_the_larger():
    assert halved([1, 2, 3], FULL) == ([1], [2, 3])
    assert halved(range(4), FULL) == (range(2), range(2, 4))


def test_one_alone_can_not_be_halved():
    with pytest.raises(torch.OutOfMemoryError):
        halved([1], FULL)


def test_another_error_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="shapes differ"):
        halved([1, 2], RuntimeError("shapes differ"))


def test_nothing_is_known_of_a_cpus_memory():
    assert memory_for("cpu", lambda: None) is None


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory (made by the test)"),
    RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["cuda", "cpu", "cublas"])
def test_every_way_of_running_out_of_memory_is_known(error):
    assert is_out_of_memory(error)
