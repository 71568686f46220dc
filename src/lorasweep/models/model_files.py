"""Is a base model whole? Its files before a library loads them, and its parts afterwards.

What diffusers and transformers can't find they fill with random numbers or an empty vocabulary, and
say so in a warning at most: such a model would be trained on for hours.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.core.foreign_files import MAX_BYTES, ForeignFileError, check_no_pipe, read_json
from lorasweep.core.safetensors_header import CheckpointError, check_length
from lorasweep.core.text import shown
from lorasweep.models.file_schedule import of_file
from lorasweep.models.model_settings import PICKLED, ModelSettings

if TYPE_CHECKING:
    pass

CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}
"""By part of a diffusers folder."""
SD, SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
"""diffusers' names of the pipelines whose models are trained here."""
PREDICTIONS = ("epsilon", "v_prediction")
_COUNTS = ("num_hidden_layers", "layers_per_block", "transformer_layers_per_block")
_MAX_COUNT = 1000  # of layers; the largest text encoders have a tenth
_VOCABULARY = ("tokenizer.json", "vocab.json")  # a tokenizer needs one of them

_SDXL_FILE = r"conditioner\.embedders\."
_OTHERS = {
    _SDXL_FILE: "an SDXL checkpoint: exports of single files of SDXL come later; give a diffusers"
    " folder",
    r"cond_stage_model\.model\.": "a Stable Diffusion 2 checkpoint: only 1.x is supported"
    " as a single file; give a diffusers folder",
    r"lora_|.+\.lora_": "a LoRA, not a whole model: give the model's file or folder",
    r"(model\.diffusion_model\.)?double_blocks\.": "a Flux checkpoint: only Stable Diffusion 1.x"
    " is supported",
}
"""Patterns of the tensors' names that tell other models, and what is said of them."""


class ModelError(ValueError):
    """The base model can't be used; the message says why and what to do."""


@dataclass(frozen=True)
class ModelSizes:
    """What a model's configs say of it before it is loaded; `BaseModel` has the same names."""

    vae_scale_factor: int
    """Pixels a side of one latent."""
    size_multiple: int
    """Pixels that a side has at least."""
    num_text_layers: int
    """Layers of the (first) text encoder."""
    is_sdxl: bool | None
    """None: its configs are not here yet."""


_NOT_HERE = ModelSizes(vae_scale_factor=8, size_multiple=8, num_text_layers=12, is_sdxl=None)
"""Those of every released Stable Diffusion 1.x, but for the least side, which none trains at."""


def read_sizes(settings: ModelSettings) -> ModelSizes | None:
    """The sizes that a model's configs say, if they do.

    Where they are not on this machine yet, those of Stable Diffusion 1.x: what it can't compute is
    known before captions are made and the model is downloaded.
    """
    folder = _configs_here(settings)
    if folder is None:
        return _NOT_HERE
    try:
        unet, vae, text = (
            read_object(folder / part / CONFIGS[part], "")
            for part in ("unet", "vae", "text_encoder")
        )
        vae_scale = 2 ** (len(vae["block_out_channels"]) - 1)
        multiple = vae_scale * 2 ** (len(unet["block_out_channels"]) - 1)
        layers, is_sdxl = int(text["num_hidden_layers"]), (folder / "text_encoder_2").is_dir()
        return ModelSizes(vae_scale, multiple, layers, is_sdxl)
    except (ModelError, KeyError, TypeError, ValueError):
        return None  # whoever loads the model says what is wrong with it


def read_schedule(settings: ModelSettings) -> dict[str, Any] | None:
    """The noise schedule that a model's files say, as its scheduler_config.json; None: not here."""
    folder = _configs_here(settings)
    if folder is None:
        return None
    try:
        config = read_object(folder / "scheduler" / CONFIGS["scheduler"], "")
    except ModelError:
        return None
    return {**config, **(of_file(Path(settings.path)) if settings.is_single_file else {})}


