"""What a LoRA file is: type, ranks, targets, base, training, hashes, and where it is strong."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.adapters.weight_deltas import algorithm, frobenius_norm, rank_of
from lorasweep.core.foreign_files import ForeignFileError, parse_json
from lorasweep.core.text import shown
from lorasweep.lora_files import checkpoint, read_lora_file
from lorasweep.lora_files.read_lora_file import FACTORED, LoRAFile

if TYPE_CHECKING:
    from rich.console import Console

    from lorasweep.adapters.weight_deltas import Tensors

BAR = 32  # columns of the longest bar

TRAINING = {
    "learning rate": "ss_learning_rate",
    "unet lr": "ss_unet_lr",
    "text encoder lr": "ss_text_encoder_lr",
    "lr scheduler": "ss_lr_scheduler",
    "optimizer": "ss_optimizer",
    "epoch": "ss_epoch",
    "epochs planned": "ss_num_epochs",
    "steps": "ss_steps",
    "batch size": "ss_total_batch_size",
    "resolution": "ss_resolution",
    "clip skip": "ss_clip_skip",
    "seed": "ss_seed",
    "network": "ss_network_module",
    "network dim": "ss_network_dim",
    "network alpha": "ss_network_alpha",
    "network args": "ss_network_args",
    "precision": "ss_mixed_precision",
    "noise offset": "ss_noise_offset",
    "min snr gamma": "ss_min_snr_gamma",
    "output name": "ss_output_name",
    "comment": "ss_training_comment",
}
"""What is shown of kohya's metadata, by the name it is shown under."""

_TYPES = {
    "lora": "LoRA",
    "dora": "DoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "full": "full difference",
    "norm": "norm difference",
    "bias": "bias difference",
    "oft": "OFT",
    "glora": "GLoRA",
    "ia3": "IA3",
    "tlora": "T-LoRA",
}
_BASES = {
    128: "lorasweep's embedded model",
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "SDXL",
}
"""By the width of what the UNet's cross attention reads: the text embeddings."""
_BLOCK = re.compile(
    r"_(down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)_(\d+)"
)
_LDM_LAYERS = 3  # of the original layout's blocks, those that make up one of diffusers'


