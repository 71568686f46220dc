"""A model's diffusers folder: where it lies, and the safetensors and configs of its parts.

A part's weights are in one file, in the pieces that diffusers cuts large ones into, or in fp16
under the names of a variant.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.core.foreign_files import ForeignFileError, check_no_pipe, inside, read_json
from lorasweep.core.safetensors_header import CheckpointError, check_length
from lorasweep.models.base_model import Precision, torch_dtype
from lorasweep.models.model_files import CONFIGS, ModelError, read_object

if TYPE_CHECKING:
    from torch import Tensor

    from lorasweep.export.single_file_names import Weights

SDXL = "StableDiffusionXLPipeline"
FILES = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder_2": "model.safetensors",  # SDXL's
}
"""A folder's weights by part."""
VARIANT: Precision = "fp16"
"""The variant that SDXL's folders have beside, or instead of, their plain weights."""
_NOT_NEEDED = {"safety_checker", "feature_extractor", "image_encoder"}


def find_folder(source: str, revision: str | None, key: str, *, weights: bool) -> Path:
    """A diffusers folder on this machine: `source` itself, or the copy of a hub id.

    Without `weights` only configs and tokenizer are fetched. Raises ModelError, which names `key`.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        check_no_pipe(folder)
    except ForeignFileError as error:
        raise ModelError(f"{key}={source}: {error}") from None
    if folder.is_absolute() or source.startswith((".", "~")) or folder.suffix == ".safetensors":
        raise ModelError(f"{key}={source}: no such file or folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.txt", *(f"{part}/{name}" for part, name in FILES.items() if weights)]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        from huggingface_hub.constants import HF_HUB_OFFLINE

        first = (str(error).splitlines() or ["no answer"])[0]
        if HF_HUB_OFFLINE:
            first = "HF_HUB_OFFLINE is set, so nothing is downloaded, and it is not in the cache"
        file = " or a .safetensors file" if weights else ""
        raise ModelError(
            f"{key}={source}: no such file or folder, and as a hub id it can't be had ({first});"
            f" give a diffusers folder{file} on this machine"
        ) from None


def downloaded(source: str, revision: str | None) -> Path | None:
    """A diffusers folder, or the copy of a hub id that lies on this machine; asks no server."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (OSError, HFValidationError):
        return None


def is_sdxl(source: str, revision: str | None = None) -> bool:
    """Is it a diffusers folder, or a hub id, of SDXL? Raises ModelError for what can't be had."""
    if Path(source).expanduser().is_file():
        return False
    folder = find_folder(source, revision, "model.path", weights=False)
    return bool(read_index(folder).get("_class_name") == SDXL)


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json, which names the pipeline's class and its parts. Raises ModelError."""
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} is not a diffusers folder: no model_index.json")
    return read_object(folder / "model_index.json", str(folder))


def read_schedule(folder: Path) -> dict[str, Any]:
    """The noise schedule of a diffusers folder. Raises ModelError."""
    return read_object(folder / "scheduler" / CONFIGS["scheduler"], str(folder))


