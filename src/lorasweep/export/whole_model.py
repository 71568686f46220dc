"""A whole model's tensors as its files hold them: read once, computed with, written.

A diffusers folder, or a single file of Stable Diffusion 1.x. Tensors keep their type and their
bits, which diffusers' own loading doesn't keep: it casts a part to one type, and takes random
numbers for a missing tensor. SDXL is read and written as a diffusers folder.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.core.settings import SettingsError
from lorasweep.core.text import shown
from lorasweep.export import diffusers_folder
from lorasweep.export.diffusers_folder import SDXL
from lorasweep.export.exported import is_file
from lorasweep.export.other_vae import read_vae
from lorasweep.export.single_file_names import (
    PREFIXES,
    ModelLayout,
    Weights,
    modern_name,
    prefixed,
)
from lorasweep.lora_files.base_weights import merge_base_weights
from lorasweep.models import file_schedule
from lorasweep.models.base_model import BaseModel, Precision, torch_dtype
from lorasweep.models.file_schedule import V_PRED, ZTSNR
from lorasweep.models.load_model import Model, frozen
from lorasweep.models.model_files import (
    ModelError,
    check_file,
    check_folder,
    check_parts,
    check_values,
    load_error,
    load_errors,
    read_object,
    refuse_others,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from lorasweep.adapters.adapter import Site

log = logging.getLogger(__name__)

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
    layout: ModelLayout
    own_schedule: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the noise schedule of the configs, as a file or the settings say."""
    notes: tuple[str, ...] = ()
    """What was knowingly left out in reading, in words for a person."""

    def cast(self, precision: Precision | None) -> WholeModel:
        """The same in another precision; None keeps each tensor as it is."""
        if precision is None:
            return self
        dtype = torch_dtype(precision)
        weights = {
            part: {name: tensor.to(dtype) for name, tensor in tensors.items()}
            for part, tensors in self.weights.items()
        }
        return replace(self, weights=weights)

    @property
    def precision(self) -> Precision:
        """The coarsest type among the tensors."""
        found = {tensor.dtype for tensors in self.weights.values() for tensor in tensors.values()}
        order: tuple[Precision, ...] = ("bf16", "fp16", "fp32")
        return next((name for name in order if torch_dtype(name) in found), "fp32")

    def weight_of(self, site: Site) -> Tensor:
        """The weight that an adapter of this site changes, as the files hold it."""
        return self.weights[site.part][parameter_name(site, "weight")]

    @cached_property
    def schedule(self) -> dict[str, Any]:
        """Its noise schedule, as a scheduler_config.json holds it."""
        given = diffusers_folder.read_schedule(self.configs)
        return {**given, **self.own_schedule}

    def write(self, place: Path) -> None:
        """Write the layout that `place`'s name tells: a single file, or a diffusers folder."""
        if is_file(place):
            told, metadata = file_schedule.as_said(self.schedule)
            tensors = self.layout.to_original(self.weights) | told
            diffusers_folder.write_tensors(place, tensors, metadata)
        else:
            diffusers_folder.write_folder(place, self.weights, self.configs, self.own_schedule)

    def notes_of(self, target: Path) -> list[str]:
        """What a person is told of what was left out, and of the noise schedule in `target`."""
        is_v = self.schedule.get("prediction_type") == "v_prediction"
        is_zero = bool(self.schedule.get("rescale_betas_zero_snr"))
        what = f"predicts {'v' if is_v else 'the noise (epsilon)'}"
        what += ", with zero terminal SNR" if is_zero else ""
        lines = list(self.notes)
        if not is_file(target):
            told = [f"Noise schedule: the model {what}"] if is_v or is_zero else []
            return [*lines, *told]
        if is_v or is_zero:
            option = "--v_parameterization" + " --zero_terminal_snr" * is_zero
            lines.append(
                f"The model {what}. The file says so ({V_PRED}{f', {ZTSNR}' * is_zero}), but not"
                " every program asks it: tell yours (A1111: a .yaml beside it; ComfyUI: the node"
                f" ModelSamplingDiscrete; kohya: {option})"
            )
        if betas := file_schedule.untold(self.schedule):
            lines.append(f"No file can say the model's {', '.join(betas)}: tell your program")
        return lines


