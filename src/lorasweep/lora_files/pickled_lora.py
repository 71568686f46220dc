"""A LoRA that was saved as a pickle (.ckpt, .pt, .bin), for a person who trusts it."""

from __future__ import annotations

import warnings
from pathlib import Path
from pickle import UnpicklingError

from lorasweep.core.foreign_files import ForeignFileError, check_no_pipe
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.lora_files import checkpoint
from lorasweep.lora_files.read_lora_file import with_config

_FAILURES = (AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What torch raises of a damaged pickle, beside UnpicklingError."""


def as_safetensors(path: Path, folder: Path) -> Path:
    """The same tensors in a .safetensors file of `folder`, with PEFT's config where one is beside.

    Only for a file that the person trusts. torch's restricted unpickler loads nothing but tensors
    and plain values, yet it reads a stranger's program. Raises CheckpointError for anything else.
    """
    import torch

    try:
        check_no_pipe(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the unpickler's, on pickles it was not made for
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except ForeignFileError as error:
        raise CheckpointError(str(error)) from None
    except (UnpicklingError, *_FAILURES):
        raise CheckpointError(f"{path} is not a whole pickle of tensors alone") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else None
    tensors = {
        name: value.detach().clone()
        for name, value in (found.items() if isinstance(found, dict) else ())
        if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors by name")
    target = folder / f"{path.stem}.safetensors"
    checkpoint.write(target, tensors, with_config(path, {}))
    return target
