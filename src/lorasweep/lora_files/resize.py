"""A LoRA of another rank, and LoHa or LoKr as a LoRA: by SVD, with what is kept stated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep import __version__
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.lora_files import checkpoint, lora_file, svd
from lorasweep.lora_files.lora_file import LoRAFile

if TYPE_CHECKING:
    from torch import Tensor

RESIZABLE = (*lora_file.FACTORED, "dora", "full")


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
        return [
            f"{sum(self.ranks.values())} modules: {ranks}",
            f"Kept energy: {self.kept.total:.2%} of the delta's squared norm{worst}",
            f"Wrote {self.path}",
        ]


def resize(
    source: Path,
    target: Path,
    rank: int | None = None,
    energy: float | None = None,
    *,
    overwrite: bool = False,
) -> Resized:
    """Write `source` as a LoRA of one `rank`, or of each module's least rank that keeps `energy`.

    With both, `rank` is the limit. DoRA keeps its magnitudes. Raises CheckpointError for a type
    whose change is no sum with the weight (OFT, IA3, …), TargetError for a taken target.
    """
    check(rank, energy)
    lora_file.check_target(target, overwrite)
    file = lora_file.read(source)
    unfit = {kind for kind in file.algorithms.values() if kind not in RESIZABLE}
    if unfit:
        raise CheckpointError(
            f"{source} is of {', '.join(sorted(unfit))}, which has no rank to change"
        )
    tensors: dict[str, Tensor] = {}
    kept: dict[str, tuple[float, float]] = {}
    ranks: Counter[int] = Counter()
    for key, site in file.sites.items():
        found = svd.spectrum(site)
        own = _own_rank(found, rank, energy)
        new = _as_lora(site, *found.factors(own, file.shape(key), pad=energy is None))
        tensors |= {f"{key}.{name}": tensor for name, tensor in new.items()}
        ranks[new["lora_down.weight"].shape[0]] += 1
        kept[key] = (found.squared(own), found.squared())
    checkpoint.write(target, tensors, _metadata(file, ranks))
    return Resized(target, ranks, svd.Loss.of(kept))


def check(rank: int | None, energy: float | None) -> None:
    """Raise CheckpointError for what no LoRA can be resized to."""
    if rank is None and energy is None:
        raise CheckpointError("say to what: --rank N or --energy 0.95")
    if rank is not None and not 1 <= rank <= lora_file.MAX_RANK:
        raise CheckpointError(f"--rank {rank}: give 1 to {lora_file.MAX_RANK}")
    if energy is not None and not 0 < energy <= 1:
        raise CheckpointError(f"--energy {energy}: give a share above 0, at most 1")


def _as_lora(site: Mapping[str, Tensor], down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """File tensors with alpha = rank, in the type the site came in."""
    import torch

    dtype = svd.dtype_of(site)
    new = {
        "lora_down.weight": down.to(dtype),
        "lora_up.weight": up.to(dtype).contiguous(),
        "alpha": torch.tensor(float(down.shape[0]), dtype=dtype),
    }
    return new | ({"dora_scale": site["dora_scale"]} if "dora_scale" in site else {})


def _own_rank(found: svd.Spectrum, rank: int | None, energy: float | None) -> int:
    own = found.rank_for(energy) if energy is not None else rank
    assert own is not None, "rank or energy is given"
    return min(own, rank) if rank is not None else own


def _metadata(file: LoRAFile, ranks: Mapping[int, int]) -> dict[str, str]:
    """The source's, but for what the new ranks change; sd-scripts too writes Dynamic for many."""
    one = str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic"
    stale = ("sshs_", "ss_network_args", "lora_adapter_metadata")
    carried = {k: v for k, v in file.metadata.items() if not k.startswith(stale)}
    return {
        **carried,
        "ss_network_module": "networks.lora",
        "ss_network_dim": one,
        "ss_network_alpha": one if one == "Dynamic" else f"{one}.0",
        "lorasweep_version": __version__,
        "ss_training_comment": f"resized by lorasweep from {file.path.name}",
    }
