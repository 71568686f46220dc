"""A run's settings as the TOML that sd-scripts trains by: `lorasweep preset --to-kohya RUN`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from lorasweep import __version__
from lorasweep.config.build_run import build_run
from lorasweep.config.compose import literal
from lorasweep.config.run import Run
from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.foreign_files import parse_yaml
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import shown
from lorasweep.data.captions.caption_images import are_tags
from lorasweep.data.dataset import Dataset
from lorasweep.data.subset_settings import SubsetSettings
from lorasweep.models.model_files import read_schedule
from lorasweep.models.model_settings import ModelSettings
from lorasweep.models.noise_schedule import NoiseSchedule
from lorasweep.reproduce import logged_settings
from lorasweep.reproduce.original_run import ReproduceError, find_original
from lorasweep.tracking.history import Log
from lorasweep.tracking.records import RunRecords
from lorasweep.tracking.store import FOLDERS_TAG
from lorasweep.training import sd_scripts_config
from lorasweep.training.sd_scripts_config import Section, Start
from lorasweep.training.training_run import SdScriptsTrainer

_NOT_IN_SD_SCRIPTS = ("save_every_n_steps", "deterministic")  # of trainer=native
_OWN = (
    "Not told, for sd-scripts has nothing like it: metrics.*, pick.by, the hold-out set, and of"
    " sampling all but prompts and every_n_epochs"
)


@dataclass(frozen=True)
class WrittenToml:
    """The TOML of a run, and what its reader has to know."""

    path: Path
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _Base:
    """What sd-scripts is told of a base model, which isn't loaded for it."""

    settings: ModelSettings
    noise_schedule: NoiseSchedule


@dataclass(frozen=True)
class _Image:
    """One in each folder is enough to tell of the folders."""

    path: Path
    repeats: int
    settings: SubsetSettings
    is_reg: bool = False


@dataclass(frozen=True)
class _Data:
    items: Sequence[_Image]
    settings: Dataset


def write_toml(
    word: str, uri: str, experiment: str, out: Path | None, places: Sequence[str]
) -> WrittenToml:
    """Write the TOML of a run that is known by its folder, or by its name or id in MLflow.

    `uri` and `experiment` say where it is logged, `places` are settings of this machine, such as
    model.path. Raises SettingsError for what sd-scripts can't be told and for a word of no run.
    """
    config, tags = _logged(word, uri, experiment)
    run = _run(config, places)
    assert isinstance(run.trainer, SdScriptsTrainer)
    sd_scripts_config.check(run.trainer, run, run.model, run.dataset)
    file = (out or Path(f"{run.name}.toml")).absolute()
    if file.exists():
        raise SettingsError(f"{file} is there already; give another --out, or delete it")
    beside = file.with_suffix("")
    begun = Start(
        output_dir=beside,
        logging_dir=beside / "logs",
        num_steps=run.max_train_steps or 0,
        save_state=False,
    )
    schedule = read_schedule(run.model)
    told = {"prediction_type": run.model.prediction_type} if run.model.prediction_type else {}
    base = _Base(run.model, NoiseSchedule({**(schedule or {}), **told}))
    data = _data(run, Path(tags.get(FOLDERS_TAG, "FOLDER"), "train"))
    sections = sd_scripts_config.kohya_settings(run.trainer, run, base, data, begun)
    if run.max_train_steps is None:
        steps: Section = {**sections["training"], "max_train_steps": None}
        sections["training"] = {"max_train_epochs": run.max_train_epochs, **steps}
    _write(file, sd_scripts_config.text_of(sections, f"{run.name}, by lorasweep {__version__}"))
    if (datasets := sd_scripts_config.dataset_config(data)) is not None:
        _write(beside / sd_scripts_config.DATASET, datasets.encode())
    if run.trainer.sample_every_n_epochs:
        prompts = sd_scripts_config.sample_prompts(run.trainer, run.dataset.size)
        _write(beside / sd_scripts_config.PROMPTS, prompts.encode())
    lines = [*_unsaid(run), _OWN]
    if schedule is None and run.model.prediction_type is None:
        lines.append(
            f"v_parameterization=false: model.path={shown(run.model.path)} is not on this machine,"
            " so what it predicts isn't known"
        )
    if FOLDERS_TAG not in tags:
        lines.append("train_data_dir: the log doesn't say; give the folder that holds 10_…")
    return WrittenToml(file, tuple(lines))


def _logged(word: str, uri: str, experiment: str) -> tuple[str, Mapping[str, str]]:
    """A run's config.yaml and its tags."""
    if Path(word).is_dir():
        record = RunRecords(Path(word)).run()
        if record is None:
            raise ReproduceError(f"{word} is no folder of a run: it has no mlflow.json")
        return record.new.config_yaml, record.new.tags
    found = find_original(word, Log(uri, experiment))
    text = None if found is None else found.text("config.yaml")
    if found is None or text is None:
        raise ReproduceError(f"{word}: no run in this log has made it, or its config is missing")
    return text, found.run.tags


def _run(config: str, places: Sequence[str]) -> Run:
    """The run as sd-scripts would train it, of this or another trainer's."""
    logged_settings.check_places(places)
    values = parse_yaml(config, "its config.yaml")
    trainer = values.get("trainer")
    if isinstance(trainer, dict):
        drawn = values.get("sampling")
        every = drawn.get("every_n_epochs", 0) if isinstance(drawn, dict) else 0
        trainer.update(_target_="SdScriptsTrainer", path=".", sample_every_n_epochs=every)
        for name in _NOT_IN_SD_SCRIPTS:
            trainer.pop(name, None)
    text = OmegaConf.to_yaml(OmegaConf.create(literal(values)))
    rebuilt = logged_settings.rebuild(text, ["trainer.path=.", *places])
    cfg = OmegaConf.create(literal(rebuilt.values))
    return build_run(cfg, output_dir=Path(), checks=())


def _data(run: Run, folder: Path) -> _Data:
    """The folders of a run's captions, as its training wrote them."""
    sentences = run.dataset.of_sentences()
    images = [
        _Image(
            folder / f"{captioner.repeats}_{arm}" / "image",
            captioner.repeats,
            run.dataset if are_tags(captioner) else sentences,
        )
        for arm, captioner in run.captions.items()
    ]
    return _Data(images, run.dataset)


def _unsaid(run: Run) -> Iterator[str]:
    """What the TOML says otherwise than the run's settings."""
    steps, epochs = run.max_train_steps, run.max_train_epochs
    if steps is not None and epochs < steps:
        yield (
            f"trainer.max_train_epochs={epochs}: sd-scripts reads one limit, and is told"
            f" trainer.max_train_steps={steps}, which may come later"
        )


def _write(file: Path, content: bytes) -> None:
    """Write a file, and its folder where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)