def read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """A part's tensors, from its file, its pieces, or the variant's. Raises ModelError."""
    path = folder / part / FILES[part]
    variant = variant_of(path)
    pieces = _pieces(path) or ([variant] if variant.is_file() else [])
    if not pieces:
        raise ModelError(
            f"{path} is missing; only safetensors are read (in pieces too, or {variant.name}), not"
            " pickles (.bin)"
        )
    return {name: tensor for piece in pieces for name, tensor in read_tensors(piece).items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises ModelError for what isn't whole safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: only .safetensors files are read, for others can run any code")
    if not path.exists():
        raise ModelError(f"{path} is missing: give a whole diffusers folder")
    try:
        check_length(path)
        return load_file(path)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    except SafetensorError as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from None


def write_folder(
    folder: Path, weights: Weights, configs: Path, scheduler: Mapping[str, Any]
) -> None:
    """Write these weights with the configs of another folder, without its safety checker.

    `scheduler` changes the scheduler's config, its class too.
    """
    for part, tensors in weights.items():
        write_tensors(folder / part / FILES[part], tensors)
        # for a user who asks for no type: diffusers takes fp32, transformers 5 the config's
        changes = {"dtype": "float32"} if part.startswith("text_encoder") else {}
        _copy_json(configs / part / "config.json", folder, changes, drop={"torch_dtype"})
    is_sdxl = "text_encoder_2" in weights
    for part in copied_parts(is_sdxl):
        (folder / part).mkdir(exist_ok=True)
        for file in sorted((configs / part).iterdir()):
            if file.is_file():
                _check_own(file, configs)
                shutil.copyfile(file, folder / part / file.name)
        if part.startswith("tokenizer"):
            _add_slow_tokenizer(folder / part)
    if scheduler:
        _copy_json(configs / "scheduler" / CONFIGS["scheduler"], folder, scheduler)
    index = read_index(configs)
    changed: dict[str, Any] = {name: [None, None] for name in _NOT_NEEDED & set(index)}
    if not is_sdxl:
        changed["requires_safety_checker"] = False
    if "_class_name" in scheduler:
        changed["scheduler"] = ["diffusers", scheduler["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps({**index, **changed}, indent=2) + "\n")


def _add_slow_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt of a tokenizer.json alone: transformers before 5 ask for them."""
    if (folder / "vocab.json").exists() or not (folder / "tokenizer.json").exists():
        return
    model = read_object(folder / "tokenizer.json", str(folder)).get("model", {})
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        return  # of another kind than CLIP's: there is no such form
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    text = json.dumps(vocabulary, ensure_ascii=False)
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    # the first line is skipped by its readers
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")


def write_variant(folder: Path, weights: Weights) -> Weights:
    """Write weights beside a folder's plain ones, in fp16 under the variant's names.

    Files whose tensors are fp16 already get a second name, where the file system can give one.
    Returns what the variant holds.
    """
    half = torch_dtype(VARIANT)
    result = {}
    for part, tensors in weights.items():
        plain = folder / part / FILES[part]
        result[part] = {name: tensor.to(half) for name, tensor in tensors.items()}
        try:
            if any(tensor.dtype != half for tensor in tensors.values()):
                raise OSError("the plain file is of another type")
            os.link(plain, variant_of(plain))
        except OSError:
            write_tensors(variant_of(plain), result[part])
    return result


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as diffusers does. Raises OSError where the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # a full disk, in its words
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def copied_parts(is_sdxl: bool) -> tuple[str, ...]:
    """The parts without weights, which are copied as they are."""
    return ("scheduler", "tokenizer", *(["tokenizer_2"] if is_sdxl else []))


def variant_of(path: Path) -> Path:
    """Where the variant of a plain file lies."""
    return path.with_name(f"{path.stem}.{VARIANT}{path.suffix}")


def _check_own(file: Path, configs: Path) -> None:
    """Raise ModelError for a link to elsewhere on this machine: what is written is given to others.

    In the hub's cache files are links to blobs beside the snapshots.
    """
    cached = configs.resolve().parents[1]
    home = cached if (cached / "blobs").is_dir() else configs
    try:
        inside(home, file.absolute())
    except ForeignFileError as error:
        raise ModelError(f"{error}; copy the file in") from None


def _pieces(path: Path) -> list[Path]:
    """The file, or the pieces that the index beside it names; none where there is neither."""
    if path.is_file():
        return [path]
    index = path.with_name(f"{path.name}.index.json")
    try:
        names = set(read_json(index)["weight_map"].values())
    except FileNotFoundError:
        return []
    except (OSError, ForeignFileError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} can't be read: give a whole diffusers folder") from None
    if stray := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ModelError(f"{index} names {stray[0]!r}, which is no file beside it")
    return [path.with_name(name) for name in sorted(names)]


def _copy_json(
    source: Path, folder: Path, changes: Mapping[str, Any], drop: Iterable[str] = ()
) -> None:
    """Copy a part's config below `folder`, some of its entries changed."""
    content = read_object(source, str(source.parent.parent))
    kept = {key: value for key, value in content.items() if not (changes and key in drop)}
    target = folder / source.parent.name / source.name
    target.write_text(json.dumps({**kept, **changes}, indent=2, sort_keys=True) + "\n")
