"""States on disk, from which a run that was broken off goes on as if nothing had happened.

A file is the sha256 of what follows, then a safetensors file, which no pickle can hide in. The
states that the runs of a pack write at one moment name each other: only together do they go on
exactly, for how a pack rounds depends on its members.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.foreign_files import parse_json
from lorasweep.training.training_state import Snapshot

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

DIGEST = hashlib.sha256().digest_size
_JSON = "state.json"  # the name of the tensor of bytes that holds what is no tensor


class StateError(ValueError):
    """A state file that can't be used; the message says which and why."""


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A run at the end of an epoch, or of a step within one."""

    run: str
    pack: Sequence[tuple[str, int, int]]
    """(run, finished epochs, optimizer steps) of all that trained together at that moment."""
    started: float
    """Seconds since 1970 at which the run began."""
    snapshot: Snapshot


class _SnapshotShape(TypedDict):
    parameters: list[Any]
    optimizer: dict[Any, Any]
    lr_scheduler: dict[Any, Any]
    scaler: dict[Any, Any]
    num_epochs: int
    num_batches: int
    num_steps: int
    num_micro_steps: int
    records: tuple[tuple[int, dict[str, Any]], ...]


class _StateShape(TypedDict):
    """What a file holds, of which the checksum of another's may be right."""

    run: str
    pack: tuple[tuple[str, int, int], ...]
    started: float
    snapshot: _SnapshotShape


def folder_of(output_dir: Path) -> Path:
    """Where a run's states are."""
    return output_dir / "states"


def path_of(output_dir: Path, step: int) -> Path:
    """The file of the state after `step` optimizer steps."""
    return folder_of(output_dir) / f"{step:08d}.state"


def write(output_dir: Path, state: SavedState) -> None:
    """Write the state whole or not at all. Raises DiskError."""
    import numpy as np
    import torch
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed({**vars(state), "snapshot": vars(state.snapshot)}, tensors))
    tensors[_JSON] = torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())
    content = save(tensors)
    write_atomically(
        path_of(output_dir, state.snapshot.num_steps), hashlib.sha256(content).digest() + content
    )


def read(path: Path) -> SavedState:
    """A state. Raises StateError for a file that isn't as it was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
        raise StateError(f"{path} is torn or was changed")
    try:
        tensors = load(content[DIGEST:])
        values = _unpacked(parse_json(tensors.pop(_JSON).numpy().tobytes(), path), tensors)
        TypeAdapter(_StateShape).validate_python(values, strict=True)
        return SavedState(**{**values, "snapshot": Snapshot(**values["snapshot"])})
    except (SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise StateError(f"{path} is not a state of a run ({type(error).__name__})") from None


def keep_last(output_dir: Path, number: int) -> None:
    """Delete all but the last `number` states of a run."""
    for path in sorted(folder_of(output_dir).glob("*.state"))[:-number]:
        path.unlink()


def delete(output_dir: Path) -> None:
    """Delete a run's states: nothing goes on from them."""
    folder = folder_of(output_dir)
    for path in folder.glob("*.state"):
        path.unlink()
    if folder.is_dir():
        folder.rmdir()


def together(output_dirs: Mapping[str, Path]) -> dict[str, SavedState]:
    """The states from which runs that train together go on, by run; none: from the beginning.

    Taken are the last states that all runs of a pack wrote at one moment. A file that can't be
    used is passed over with a warning.
    """
    found = {
        run: {state.pack: state for state in _readable(folder)}
        for run, folder in output_dirs.items()
    }
    chosen: dict[str, SavedState] = {}
    while moment := _last_whole(found, chosen):
        chosen.update(moment)
    return chosen


def _last_whole(
    found: Mapping[str, Mapping[Any, SavedState]], chosen: Mapping[str, SavedState]
) -> dict[str, SavedState]:
    """Of the moments of which each member that goes on has its state, the last one's states."""
    moments = {pack for states in found.values() for pack in states}
    whole: list[dict[str, SavedState]] = []
    for pack in moments:
        names = [name for name, _, _ in pack if name in found]
        if all(name not in chosen and pack in found[name] for name in names):
            whole.append({name: found[name][pack] for name in names})
    return max(
        whole, key=lambda states: sum(s.snapshot.num_steps for s in states.values()), default={}
    )


def _readable(output_dir: Path) -> list[SavedState]:
    states = []
    for path in sorted(folder_of(output_dir).glob("*.state")):
        try:
            states.append(read(path))
        except StateError as error:
            log.warning("%s: the state before it is used", error)
    return states


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold; tensors go to `tensors`, and what JSON has no word for is tagged."""
    import torch

    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone()  # safetensors refuses shared memory
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[_packed(k, tensors), _packed(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_packed(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_packed(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise StateError(
        f"a {type(value).__name__} in the optimiser's state can't be written: choose another"
        " optimizer, or trainer.keep_states=0 to train without states"
    )


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unpacked(item, tensors) for item in content)
    return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in content}
