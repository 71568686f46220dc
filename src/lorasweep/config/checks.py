"""Checks that see several components, or the command line.

What one value may be is checked beside its field, by its type or `__post_init__`. Each check here
raises SettingsError, or yields what a person should be warned of. `build_run` and `lorasweep
doctor` run all of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lorasweep.config.run import COMPONENTS
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import listed, shown
from lorasweep.judging.metrics.metric import names
from lorasweep.training.training_loss import HUBER

if TYPE_CHECKING:
    from lorasweep.config.run import Run

Check = Callable[["Run"], Iterator[str] | None]


def output_root_is_outside_the_images(run: Run) -> None:
    """Else pictures of one run would be training images of the next."""
    if run.output_root.resolve().is_relative_to(run.dataset.image_dir.resolve()):
        raise SettingsError(
            f"output_root={run.output_root} lies inside dataset.image_dir, so the next run would"
            " take its pictures for yours; give another output_root"
        )


def adapted_parts_are_trained(run: Run) -> Iterator[str]:
    """Some part of the model has both adapters and a learning rate."""
    from lorasweep.adapters.kohya_names import adapted_parts

    adapted, trained = adapted_parts(run.adapter.targets), run.optimizer.trained_parts
    if not adapted & trained:
        raise SettingsError(
            f"adapter.targets={run.adapter.targets} adapts the {' and '.join(sorted(adapted))}"
            f" only, whose learning rate is 0; set optimizer.{_rate_of(min(adapted))}"
        )
    for rate in sorted({_rate_of(one) for one in trained} - {_rate_of(one) for one in adapted}):
        yield (
            f"optimizer.{rate} has no effect: adapter.targets={run.adapter.targets} has no"
            " adapters there"
        )


def _rate_of(part: str) -> str:
    """The setting that has a part's learning rate."""
    return "unet_lr" if part == "unet" else "text_encoder_lr"


def the_model_has_such_parts(run: Run) -> None:
    """Two learning rates are for two text encoders, blocks are counted as the model's."""
    from lorasweep.models.model_files import read_sizes

    sizes = read_sizes(run.model)
    if sizes is not None and sizes.is_sdxl is not None:
        run.check_parts(is_sdxl=sizes.is_sdxl)


def the_model_computes_the_resolution(run: Run) -> None:
    """Width and height, or with buckets, to which they are an area alone, every bucket's."""
    from lorasweep.data.buckets import buckets, check_size
    from lorasweep.models.model_files import read_sizes

    sizes = read_sizes(run.model)
    if run.dataset.enable_bucket:
        buckets(run.dataset)  # there is one
    if sizes is None:
        return
    if not run.dataset.enable_bucket:
        check_size(sizes, run.dataset.size)
        return
    step, multiple = run.dataset.bucket_reso_steps, sizes.vae_scale_factor
    if step % multiple:
        raise SettingsError(
            f"dataset.bucket_reso_steps={step}: this model needs multiples of {multiple} pixels"
        )


def the_text_encoder_has_the_layer(run: Run) -> None:
    """clip_skip counts layers."""
    from lorasweep.models.load_model import check_clip_skip
    from lorasweep.models.model_files import read_sizes

    sizes = read_sizes(run.model)
    if sizes is not None:
        check_clip_skip(run.model, sizes.num_text_layers, is_sdxl=bool(sizes.is_sdxl))


def places_can_be_written(run: Run) -> None:
    """Where files go is a folder, or can become one."""
    from lorasweep.tracking.store import sqlite_path

    check_place("output_root", run.output_root)
    check_place("cache_dir", run.cache_dir)
    database = sqlite_path(run.tracking.resolve(run.output_root))
    if database is not None:
        check_place("tracking.uri", database.parent)


def check_place(key: str, folder: Path) -> None:
    """Raise SettingsError unless the folder of a setting can be written or made."""
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        problem = f"{there} is no folder"
    else:
        try:  # root may write anywhere, by the permissions, but not on a read-only disk or in /proc
            TemporaryDirectory(dir=there, prefix=".lorasweep-").cleanup()
            return
        except OSError as error:
            problem = f"{there} can't be written ({error.strerror})"
    raise SettingsError(f"{key}={folder}: {problem}; give a folder that you can write to")


