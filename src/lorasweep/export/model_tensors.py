"""Reading and writing a whole model: diffusers folder, or single file of Stable Diffusion 1.x.

Only safetensors are read. Tensors keep their type and their bits. SDXL is read and written as a
diffusers folder, also with its weights in fp16 under the names of a variant.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.core.text import shown
from lorasweep.export.original_layout import PREFIXES, Layout, Weights, modern_vae_name, prefixed
from lorasweep.export.part_files import (
    FILES,
    VARIANT,
    dtype_of,
    link,
    load,
    load_part,
    save,
    variant_of,
)
from lorasweep.models.base_model import Precision
from lorasweep.models.model_files import (
    ModelError,
    load_error,
    load_errors,
    read_object,
    refuse_others,
)

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

SDXL = "StableDiffusionXLPipeline"
_COPIED = ("scheduler", "tokenizer")
_NOT_NEEDED = {"safety_checker", "feature_extractor", "image_encoder"}
_IGNORED = {
    r"model_ema\.|first_stage_model\.model_ema\.": "EMA copies of weights",
    r"alphas_|betas$|sqrt_|log_one_minus|posterior_|logvar$|lvlb_weights$|scale_fac": "noise"
    " schedule",
    r".*\.position_ids$": "position ids",
    r"cond_stage_model\.(logit_scale|text_projection|transformer\.text_projection)": "CLIP's"
    " projection, which no picture needs",
    r"first_stage_model\.loss\.": "loss of the VAE's training",
}
"""What real files hold beside the model, by pattern, and what it is."""


@dataclass(frozen=True)
class WholeModel:
    """A model's tensors, and the diffusers folder that holds its configs and its tokenizer."""

    weights: Weights
    configs: Path
    layout: Layout
    notes: tuple[str, ...] = ()
    """What was knowingly left out in reading, in words for a person."""

    def cast(self, precision: Precision | None) -> WholeModel:
        """The same in another precision; None keeps each tensor as it is."""
        if precision is None:
            return self
        dtype = dtype_of(precision)
        return replace(
            self,
            weights={
                part: {name: tensor.to(dtype) for name, tensor in tensors.items()}
                for part, tensors in self.weights.items()
            },
        )


def read(
    source: str,
    config: str | None = None,
    revision: str | None = None,
    names: tuple[str, str] = ("model.path", "model.config"),
    *,
    sdxl: bool = False,
) -> WholeModel:
    """Read a diffusers folder, a hub id, or a single file with `config`'s configs (folder or id).

    Messages call `source` and `config` by these names. With `sdxl` a folder may be of SDXL too.

    Raises ModelError in one line for another architecture, a missing or misshapen tensor, a pickle.
    Tensors that no part of the model needs are left out, with a warning unless they are known.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path, config, names[1])
    folder = local_folder(source, revision, names[0], weights=True)
    layout = _layout(folder, sdxl)
    weights: dict[str, dict[str, Tensor]] = {}
    leftover: list[str] = []
    for part in layout.shapes:
        found = {_modern(part, name): tensor for name, tensor in load_part(folder, part).items()}
        weights[part] = {name: found[name] for name in layout.shapes[part] if name in found}
        leftover += [f"{part}/{name}" for name in found if name not in weights[part]]
    layout.check(weights)
    return WholeModel(weights, folder, layout, _leftover_notes(folder, leftover))


def write_file(model: WholeModel, path: Path) -> None:
    """Write the original single-file layout."""
    save(path, model.layout.to_original(model.weights))


def write_folder(
    model: WholeModel, folder: Path, scheduler: Mapping[str, Any] | None = None
) -> None:
    """Write a diffusers folder, without safety checker; `scheduler` changes its config."""
    for part, tensors in model.weights.items():
        save(folder / part / FILES[part], tensors)
        # for a user who asks for no type: diffusers takes fp32, transformers 5 the config's
        changes = {"dtype": "float32"} if part.startswith("text_encoder") else {}
        _copy_json(model.configs / part / "config.json", folder, changes, drop={"torch_dtype"})
    for part in _copied(model.layout.is_sdxl):
        for file in sorted((model.configs / part).iterdir()):
            (folder / part).mkdir(exist_ok=True)
            shutil.copyfile(file, folder / part / file.name)
    if scheduler:
        _copy_json(model.configs / "scheduler" / "scheduler_config.json", folder, dict(scheduler))
    index = _index(model.configs)
    dropped: dict[str, Any] = {name: [None, None] for name in _NOT_NEEDED & set(index)}
    if not model.layout.is_sdxl:
        dropped["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps({**index, **dropped}, indent=2) + "\n")


def write_variant(model: WholeModel, folder: Path) -> WholeModel:
    """Write the weights beside a folder's plain ones, in fp16 under the variant's names.

    Files whose tensors are fp16 already are the same ones under a second name. Returns what they
    hold.
    """
    result = model.cast(VARIANT)
    for part, tensors in result.weights.items():
        plain = folder / part / FILES[part]
        target = variant_of(plain)
        given = model.weights[part].values()
        if any(tensor.dtype != dtype_of(VARIANT) for tensor in given) or not link(plain, target):
            save(target, tensors)
    return result


def is_sdxl(source: str, revision: str | None = None) -> bool:
    """Is it a diffusers folder, or a hub id, of SDXL? Raises ModelError for what can't be had."""
    if Path(source).expanduser().is_file():
        return False
    folder = local_folder(source, revision, "model.path", weights=False)
    return bool(_index(folder).get("_class_name") == SDXL)


