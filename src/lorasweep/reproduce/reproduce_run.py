"""Make a logged run again from its log alone, and say how far it is the same.

`prepare` rebuilds settings, images and captions, and finds what differs; `train` makes the run
again; `judge` compares both. `write_config` only leaves a folder from which it can be trained.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lorasweep.config.build_run import build_run
from lorasweep.config.compose import literal
from lorasweep.config.run import Run
from lorasweep.core.failures import RunError
from lorasweep.core.text import listed
from lorasweep.data import dataset, kohya_folders
from lorasweep.models.devices import resolve_device
from lorasweep.reproduce import differences, original_images, same_pack
from lorasweep.reproduce.compare import Comparison, compare
from lorasweep.reproduce.config_folder import write_config_folder
from lorasweep.reproduce.differences import Difference
from lorasweep.reproduce.logged_files import read_overrides
from lorasweep.reproduce.logged_settings import (
    LoggedSettings,
    check_places,
    rebuild,
    with_captions,
)
from lorasweep.reproduce.original_images import FoundImages, LoggedCaptions
from lorasweep.reproduce.original_run import OriginalRun, ReproduceError
from lorasweep.reproduce.same_pack import Schedule
from lorasweep.reproduce.trusted_settings import refuse_other_weights
from lorasweep.runs.prepare import write_folders
from lorasweep.runs.run_folder import sweep_name
from lorasweep.tracking.history import Log, LoggedRun

REPRODUCES_TAG = "lorasweep.reproduces"
PARENT_TAG = "lorasweep.parent"
VERDICT_TAG = "lorasweep.reproduction"
REPORT = "reproduction.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a run is to be made again."""

    places: Sequence[str] = ()
    """Settings of this machine: output_root, dataset.image_dir, model.path …"""
    overrides: Sequence[str] = ()
    """What is to be changed: a variation."""
    same_pack: bool = False
    recaption: bool = False
    """Make the captions again, instead of taking the log's."""
    strict: bool = False
    """Stop at a difference."""
    as_config: Path | None = None
    """Only write a config folder there."""

    @property
    def kind(self) -> str:
        """What the new run's name ends in."""
        return "variation" if self.overrides else "reproduced"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that can be made again, and what will differ."""

    original: OriginalRun
    schedule: Schedule
    runs: Mapping[str, Run]
    """By the name that each has in the log."""
    captions: LoggedCaptions
    differences: Sequence[Difference]
    notes: Sequence[str]
    is_variation: bool
    home: Path
    """Folder of its images, captions and runs."""

    @property
    def run(self) -> Run:
        """The run that is made again, as it is here."""
        return self.runs[self.original.run.name]


def prepare(original: OriginalRun, options: Options) -> Plan:
    """Rebuild settings, images and captions, and find out what differs; nothing is trained.

    Raises ReproduceError, SettingsError or Hydra's errors for what is missing, by name.
    """
    check_places(options.places)
    settings = _settings(original, original.run, options.places, options.overrides)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    root = Path(str(settings.values["output_root"])).expanduser().absolute()
    home = root / f"{original.run.name}-{options.kind}" / stamp
    captions = _captions(original)
    schedule = _schedule(
        original, options, _run(original, original.run.name, settings, options, home)
    )
    runs = {name: _run(original, name, settings, options, home) for name in schedule.names}
    run = runs[original.run.name]
    named = {one.partition("=")[0].lstrip("+") for one in (*options.places, *options.overrides)}
    refuse_other_weights(original.origin, run, named)
    for companion in runs.values():
        if not companion.can_share_pack(run):
            raise ReproduceError(f"{companion.name} can't share a pack with the changed {run.name}")
    not_as_then = [
        Difference(key, "no such setting yet", str(value)) for key, value in settings.filled.items()
    ]
    if captions.added:
        added = f"put into the folders by hand: {listed(captions.added)}"
        not_as_then.append(Difference("images", added, "not logged"))
    with _kept_if_all_is_well(home):
        found = _find_images(original, settings, home)
        notes = [*_notes(original, settings, found, captions)]
        texts = captions.texts
        if options.recaption:
            cache_dir, arms = run.cache_dir, settings.values["captions"]
            texts, other_captions = differences.recaption(
                arms, found, texts, cache_dir, settings.image_dir
            )
            not_as_then += other_captions
            notes.append("captions: made again")
        if options.same_pack:
            notes += [f"pack: {', '.join(schedule.names)}", *schedule.caveats]
        original_images.lay_out(found, home)
        original_images.write_captions(texts, home)
        if not options.overrides:
            _check_draw(run, original.manifest)
        not_as_then += differences.from_origin(original.origin, run)
        not_as_then += _differences_of_pack(original, options, schedule)
        _use_threads(original.origin, run)
    return Plan(
        original=original,
        schedule=schedule,
        runs=runs,
        captions=captions,
        differences=not_as_then,
        notes=notes,
        is_variation=bool(options.overrides),
        home=home,
    )


def discard(home: Path) -> None:
    """Delete the folder of a plan that is not trained, and those around it that are empty now."""
    shutil.rmtree(home, ignore_errors=True)
    with suppress(OSError):
        home.parent.rmdir()
        home.parent.parent.rmdir()  # output_root


def train(plan: Plan) -> None:
    """Train the run, and its companions where they are asked for.

    Raises RunError where it fails now and had not failed then.
    """
    original_images.take_out(write_folders(plan.run), plan.captions.removed)
    reason = same_pack.train(plan.schedule, plan.runs, plan.original.run.name)
    if reason is not None and plan.original.run.status != "FAILED":
        raise RunError(reason)


def judge(plan: Plan) -> tuple[LoggedRun, Comparison]:
    """Compare both, and record the verdict with the new run, which is returned."""
    run = plan.run
    log = Log(run.tracking.resolve(run.output_root), run.tracking.experiment)
    new = next(iter(log.named(run.name, run.sweep)), None)
    if new is None:
        raise ReproduceError(f"{run.name} is trained, but not in MLflow yet: nothing is compared")
    original = plan.original
    result = compare(log, original.run, new, run.output_root, original.file, original.until)
    report = {
        "original": {"run": original.run.name, "run_id": original.run.run_id},
        "differences": [vars(one) for one in plan.differences],
        "verdict": result.verdict,
        "rows": [asdict(row) for row in result.rows],
    }
    log.add_text(new, REPORT, json.dumps(report, indent=1))
    if not plan.is_variation:
        log.tag(new, {VERDICT_TAG: result.verdict})
    return new, result


@contextmanager
def _kept_if_all_is_well(home: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        discard(home)
        raise


def write_config(original: OriginalRun, options: Options, folder: Path) -> tuple[Path, list[str]]:
    """Write a folder for `lorasweep train --config-dir`; its experiment's file, and what to know.

    Images that can be found are copied into the folder; else the log's path of them stays.
    """
    check_places(options.places)
    settings = _settings(original, original.run, options.places, options.overrides)
    run, name = original.run, f"{original.run.name}-{options.kind}"
    given = Path(str(settings.values["dataset"]["image_dir"]))
    _built(settings.values, name, folder, folder, given, folder / original_images.CAPTIONS)
    captions = _captions(original)
    folder.mkdir(parents=True, exist_ok=True)
    notes = [f"{key} is not in the log: {value}" for key, value in settings.filled.items()]
    notes += _followed(settings)
    jsonl = original_images.write_captions(captions.texts, folder)
    try:
        image_dir = original_images.lay_out(_find_images(original, settings, folder), folder)
    except ReproduceError as error:
        notes.append(str(error))
        image_dir = given
    values = with_captions(settings.values, image_dir.absolute(), jsonl.absolute())
    values |= {"name": name, "trainer": {**values["trainer"], "device": "auto"}}
    what = "A variation" if options.overrides else "The settings"
    comment = f"{what} of {run.name} of {run.sweep}, MLflow run {run.run_id}."
    return write_config_folder(literal(values), folder, name, comment), notes


def _settings(
    original: OriginalRun, run: LoggedRun, places: Sequence[str], overrides: Sequence[str] = ()
) -> LoggedSettings:
    """The settings of a run of the log, as they are trained here."""
    text = original.log.text(run, "config.yaml")
    if text is None:
        raise ReproduceError(
            f"{run.name}: its config.yaml is not in the log, so it can't be rebuilt"
        )
    given = original.log.text(run, "overrides.yaml") if overrides else None
    where = f"{run.name}'s overrides.yaml"
    return rebuild(text, places, overrides, read_overrides(given or "[]", where))


def _captions(original: OriginalRun) -> LoggedCaptions:
    where = f"{original.run.name}'s captions.json"
    return original_images.logged_captions(original.manifest, original.text("captions.json"), where)


def _find_images(original: OriginalRun, settings: LoggedSettings, folder: Path) -> FoundImages:
    """The run's images, on this machine or out of its log; those are put into `folder`/images."""
    image_dir = Path(str(settings.values["dataset"]["image_dir"])).expanduser()
    with original.log.file(original.run, kohya_folders.ORIGINALS) as archive:
        return original_images.find_images(
            original.manifest,
            image_dir,
            archive,
            folder / "images",
            by_content=settings.image_dir is not None,
        )