def parameter_name(site: Site, parameter: str) -> str:
    """The name of a site's `weight` or `bias` among its part's tensors."""
    return f"{prefixed(site.path) if site.part == 'text_encoder' else site.path}.{parameter}"


def read(
    source: str,
    config: str | None = None,
    revision: str | None = None,
    names: tuple[str, str] = ("model.path", "model.config"),
    *,
    sdxl: bool = False,
    told: Mapping[str, Any] | None = None,
    vae: str | None = None,
) -> WholeModel:
    """Read a diffusers folder, a hub id, or a single file with `config`'s configs (folder or id).

    Messages call `source` and `config` by these names. With `sdxl` a folder may be of SDXL too.
    What is `told` of its noise schedule stands above what the model itself says. A `vae`, a
    file or folder (`read_vae`), takes the place of the model's own, which may lack then.

    Raises ModelError in one line for another architecture, a missing or misshapen tensor, a pickle.
    Tensors that no part of the model needs are left out, with a warning unless they are known.
    """
    path = Path(source).expanduser()
    told = told or {}
    if path.is_file():
        return _read_file(path, config, names[1], told, vae)
    folder = diffusers_folder.find_folder(source, revision, names[0], weights=True)
    layout = _layout(folder, sdxl)
    weights: dict[str, dict[str, Tensor]] = {}
    leftover: list[str] = []
    for part, shapes in layout.shapes.items():
        if part == "vae" and vae is not None:
            weights[part] = dict(read_vae(vae, layout, folder))
            continue
        tensors = diffusers_folder.read_part(folder, part)
        found = {modern_name(part, name): tensor for name, tensor in tensors.items()}
        weights[part] = {name: found[name] for name in shapes if name in found}
        leftover += [f"{part}/{name}" for name in found if name not in shapes]
    layout.check(weights)
    own = file_schedule.changes(diffusers_folder.read_schedule(folder), told)
    notes = (*_leftover_notes(folder, leftover), *_vae_notes(vae))
    return WholeModel(weights, folder, layout, own, notes)


def as_base(settings: Model, model: WholeModel) -> BaseModel:
    """The model as it is computed with, in fp32, of the tensors that were read.

    Only configs and tokenizers are read for it. Raises ModelError, SettingsError.
    """
    damaged: tuple[type[Exception], ...] = (OSError, *load_errors())
    try:
        return _base(settings, model)
    except (ModelError, SettingsError):
        raise
    except damaged as error:
        raise load_error(f"model.path={settings.path}", error) from None


def base_for_loras(settings: Model) -> BaseModel:
    """The model that LoRA files are drawn with, whatever its architecture. Raises ModelError."""
    is_readable = settings.is_single_file and Path(settings.path).suffix == ".safetensors"
    base: BaseModel
    if not is_readable or check_file(Path(settings.path), f"model.path={settings.path}") == SDXL:
        base = settings.load()
    else:
        base = as_base(settings, read(settings.path, settings.config))
    merge_base_weights(base)
    return base