def overrides_choose_one_option(run: Run) -> None:
    """`adapter=[lora,locon]` is no sweep."""
    for key, value in _overrides(run):
        if key in COMPONENTS and value.startswith("["):
            raise SettingsError(f"{key}={value}: choose one option; several make a sweep, by -m")


def overrides_have_an_effect(run: Run) -> None:
    """What the command line sets is read; values of a file may wait for their turn."""
    unused: dict[str, str] = {}
    if not run.dataset.enable_bucket:
        unused |= dict.fromkeys(_BUCKETS, "dataset.enable_bucket=true")
    if run.sampling.every_n_epochs == 0:
        unused |= dict.fromkeys(_PICTURES, "sampling.every_n_epochs=1")
    if run.adapter.targets in ("attn-mlp", "unet-only"):
        unused |= dict.fromkeys(_CONVOLUTIONS, "adapter.targets=full (or conv)")
    if run.loss_type not in HUBER:
        unused |= dict.fromkeys(_HUBER, "trainer.loss_type=huber (or smooth_l1)")
    if run.multires_noise_iterations == 0:
        unused["trainer.multires_noise_discount"] = "trainer.multires_noise_iterations=6"
    for key, _ in _overrides(run):
        if key in unused:
            raise SettingsError(
                f"{key} has no effect without {unused[key]}; set that or leave it out"
            )


def commas_of_prompts_are_quoted(run: Run) -> Iterator[str]:
    """A comma outside of quotes begins another prompt, also within the text of --n."""
    for key, value in _overrides(run):
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", value)
        if key.endswith(".prompts") and (
            found := re.search(r"--n ((?:(?! --)[^,])*),\s*([^,\]]+)", bare)
        ):
            yield (
                f"{key}: the comma after --n {shown(found[1])} begins a new prompt,"
                f" {shown(found[2])!r}; put quotes around a prompt that holds commas"
            )


def the_dataset_config_agrees(run: Run) -> None:
    """What sd-scripts' dataset config says of the whole data set is what the settings say."""
    from lorasweep.data.subsets import dataset_level

    said = dataset_level(run.dataset)
    if not said.get("dataset.enable_bucket", run.dataset.enable_bucket):
        said = {key: value for key, value in said.items() if key not in _OF_BUCKETS}
    ours = {f"dataset.{key}": value for key, value in vars(run.dataset).items()}
    ours |= {"trainer.batch_size": run.trainer.batch_size}
    ours |= {"dataset.resolution": list(run.dataset.size)}
    other = []
    for key, value in said.items():
        one = [value, value] if key == "dataset.resolution" and isinstance(value, int) else value
        if one != ours[key]:
            other.append(f"{key}={shown(str(one).replace(' ', '').lower())}")
    if other:
        raise SettingsError(
            f"dataset.image_dir={run.dataset.image_dir}: this dataset config says otherwise than"
            f" the settings; add {' '.join(other)}"
        )


def captions_are_read(run: Run) -> None:
    """kohya's folders have their captions."""
    for key, _ in _overrides(run):
        if run.dataset.is_kohyas and re.match(r"captions\b", key):
            raise SettingsError(
                f"{key} has no effect with dataset=kohya, whose folders hold the captions; leave it"
                " out, or take dataset=folder"
            )


def shuffled_captions_are_tags(run: Run) -> Iterator[str]:
    """What shuffles and drops tags has some."""
    from lorasweep.data.captions.caption_images import are_tags

    if run.dataset.is_kohyas:
        return
    if not any(are_tags(captioner) for captioner in run.captions.values()):
        for name in ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step"):
            if getattr(run.dataset, name):
                yield (
                    f"dataset.{name} has no effect: no arm's captions are tags; set"
                    " captions.ARM.tags=true for one whose captions are"
                )


def pick_is_by_a_score(run: Run) -> None:
    """What the command line wants to choose by is scored."""
    scores = names(run.metrics.values(), run.captions, run.dataset.num_holdout)
    for key, _ in _overrides(run):
        by = run.params.get(key)
        if key == "pick.by" and scores is not None and by not in scores:
            raise SettingsError(
                f"pick.by={by}: no metric gives such a score; there are {listed(sorted(scores))}"
            )


def mlflows_variables_are_not_read(run: Run) -> Iterator[str]:
    """Runs go where the settings say, and not where another project's variables do."""
    given = {key for key, _ in _overrides(run)}
    for key, name in _MLFLOW_VARIABLES.items():
        value = os.environ.get(name)
        if value and key not in given and value != getattr(run.tracking, key.partition(".")[2]):
            yield f"{key} is not read from {name}, which is set; give {key}='${{oc.env:{name}}}'"