def _schedule(original: OriginalRun, options: Options, run: Run) -> Schedule:
    name, epochs, pack = original.run.name, original.last_epoch, original.pack
    if not options.overrides and epochs > run.max_train_epochs:
        raise ReproduceError(
            f"{name}: the log has its epoch {epochs}, but its config.yaml plans"
            f" {run.max_train_epochs}"
        )
    if not options.same_pack:
        return same_pack.alone(name, run.max_train_epochs if options.overrides else epochs)
    if original.run.status == "FAILED" and epochs not in pack and epochs > 1:
        epochs -= 1  # the epoch in which it failed was not noted
    of_it = {epoch for epoch, of in pack.items() if name in [*dict(of["members"]), *of["failed"]]}
    if missing := [epoch for epoch in range(1, epochs + 1) if epoch not in of_it]:
        raise ReproduceError(
            f"{name}: with whom it trained in epoch {missing[0]} is not in the log; leave out"
            " --same-pack to train it alone"
        )
    others = same_pack.companions({epoch: pack[epoch] for epoch in range(1, epochs + 1)}, name)
    gone = [other for other in sorted(others) if not original.log.named(other, original.run.sweep)]
    return same_pack.together(pack, name, epochs, gone)


def _run(
    original: OriginalRun, name: str, settings: LoggedSettings, options: Options, home: Path
) -> Run:
    """A run of the schedule as it is trained here; companions get the same images and captions."""
    logged = original.run
    if name != logged.name:
        (logged, *_) = original.log.named(name, logged.sweep)
        settings = _settings(original, logged, options.places)
    images, captions = home / original_images.IMAGES, home / original_images.CAPTIONS
    name_here = f"{name}-{options.kind}"
    run = _built(settings.values, name_here, home, home / name, images, captions)
    run.check()
    tag = PARENT_TAG if options.overrides else REPRODUCES_TAG
    return replace(run, tags={tag: logged.run_id})


