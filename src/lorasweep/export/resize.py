"""A LoRA of another rank, and LoHa or LoKr as a LoRA: by SVD, with what is kept stated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep import __version__
from lorasweep.config.compose import compose_without_images
from lorasweep.core.atomic_write import staged
from lorasweep.core.foreign_files import ForeignFileError
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.settings import SettingsError
from lorasweep.export import diffusers_folder, diffusers_lora, find_lora, picture_check, svd
from lorasweep.export.attach_loras import attachable
from lorasweep.export.svd_ranks import SvdRanks, has_kernel, metadata
from lorasweep.export.whole_model import base_for_loras
from lorasweep.lora_files import checkpoint, read_lora_file
from lorasweep.lora_files.read_lora_file import FACTORED, LoRAFile
from lorasweep.models.model_files import ModelError
from lorasweep.tracking import TrackingError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from lorasweep.models.load_model import Model
    from lorasweep.models.sdxl import Base

RESIZABLE = (*FACTORED, "dora", "full")
ENOUGH = 0.9
"""Share of the delta's squared norm below which a person is warned."""
CARRIED = ("norm", "bias")
"""What has no rank, and goes into the new file as it is."""


@dataclass(frozen=True)
class Resized:
    """A written LoRA and what it kept of the one it is from."""

    path: Path
    ranks: Counter[int]
    """How many modules have which rank."""
    kept: svd.Loss

    def lines(self) -> list[str]:
        """What a person is told."""
        ranks = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(self.ranks.items()))
        worst = (
            f"; worst {self.kept.worst:.2%}, {self.kept.worst_site}" if self.kept.worst_site else ""
        )
        lines = [
            f"{sum(self.ranks.values())} modules: {ranks}",
            f"Kept energy: {self.kept.total:.2%} of the delta's squared norm{worst}",
            f"Wrote {self.path}",
        ]
        if self.kept.total < ENOUGH:
            lines.insert(
                -1,
                f"Warning: less than {ENOUGH:.0%} of the LoRA is kept, so it will draw otherwise;"
                " give a larger --rank, or --energy 0.95 without a rank to see which it needs",
            )
        return lines


def resize_and_draw(
    source: Path,
    target: Path,
    ranks: SvdRanks,
    *,
    model: Model | None,
    overwrite: bool,
    say: Callable[[str], None],
) -> None:
    """Write `source` with other ranks, draw it before and after, and say whether that is close.

    Without a `model` the base is found as `export` finds it, if it is on this machine; where it
    can't be had one sentence says why, and the file is written all the same. Raises
    CheckpointError, ModelError, TargetError.
    """
    read_lora_file.check_target(target, overwrite)
    with picture_check.quiet(), staged(target, overwrite) as place:
        before = _drawn(source, base_for_loras(model)) if model else _drawn_on_its_base(source, say)
        result = resize(source, place, ranks)
        if isinstance(before, str):
            told = f"Not checked by a picture: {before}"
        else:
            told = diffusers_lora.compare(*before, place)
    for line in (*replace(result, path=target).lines(), told):
        say(line)


def resize(source: Path, target: Path, ranks: SvdRanks) -> Resized:
    """Write `source` as a LoRA of these ranks.

    DoRA keeps its magnitudes. Raises CheckpointError for a type
    whose change is no sum with the weight (OFT, IA3, …), TargetError for a taken target.
    """
    read_lora_file.check_target(target, overwrite=False)
    file = read_lora_file.read(source)
    unfit = set(file.algorithms.values()) - {*RESIZABLE, *CARRIED}
    if unfit:
        raise CheckpointError(
            f"{source} is of {', '.join(sorted(unfit))}, which has no rank to change"
        )
    tensors: dict[str, Tensor] = {}
    kept: dict[str, tuple[float, float]] = {}
    written: Counter[tuple[int, bool]] = Counter()
    for key, site in file.sites.items():
        if file.algorithms[key] in CARRIED:
            tensors |= {f"{key}.{name}": tensor for name, tensor in site.items()}
            continue
        found = svd.spectrum(site)
        shape = file.shape(key)
        own = ranks.of(found, shape)
        new = found.as_lora(own, shape, svd.dtype_of(site), pad=ranks.is_fixed)
        new |= {name: site[name] for name in site if name in ("dora_scale", "diff_b")}
        tensors |= {f"{key}.{name}": tensor for name, tensor in new.items()}
        written[new["lora_down.weight"].shape[0], has_kernel(shape)] += 1
        kept[key] = (found.squared(own), found.squared())
    checkpoint.write(target, tensors, _metadata(file, metadata(written, ranks.is_fixed)))
    counts: Counter[int] = Counter()
    for (rank, _), count in written.items():
        counts[rank] += count
    return Resized(target, counts, svd.Loss.of(kept))


def _drawn(source: Path, base: Base) -> tuple[Image, Base]:
    """The picture of the LoRA as it came. Raises CheckpointError for a base that it doesn't fit."""
    file = read_lora_file.read(source, base)
    return picture_check.draw(base, attachable(base, [(file, 1.0)], remedy="")), base


def _drawn_on_its_base(source: Path, say: Callable[[str], None]) -> tuple[Image, Base] | str:
    """The picture on the base that the file was trained on, or why there is none."""
    cfg = compose_without_images([])
    try:
        found = find_lora.trained_on(source, cfg)
        if found is None:
            return f"{find_lora.unknown_base(source)}; --model PATH gives it"
        model, where = found
        say(where)
        local = _on_this_machine(model)
        if local is None:
            return (
                f"{model.path} is not on this machine, and nothing is downloaded for a picture;"
                " --model PATH gives a copy"
            )
        return _drawn(source, base_for_loras(local))
    except (SettingsError, ForeignFileError, ModelError, TrackingError, CheckpointError) as error:
        read_lora_file.read(source)  # is it the file itself? Then that is what must be said
        return f"{error}; --model PATH gives the base"


def _on_this_machine(model: Model) -> Model | None:
    """The model by its folder or file here; None for a hub id without a copy."""
    if model.is_single_file:
        configs = model.config and diffusers_folder.downloaded(model.config, None)
        return replace(model, config=str(configs)) if configs else None
    folder = diffusers_folder.downloaded(model.path, model.revision)
    return replace(model, path=str(folder), revision=None) if folder else None


def _metadata(file: LoRAFile, ranks: Mapping[str, str]) -> dict[str, str]:
    """The source's, but for what the new ranks change."""
    stale = ("sshs_", "ss_network_args", "lora_adapter_metadata")
    carried = {k: v for k, v in file.metadata.items() if not k.startswith(stale)}
    return {
        **carried,
        **ranks,
        "lorasweep_version": __version__,
        "ss_training_comment": f"resized by lorasweep from {file.path.name}",
    }