def precision_of(model: WholeModel) -> Precision:
    """The coarsest type among a model's tensors."""
    found = {tensor.dtype for tensors in model.weights.values() for tensor in tensors.values()}
    order: tuple[Precision, ...] = ("bf16", "fp16", "fp32")
    return next((name for name in order if dtype_of(name) in found), "fp32")


def local_folder(source: str, revision: str | None, key: str, *, weights: bool) -> Path:
    """A diffusers folder on this machine: `source` itself, or the copy of a hub id.

    Without `weights` only configs and tokenizer are fetched. Raises ModelError, which names `key`.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
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


def _read_file(path: Path, config: str | None, key: str) -> WholeModel:
    if config is None:
        raise ModelError(
            f"{path} is a single file, which holds no configs and no tokenizer: give the folder or"
            f" the hub id of a diffusers model that has them, by {key}"
        )
    tensors = load(path)
    refuse_others(str(path), tensors)
    if not any(name.startswith(PREFIXES["unet"]) for name in tensors):
        raise ModelError(f"{path} holds no {PREFIXES['unet']}* tensors: it is not a whole model")
    configs = local_folder(config, None, key, weights=False)
    layout = _layout(configs, sdxl=False)
    weights, leftover = layout.to_diffusers(tensors)
    layout.check(weights)
    return WholeModel(weights, configs, layout, _leftover_notes(path, leftover))


def _layout(folder: Path, sdxl: bool) -> Layout:
    name = _index(folder).get("_class_name")
    is_sdxl = name == SDXL
    if name != "StableDiffusionPipeline" and not (is_sdxl and sdxl):
        name = shown(str(name))
        later = (
            "SDXL comes later (export --to merged, diffusers-lora and offline-lora know its"
            " diffusers folders)"
            if is_sdxl
            else "only StableDiffusionPipeline is read"
        )
        raise ModelError(f"{folder} is a {name}: {later}")
    for part in _copied(is_sdxl):
        if not (folder / part).is_dir():
            raise ModelError(f"{folder} has no {part}: give a whole diffusers folder")
    try:
        return Layout.of(folder, is_sdxl)
    except ModelError:
        raise
    except load_errors() as error:
        raise load_error(str(folder), error) from None


def _copied(is_sdxl: bool) -> tuple[str, ...]:
    return (*_COPIED, "tokenizer_2") if is_sdxl else _COPIED


def _index(folder: Path) -> dict[str, Any]:
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} is not a diffusers folder: no model_index.json")
    return read_object(folder / "model_index.json", str(folder))


def _modern(part: str, name: str) -> str:
    rename: Mapping[str, Callable[[str], str]] = {"vae": modern_vae_name, "text_encoder": prefixed}
    return rename[part](name) if part in rename else name


def _leftover_notes(source: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Nothing is silent: a tensor that isn't carried over is counted, or named in a warning."""
    reasons = {
        name: next((why for mark, why in _IGNORED.items() if re.match(mark, name)), None)
        for name in names
    }
    unknown = sorted(name for name, why in reasons.items() if why is None)
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        log.warning("%s: not known and left out: %s%s", source, ", ".join(unknown[:5]), more)
    counts = Counter(why for why in reasons.values() if why is not None)
    return tuple(f"Left out: {count} x {why}" for why, count in counts.items())


def _copy_json(
    source: Path, folder: Path, changes: Mapping[str, Any], drop: Iterable[str] = ()
) -> None:
    """Copy a part's config below `folder`, some of its entries changed."""
    content = json.loads(source.read_text())
    kept = {key: value for key, value in content.items() if not (changes and key in drop)}
    target = folder / source.parent.name / source.name
    target.write_text(json.dumps({**kept, **changes}, indent=2, sort_keys=True) + "\n")