def _built(
    values: Mapping[str, Any], name: str, home: Path, folder: Path, images: Path, captions: Path
) -> Run:
    """The typed run of logged values, which are resolved."""
    settings = OmegaConf.create(literal({**with_captions(values, images, captions), "name": name}))
    return build_run(settings, output_dir=folder, sweep=sweep_name(home))


def _check_draw(run: Run, manifest: Mapping[str, Any]) -> None:
    """The draw from the run's own images must give the split that was logged."""
    drawn = dataset.select(run.dataset)
    now = {image.name: ("train", image.sha256) for image in drawn.train}
    now |= {image.name: ("holdout", image.sha256) for image in drawn.holdout}
    then = {image["file"]: (image["split"], image["sha256"]) for image in manifest["images"]}
    if other := sorted(name for name in {*now, *then} if now.get(name) != then.get(name)):
        raise ReproduceError(
            f"this lorasweep draws its images otherwise: {listed(other)}; use the version that"
            " trained it"
        )


def _differences_of_pack(
    original: OriginalRun, options: Options, schedule: Schedule
) -> Iterator[Difference]:
    if options.same_pack:
        yield from (Difference("pack", "as logged", caveat) for caveat in schedule.caveats)
    elif others := same_pack.companions(original.pack, original.run.name):
        yield Difference(
            "pack",
            f"trained together with {listed(sorted(others))}",
            "alone, which may round otherwise (--same-pack)",
        )


def _notes(
    original: OriginalRun, settings: LoggedSettings, found: FoundImages, captions: LoggedCaptions
) -> Iterator[str]:
    yield from _followed(settings)
    yield f"images: all {len(found.images)} found, {found}"
    if original.text("captions.json") is None:
        yield "captions: as they were made; it was broken off before edits were logged"
    elif captions.edited:
        yield f"captions: as logged, edited by hand for {listed(captions.edited)}"
    if captions.removed:
        yield f"captions: left out as by hand then: {listed(captions.removed)}"


def _followed(settings: LoggedSettings) -> list[str]:
    return [f"{key} follows: {value}" for key, value in settings.followed.items()]


def _use_threads(origin: Mapping[str, Any] | None, run: Run) -> None:
    """Sums are split by threads, so use as many as then; on the CPU only."""
    import torch

    then = ((origin or {}).get("device") or {}).get("threads")
    if then and resolve_device(run.trainer.device) == "cpu" and then <= (os.cpu_count() or 1):
        torch.set_num_threads(int(then))