@dataclass(frozen=True)
class Info:
    """What `lorasweep info` says of a file."""

    file: str
    size: int
    """Bytes."""
    type: str
    written_by: str
    base: str
    targets: str
    modules: Mapping[str, int]
    """Number by part: unet, text encoder."""
    ranks: Mapping[str, Mapping[str, int]]
    """By part: how many modules have which rank; `full` where a matrix isn't factored, `-` for
    types without ranks."""
    alphas: Mapping[str, int]
    dtypes: Mapping[str, int]
    """Number of weights by type."""
    hash: str
    """Of the data, as sshs_model_hash has it."""
    intact: bool | None
    """Does it equal the file's own sshs_model_hash? None where it has none."""
    norms: Mapping[str, float]
    """Frobenius norm of the change of the weights by block."""
    training: Mapping[str, str]
    datasets: Mapping[str, Mapping[str, int]]
    """By folder: images, repeats and distinct tags of the captions."""
    left_out: Mapping[str, int]
    """What of the file isn't read, in words, and how many of it."""

    def as_json(self) -> str:
        """All of it as JSON in ASCII."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=True)


def inspect(path: Path) -> Info:
    """Read and describe a LoRA file of any family.

    Raises CheckpointError for one that isn't to be trusted.
    """
    return described(read_lora_file.read_any(path))


def described(file: LoRAFile) -> Info:
    """What is to be said of a file that was read."""
    path = file.path
    stored = file.metadata.get("sshs_model_hash")
    found = checkpoint.data_hash(path)
    return Info(
        file=path.name,
        size=path.stat().st_size,
        type=type_of(file),
        written_by=file.written_by,
        base=_base(file),
        targets=f"modules of {file.family}" if file.family else targets_of(file.sites),
        modules=_counted(part_of(key) for key in file.sites),
        ranks=_ranks(file),
        alphas=_counted(_alpha(site) for site in file.sites.values()),
        dtypes=_counted(_dtype(t) for name, t in file.tensors.items() if name[-6:] != ".alpha"),
        hash=found,
        intact=None if not stored else stored == found,
        norms=_norms(file),
        training={
            name: file.metadata[key]
            for name, key in TRAINING.items()
            if file.metadata.get(key, "None") not in ("None", "")
        },
        datasets=_datasets(file.metadata),
        left_out=dict(file.left_out),
    )


def show(info: Info, console: Console) -> None:
    """Print it; no text of the file reaches the terminal with control characters or markup."""
    for name, value in _lines(info):
        console.print(f"{name:16}{value}", markup=False, highlight=False, soft_wrap=True)
    if not info.norms:
        return
    console.print("\nNorm of the change of the weights, by block", markup=False)
    largest = max(info.norms.values()) or 1.0
    for block, norm in info.norms.items():
        bar = "█" * round(BAR * norm / largest)
        console.print(f"{block:16}{norm:9.4g}  {bar}", markup=False, highlight=False)


def _lines(info: Info) -> list[tuple[str, str]]:
    ranks = [f"{part}: {_many(count)}" for part, count in info.ranks.items()]
    modules = ", ".join(f"{count} in {part}" for part, count in info.modules.items())
    verdict = {
        True: "intact: equals the file's sshs_model_hash",
        False: "CHANGED: differs from the file's sshs_model_hash",
        None: "the file has none to compare with",
    }[info.intact]
    fixed = [
        ("file", f"{info.file}, {info.size / 1e6:.1f} MB, {_many(info.dtypes)}"),
        ("type", info.type),
        ("written by", info.written_by),
        ("base", info.base),
        ("targets", f"{info.targets}; {modules}"),
        *(("rank", line) for line in ranks),
        ("alpha", _many(info.alphas)),
        ("hash", f"{info.hash[:16]}…, {verdict}"),
        *(("left out", f"{count} {what}") for what, count in info.left_out.items()),
        *info.training.items(),
        *(("data set", _dataset_line(folder, counts)) for folder, counts in info.datasets.items()),
    ]
    return [(shown(name), shown(value, 400)) for name, value in fixed]


def _many(counts: Mapping[str, int]) -> str:
    """The value alone where there is one, else how often each is there."""
    if len(counts) == 1:
        return next(iter(counts))
    listed = [f"{value} ({count})" for value, count in counts.items()]
    more = f" and {len(listed) - 8} others" if len(listed) > 8 else ""
    return ", ".join(listed[:8]) + more


def _dataset_line(folder: str, counts: Mapping[str, int]) -> str:
    return f"{folder}: " + ", ".join(f"{count} {name}" for name, count in counts.items())


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def type_of(file: LoRAFile) -> str:
    """LoRA, DoRA, LoHa …, with what it has besides, for a person."""
    kinds = Counter(file.algorithms.values())
    listed = sorted((kind for kind, _ in kinds.most_common()), key=("norm", "bias").__contains__)
    names = " and ".join(_TYPES[kind] for kind in listed)
    has_kernels = any(_has_kernel(site) for site in file.sites.values())
    convolutions = " with 3x3 convolutions (LoCon)" if has_kernels else ""
    magnitudes = any("dora_scale" in site for site in file.sites.values())
    weighted = " with DoRA's magnitudes" if magnitudes and "dora" not in kinds else ""
    biased = any("diff_b" in site for site in file.sites.values()) and "bias" not in kinds
    return f"{names}{convolutions}{weighted}{' with differences of biases' if biased else ''}"


def _has_kernel(site: Tensors) -> bool:
    """Is it a LoRA of a convolution larger than 1x1?"""
    down = site.get("lora_down.weight")
    is_larger = down is not None and down.dim() == 4 and down[0, 0].numel() > 1
    return is_larger or "lora_mid.weight" in site


def _ranks(file: LoRAFile) -> dict[str, dict[str, int]]:
    by_part: dict[str, Counter[str]] = {}
    for key, site in file.sites.items():
        by_part.setdefault(part_of(key), Counter())[_rank(site)] += 1
    return {part: dict(counts.most_common()) for part, counts in by_part.items()}


def _rank(site: Tensors) -> str:
    if (rank := rank_of(site)) is not None:
        return str(rank)
    for name in ("a2.weight", "q_layer.weight"):  # GLoRA's and T-LoRA's down projections
        if name in site:
            return str(site[name].shape[0])
    return "full" if algorithm(site) in ("full", "lokr") else "-"


def _alpha(site: Tensors) -> str:
    if _rank(site) == "-":
        return "-"  # LyCORIS writes one all the same: OFT's is another setting
    return f"{float(site['alpha']):g}" if "alpha" in site else "none"


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _base(file: LoRAFile) -> str:
    """From the shapes, for a copied entry may lie, and what the file itself says."""
    guessed = _guess(file)
    said = file.metadata.get("ss_base_model_version") or file.metadata.get("modelspec.architecture")
    name = file.metadata.get("ss_sd_model_name")
    told = [text for text in (said, name) if text]
    return guessed + (f" by its shapes; the file says {', '.join(told)}" if told else "")


def _guess(file: LoRAFile) -> str:
    if file.family is not None:
        return file.family
    width = file.text_width
    if width == 768 and file.is_text_only:
        return f"{_BASES[768]} or SDXL's first text encoder"
    return "unknown" if width is None else _BASES.get(width, "unknown")


def part_of(key: str) -> str:
    """unet, text encoder, text encoder 2, or another family's part, of a site's name in files."""
    if key.startswith(("lora_unet_", "lora_prior_unet_")):
        return "unet"
    if not key.startswith("lora_te") and not key.startswith("lora_prior_te"):
        return "transformer"
    return "text encoder 2" if key.startswith("lora_te2_") else "text encoder"


def block_of(key: str) -> str:
    """text encoder, down 0-3, mid, up 0-3, or `in, out, time` for the UNet's outer modules."""
    if part_of(key) != "unet":
        return part_of(key)
    if "_mid_block_" in key or "_middle_block_" in key:
        return "mid"
    match = _BLOCK.search(key)
    if match is None:
        return "in, out, time"
    name, number = match[1], int(match[2])
    if name == "input_blocks":  # the first is conv_in
        return f"down {(number - 1) // _LDM_LAYERS}" if number else "in, out, time"
    if name == "output_blocks":
        return f"up {number // _LDM_LAYERS}"
    return f"{name.removesuffix('_blocks')} {number}"