def _read_file(
    path: Path, config: str | None, key: str, told: Mapping[str, Any], vae: str | None
) -> WholeModel:
    if config is None:
        raise ModelError(
            f"{path} is a single file, which holds no configs and no tokenizer: give the folder or"
            f" the hub id of a diffusers model that has them, by {key}"
        )
    tensors = diffusers_folder.read_tensors(path)
    refuse_others(str(path), tensors)
    if not any(name.startswith(PREFIXES["unet"]) for name in tensors):
        raise ModelError(f"{path} holds no {PREFIXES['unet']}* tensors: it is not a whole model")
    configs = diffusers_folder.find_folder(config, None, key, weights=False)
    layout = _layout(configs, sdxl=False)
    weights, leftover = layout.to_diffusers(tensors)
    if vae is not None:
        weights = {**weights, "vae": read_vae(vae, layout, configs)}
    elif not weights["vae"]:
        raise ModelError(
            f"{path} holds no VAE: `lorasweep convert` and `export --to merged` take one by --vae"
        )
    layout.check(weights)
    said = file_schedule.of_file(path)
    notes = list(_leftover_notes(path, [n for n in leftover if n not in (V_PRED, ZTSNR)]))
    if "prediction_type" not in {**said, **told}:
        notes.append(
            f"The file doesn't say what it predicts, so what {key} says is taken;"
            " model.prediction_type=v_prediction (or epsilon) says otherwise"
        )
    notes += _vae_notes(vae)
    own = file_schedule.changes(diffusers_folder.read_schedule(configs), {**said, **told})
    return WholeModel(weights, configs, layout, own, tuple(notes))


def _vae_notes(vae: str | None) -> list[str]:
    return [] if vae is None else [f"VAE: of {vae}"]


def _layout(folder: Path, sdxl: bool) -> ModelLayout:
    name = diffusers_folder.read_index(folder).get("_class_name")
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
    copied = diffusers_folder.copied_parts(is_sdxl)
    for part in copied:
        if not (folder / part).is_dir():
            raise ModelError(f"{folder} has no {part}: give a whole diffusers folder")
    check_parts(folder, str(folder), (*copied, *diffusers_folder.FILES))
    try:
        return ModelLayout.from_modules(**_empty_modules(folder, is_sdxl))
    except ModelError:
        raise
    except load_errors() as error:
        raise load_error(str(folder), error) from None


def _empty_modules(configs: Path, is_sdxl: bool) -> dict[str, Any]:
    """The parts that a folder's configs describe, without memory for their weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(part: str) -> dict[str, Any]:
        return read_object(configs / part / "config.json", str(configs))

    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel.from_config(config("unet")),
            "vae": AutoencoderKL.from_config(config("vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(config("text_encoder"))),
        }
        if is_sdxl:
            second = CLIPTextConfig.from_dict(config("text_encoder_2"))
            modules["text_encoder_2"] = CLIPTextModelWithProjection(second)
    return modules


def _modules(model: WholeModel) -> dict[str, Any]:
    """The parts, frozen, with the model's tensors in fp32."""
    modules = {
        part: _filled(part, module, model.weights[part])
        for part, module in _empty_modules(model.configs, model.layout.is_sdxl).items()
    }
    for module in modules.values():
        module.requires_grad_(False).eval()
    return modules


def _filled(part: str, module: Any, weights: Mapping[str, Tensor]) -> Module:
    tensors = {name: tensor.float() for name, tensor in weights.items()}
    if part.startswith("text_encoder"):  # its position ids are in no file: the library makes them
        filled: Module = type(module).from_pretrained(
            None, config=module.config, state_dict=tensors, dtype=torch_dtype("fp32")
        )
        return filled
    module.load_state_dict(tensors, assign=True)
    return module


def _base(settings: Model, model: WholeModel) -> BaseModel:
    from transformers import CLIPTokenizer

    name = f"model.path={settings.path}"
    check_folder(model.configs, name, allow_pickle=settings.allow_pickle)
    tokenizers = {
        part: CLIPTokenizer.from_pretrained(model.configs, subfolder=part)
        for part in diffusers_folder.copied_parts(model.layout.is_sdxl)
        if part.startswith("tokenizer")
    }
    index = diffusers_folder.read_index(model.configs)
    components = {
        **_modules(model),
        **tokenizers,
        "scheduler": model.schedule,
        "force_zeros_for_empty_prompt": index.get("force_zeros_for_empty_prompt", True),
    }
    check_values(name, components)
    return frozen(settings, components, "cpu", "fp32")


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