def _configs_here(settings: ModelSettings) -> Path | None:
    """The diffusers folder with a model's configs, given or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    is_file = settings.is_single_file
    where, revision = (settings.config, None) if is_file else (settings.path, settings.revision)
    if where is None or Path(where).is_dir():
        return None if where is None else Path(where)
    try:
        found = try_to_load_from_cache(where, "unet/config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parents[1] if isinstance(found, str) else None


def check_folder(folder: Path, name: str, *, allow_pickle: bool) -> None:
    """Raise ModelError unless a diffusers folder has all parts of Stable Diffusion 1.x or SDXL.

    Messages call it `name`. Nothing but JSON is read, all that the libraries will read too.
    """
    index = read_object(folder / "model_index.json", name)
    check_index(index, name)
    second = ("text_encoder_2",) if index["_class_name"] == SDXL else ()
    files = {**CONFIGS, **dict.fromkeys(second, "config.json")}
    tokenizers = ("tokenizer", *(["tokenizer_2"] if second else []))
    configs = {part: read_object(folder / part / file, name) for part, file in files.items()}
    check_parts(folder, name, (*files, *tokenizers))
    _check_fit(configs, name)
    for tokenizer in tokenizers:
        if not any((folder / tokenizer / file).is_file() for file in _VOCABULARY):
            raise ModelError(f"{name} can't be loaded: no {tokenizer} in it; give a whole folder")
    if not allow_pickle:
        for part in ("unet", "vae", "text_encoder", *second):
            _refuse_pickles_alone(folder / part, name)


def check_parts(folder: Path, name: str, parts: Iterable[str]) -> None:
    """Raise ModelError for a file that a library might read without end, or build without end of.

    JSON is parsed once within bounds. Of weights the header's length is looked at.
    """
    for path in sorted(path for part in parts for path in (folder / part).glob("*")):
        try:
            check_no_pipe(path)
            if not path.is_file():
                continue
            if path.suffix == ".json":
                _check_counts(read_json(path, object), path)
            elif path.suffix == ".safetensors":
                check_length(path)
            elif path.suffix not in PICKLED and path.stat().st_size > MAX_BYTES:
                raise ForeignFileError(f"{path} is too large to be a model's")
        except (ForeignFileError, CheckpointError) as error:
            raise ModelError(f"{name} can't be loaded: {error}; give a whole model") from None


def _check_counts(values: Any, path: Path) -> None:
    """A library would build as many layers as a config says, for hours."""
    for key in _COUNTS if isinstance(values, dict) else ():
        counts = values.get(key)
        for count in counts if isinstance(counts, list) else [counts]:
            if isinstance(count, int | float) and not count <= _MAX_COUNT:
                raise ForeignFileError(f"{path}: no model has {key} of {shown(str(count), 20)}")


def check_index(index: Mapping[str, Any], name: str) -> None:
    """Raise ModelError for the model_index.json of a model that is not trained here."""
    kind = index.get("_class_name")
    if kind not in (SD, SDXL):
        raise ModelError(
            f"{name} is a {shown(str(kind))}; lorasweep trains models of Stable Diffusion 1.x's,"
            f" 2.x's and SDXL's layout ({SD}, {SDXL}) so far"
        )


def check_file(path: Path, name: str) -> str:
    """diffusers' pipeline of a single file's model, `SD` or `SDXL`, by its header alone.

    Messages call it `name`. Raises ModelError for a file that is cut, no safetensors, or of another
    kind of model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        check_length(path)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        reason = f"{path.name} is not a whole safetensors file: {error}"
        raise ModelError(f"{name} can't be loaded: {reason}; give an undamaged copy") from None
    except CheckpointError as error:
        raise ModelError(f"{name} can't be loaded: {error}; give an undamaged copy") from None
    of_sdxl = [one for one in names if re.match(_SDXL_FILE, one)]
    if not of_sdxl:
        refuse_others(name, names)
        return SD
    if not any(one.startswith("conditioner.embedders.1.") for one in of_sdxl):
        raise ModelError(f"{name} is SDXL's refiner, which is not trained here")
    return SDXL


def refuse_others(name: str, tensors: Iterable[str]) -> None:
    """Raise ModelError where the names of a file's tensors are those of another kind of model."""
    for tensor in tensors:
        for mark, what in _OTHERS.items():
            if re.match(mark, tensor):
                raise ModelError(f"{name} is {what}")


def read_object(path: Path, name: str) -> dict[str, Any]:
    """The JSON object of a model's config. Raises ModelError."""
    where = f"{path.parent.name}/{path.name}" if path.name != "model_index.json" else path.name
    try:
        found: dict[str, Any] = read_json(path)
        return found
    except OSError as error:
        reason = f"{where}: {error.strerror}"
    except ForeignFileError as error:
        reason = str(error)
    raise ModelError(f"{name} can't be loaded: {reason}; give a whole diffusers folder")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within, the libraries don't tell of what we check and say ourselves."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    both = (diffusers_logging, transformers_logging)
    before = [one.get_verbosity() for one in both]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for one in both:
                one.set_verbosity(logging.CRITICAL)
            yield
    finally:
        for one, level in zip(both, before, strict=True):
            one.set_verbosity(level)