def targets_of(sites: Iterable[str]) -> str:
    """The preset that the names belong to, or what they are of."""
    kinds = {_target_kind(key) for key in sites}
    presets = {
        frozenset({"text encoder", "transformer blocks"}): "attn-mlp",
        frozenset({"transformer blocks"}): "unet-only",
        frozenset({"text encoder", "transformer blocks", "convolutions"}): "conv",
        frozenset({"text encoder", "transformer blocks", "convolutions", "outer modules"}): "full",
    }
    return presets.get(frozenset(kinds), " + ".join(sorted(kinds)))


def _target_kind(key: str) -> str:
    if part_of(key) != "unet":
        return "text encoder"
    if block_of(key) == "in, out, time":
        return "outer modules"
    if "_attentions_" in key or "transformer_blocks" in key or "_proj_" in key:
        return "transformer blocks"
    return "convolutions"


def _order_of(block: str) -> tuple[int, str]:
    """In the order in which the model computes them."""
    order = ("text", "in,", "down", "mid", "up", "unet", "transformer")
    return order.index(block.split()[0]), block


def _norms(file: LoRAFile) -> dict[str, float]:
    """Of the low-rank part; empty for types whose change depends on the base's weights."""
    squares: dict[str, float] = {}
    for key, site in file.sites.items():
        if (square := _square(site)) is not None:
            block = part_of(key) if file.family else block_of(key)
            squares[block] = squares.get(block, 0.0) + square
    return {block: math.sqrt(squares[block]) for block in sorted(squares, key=_order_of)}


def _square(site: Tensors) -> float | None:
    if "diff" in site:
        return float(site["diff"].float().square().sum())
    return float(frobenius_norm(site)) ** 2 if algorithm(site) in FACTORED else None


def _datasets(metadata: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Images, repeats and distinct tags by folder, as far as the entries can be read."""
    folders, tags = (_object(metadata, f"ss_{name}") for name in ("dataset_dirs", "tag_frequency"))
    found: dict[str, dict[str, int]] = {}
    for folder, entry in list(folders.items())[:50]:
        values = entry if isinstance(entry, dict) else {}
        named = {"images": values.get("img_count"), "repeats": values.get("n_repeats")}
        counts = tags.get(folder)
        named["different tags"] = len(counts) if isinstance(counts, dict) else None
        found[folder] = {name: n for name, n in named.items() if type(n) is int}
    return found


def _object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = parse_json(metadata.get(key, "{}"), key)
    except ForeignFileError:
        return {}
    return value