def alpha_is_at_most_the_rank(run: Run) -> Iterator[str]:
    """alpha/rank scales the delta, but for rsLoRA."""
    for prefix in ("", "conv_"):
        rank = getattr(run.adapter, f"{prefix}rank", None)
        alpha = getattr(run.adapter, f"{prefix}alpha", None)
        rslora = getattr(run.adapter, "rslora", False)
        if rank is not None and alpha is not None and alpha > rank and not rslora:
            yield (
                f"adapter.{prefix}alpha={alpha:g} is larger than adapter.{prefix}rank={rank},"
                " which scales the delta up; the guide advises half of the rank:"
                f" adapter.{prefix}alpha={rank / 2:g}"
            )


def learning_rates_are_read(run: Run) -> Iterator[str]:
    """Adafactor may find its own."""
    if run.lr_scheduler.type == "adafactor":
        yield (
            "optimizer.unet_lr and optimizer.text_encoder_lr only say which parts are trained:"
            " with lr_scheduler=adafactor the optimizer finds its rates itself, and train/lr_unet"
            " shows them"
        )


def second_factors_are_there(run: Run) -> None:
    """LoRA+ speeds those of LoRA, LoCon and DoRA; other types have none."""
    from lorasweep.adapters.lora import LoRA

    if run.optimizer.plus_ratios and not isinstance(run.adapter, LoRA):
        raise SettingsError(
            "optimizer.loraplus_lr_ratio has no effect on this type of adapter, which has no second"
            " factors as LoRA, LoCon and DoRA have; leave it at null"
        )


def saved_factors_are_exact(run: Run) -> Iterator[str]:
    """PiSSA starts from the base's own weights, whose rounding shows."""
    if getattr(run.adapter, "init", None) == "pissa" and run.trainer.save_dtype != "fp32":
        yield (
            f"trainer.save_dtype={run.trainer.save_dtype} rounds adapter.init=pissa's factors,"
            " which are as large as the base's weights; keep the file exact by"
            " trainer.save_dtype=fp32"
        )


def sd_scripts_can_train_it(run: Run) -> None:
    """Its checkout is there, and every setting has a word there."""
    from lorasweep.training import sd_scripts_checkout, sd_scripts_config
    from lorasweep.training.training_run import SdScriptsTrainer

    if isinstance(run.trainer, SdScriptsTrainer):
        sd_scripts_config.check(run.trainer, run, run.model, run.dataset)
        sd_scripts_checkout.check_folder(run.trainer)


CHECKS: tuple[Check, ...] = (
    places_can_be_written,
    output_root_is_outside_the_images,
    the_model_computes_the_resolution,
    the_text_encoder_has_the_layer,
    adapted_parts_are_trained,
    the_model_has_such_parts,
    overrides_choose_one_option,
    overrides_have_an_effect,
    commas_of_prompts_are_quoted,
    captions_are_read,
    the_dataset_config_agrees,
    shuffled_captions_are_tags,
    pick_is_by_a_score,
    mlflows_variables_are_not_read,
    alpha_is_at_most_the_rank,
    learning_rates_are_read,
    second_factors_are_there,
    saved_factors_are_exact,
    sd_scripts_can_train_it,
)

_MLFLOW_VARIABLES = {
    "tracking.uri": "MLFLOW_TRACKING_URI",
    "tracking.experiment": "MLFLOW_EXPERIMENT_NAME",
}
_BUCKETS = ("dataset.min_bucket_reso", "dataset.max_bucket_reso", "dataset.bucket_reso_steps")
_OF_BUCKETS = (*_BUCKETS, "dataset.bucket_no_upscale")
_HUBER = ("trainer.huber_schedule", "trainer.huber_c", "trainer.huber_scale")
_CONVOLUTIONS = ("adapter.conv_rank", "adapter.conv_alpha")
_PICTURES = tuple(
    f"sampling.{name}"
    for name in ("prompts", "width", "height", "num_inference_steps", "guidance_scale", "seed")
)


def _overrides(run: Run) -> Iterator[tuple[str, str]]:
    """Keys and values of the command line."""
    for override in run.overrides:
        key, _, value = override.partition("=")
        yield key.lstrip("+"), value