def check_missing(name: str, missing: Mapping[str, Iterable[str]]) -> None:
    """Raise ModelError if weights, whose names are given by part, were not in the files."""
    for part, names in missing.items():
        # buffers that older files hold and newer ones leave out
        lacking = sorted(one for one in names if not one.endswith("position_ids"))
        if lacking:
            raise ModelError(
                f"{name} can't be loaded: {len(lacking)} of the {part}'s weights are missing in its"
                f" files, first {shown(lacking[0])}; give a whole model"
            )


def check_values(name: str, components: Mapping[str, Any]) -> None:
    """Raise ModelError for weights that are not finite, or a tokenizer of another model."""
    import torch

    modules = {n: one for n, one in components.items() if isinstance(one, torch.nn.Module)}
    for part, module in modules.items():
        for one, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ModelError(
                    f"{name} can't be used: the {part}'s {one} holds values that are not finite"
                    " (NaN or infinite); give an undamaged copy"
                )
    for tokenizer in (one for one in components if one.startswith("tokenizer")):
        vocabulary = len(components[tokenizer])
        encoder = tokenizer.replace("tokenizer", "text_encoder")
        words = int(components[encoder].config.vocab_size)
        if not words // 2 < vocabulary <= words:
            raise ModelError(
                f"{name} can't be used: its {tokenizer} has {vocabulary} entries and its"
                f" {encoder.replace('_', ' ')} {words}; they are of different models"
            )


def load_error(name: str, error: Exception) -> ModelError:
    """The one line for what a library raised while it loaded the files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = shown(lines[0] if lines else type(error).__name__, 300).rstrip(".:; ")
    return ModelError(f"{name} can't be loaded: {first}; give a whole model")


def load_errors() -> tuple[type[Exception], ...]:
    """What libraries raise for damaged configs, vocabularies and weights, besides OSError."""
    from safetensors import SafetensorError

    return (
        SafetensorError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
        ArithmeticError,
        RecursionError,
    )


def _check_fit(configs: Mapping[str, Mapping[str, Any]], name: str) -> None:
    """Do the parts speak of one model, and of one that is trained here?"""
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    second = configs.get("text_encoder_2")
    width, reads = text.get("hidden_size"), unet.get("cross_attention_dim")
    if second is not None and isinstance(width, int):
        width += second.get("hidden_size", 0)
        _check_added(unet, second, name)
    if reads != width:
        encoders = "text_encoder makes" if second is None else "text encoders make"
        raise ModelError(
            f"{name} can't be used: its unet reads embeddings of width {shown(str(reads))}, its"
            f" {encoders} {shown(str(width))}; they are of different models"
        )
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latents:
        raise ModelError(
            f"{name} can't be used: its unet takes {shown(str(channels))} channels, its vae makes"
            f" {shown(str(latents))}; models of inpainting, depth or other variants are not trained"
        )
    scaling = vae.get("scaling_factor", 0.18215)
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not 0 < scaling < 1e6:
        raise ModelError(f"{name} can't be used: vae/config.json: scaling_factor is no number > 0")
    predicts = configs["scheduler"].get("prediction_type", "epsilon")
    if predicts not in PREDICTIONS:
        raise ModelError(
            f"{name} can't be used: scheduler_config.json: prediction_type {shown(str(predicts))}"
            f" is not known; it is {' or '.join(PREDICTIONS)}"
        )


def _check_added(unet: Mapping[str, Any], second: Mapping[str, Any], name: str) -> None:
    """Does SDXL's UNet read what its second text encoder says of a whole prompt, and six sizes?"""
    reads = unet.get("projection_class_embeddings_input_dim")
    pooled, each = second.get("projection_dim"), unet.get("addition_time_embed_dim")
    if unet.get("addition_embed_type") != "text_time" or not (
        isinstance(pooled, int) and isinstance(each, int) and reads == pooled + 6 * each
    ):
        raise ModelError(
            f"{name} can't be used: its unet doesn't read a whole prompt's embedding of width"
            f" {shown(str(pooled))} and six sizes; the refiner and other variants are not trained"
        )


def _refuse_pickles_alone(folder: Path, name: str) -> None:
    files = [path for path in folder.iterdir() if path.is_file()]
    if any(path.suffix == ".safetensors" for path in files):
        return
    pickles = sorted(path.name for path in files if path.suffix in PICKLED)
    if pickles:
        raise ModelError(
            f"{name} can't be loaded: {folder.name} has its weights as a pickle alone"
            f" ({shown(pickles[0])}), which can run any code when loaded; convert it to"
            " .safetensors, or trust it by model.allow_pickle=true"
        )
