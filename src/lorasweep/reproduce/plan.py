"""What it takes to make a logged run again: settings, images, captions, company, differences."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lorasweep.config.config import Run
from lorasweep.core.settings import build as build_component
from lorasweep.data import dataset, kohya_folders
from lorasweep.data.dataset import listed
from lorasweep.models.devices import resolve_device
from lorasweep.reproduce import differences, original_images, recipe, same_pack
from lorasweep.reproduce.differences import Difference
from lorasweep.reproduce.original_images import Captions, Found
from lorasweep.reproduce.original_run import Original
from lorasweep.reproduce.recipe import Recipe, ReproduceError
from lorasweep.reproduce.same_pack import Schedule
from lorasweep.runs import provenance
from lorasweep.tracking.history import LoggedRun

REPRODUCES_TAG = "lorasweep.reproduces"
PARENT_TAG = "lorasweep.parent"


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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that can be made again, and what will differ."""

    original: Original
    schedule: Schedule
    runs: Mapping[str, Run]
    """By the name that each has in the log."""
    captions: Captions
    differences: Sequence[Difference]
    notes: Sequence[str]
    is_variation: bool
    home: Path
    """Folder of its images, captions and runs."""

    @property
    def run(self) -> Run:
        """The run that is made again, as it is here."""
        return self.runs[self.original.run.name]


def prepare(original: Original, options: Options) -> Plan:
    """Rebuild settings, images and captions, and find out what differs; nothing is trained.

    Raises ReproduceError or SettingsError for what is missing, by name.
    """
    recipe.check_places(options.places)
    settings = recipe_of(original, original.run, options.places, options.overrides)
    home = _home(settings, original.run, bool(options.overrides))
    image_dir, jsonl, told, found_notes, made = _data(original, settings, options, home)
    pack = provenance.read_pack(original.text(provenance.PACK))
    schedule, pack_notes = _schedule(original, pack, options, settings)
    rebuilt = {
        name: _run(original, name, settings, options, home, (image_dir, jsonl))
        for name in schedule.names
    }
    run = rebuilt[original.run.name]
    if not options.overrides:
        _check_draw(run, original.manifest)
    origin = differences.read_origin(original.text(provenance.ORIGIN))
    found = [
        *differences.of_settings(settings.filled),
        *differences.of_captions(told, made),
        *differences.of_origin(origin, run),
        *_of_company(original, pack, options, schedule),
    ]
    _use_threads(origin, run)
    followed = [f"{key} follows: {value}" for key, value in settings.followed.items()]
    return Plan(
        original=original,
        schedule=schedule,
        runs=rebuilt,
        captions=told,
        differences=found,
        notes=[*followed, *found_notes, *pack_notes],
        is_variation=bool(options.overrides),
        home=home,
    )


def recipe_of(
    original: Original, run: LoggedRun, places: Sequence[str], overrides: Sequence[str] = ()
) -> Recipe:
    """The settings of a run of the log, as they are trained here. Raises ReproduceError."""
    text = original.log.text(run, "config.yaml")
    if text is None:
        raise ReproduceError(
            f"{run.name}: its config.yaml is not in the log, so it can't be rebuilt"
        )
    given = json.loads(original.log.text(run, "overrides.yaml") or "[]")
    return recipe.rebuild(text, places, overrides, given)


def find_images(original: Original, settings: Recipe, spare: Path) -> Found:
    """The run's images, on this machine or out of its log, those put below `spare`."""
    place = Path(str(settings.values["dataset"]["image_dir"])).expanduser()
    with original.log.file(original.run, kohya_folders.ORIGINALS) as archive:
        return original_images.find(original.manifest, place, archive, spare)


def _home(settings: Recipe, run: LoggedRun, is_variation: bool) -> Path:
    kind = "variation" if is_variation else "reproduced"
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    root = Path(str(settings.values["output_root"])).expanduser().absolute()
    return root / f"{run.name}-{kind}" / stamp


def _data(
    original: Original, settings: Recipe, options: Options, home: Path
) -> tuple[Path, Path, Captions, list[str], list[Difference]]:
    """Images and captions below `home`, and what is to be said of them."""
    used = original.text("captions.json")
    told = original_images.captions(original.manifest, used)
    found = find_images(original, settings, home / "images")
    notes = [f"images: all {len(found.images)} found, {found}"]
    if used is None:
        notes.append("captions: as they were made; it was broken off before edits were logged")
    elif told.edited:
        notes.append(f"captions: as logged, edited by hand for {listed(told.edited)}")
    if told.removed:
        notes.append(f"captions: left out as by hand then: {listed(told.removed)}")
    texts, made = told.texts, list[Difference]()
    if options.recaption:
        arms = {
            arm: build_component(node, f"captions.{arm}")
            for arm, node in settings.values["captions"].items()
        }
        cache_dir = Path(str(settings.values["cache_dir"])).expanduser()
        texts, made = differences.made_again(arms, found, told, cache_dir)
        notes.append("captions: made again")
    image_dir, jsonl = original_images.lay_out(found, texts, home)
    return image_dir, jsonl, told, notes, made


def _schedule(
    original: Original,
    pack: Mapping[int, Mapping[str, Any]],
    options: Options,
    settings: Recipe,
) -> tuple[Schedule, list[str]]:
    run, epochs = original.run, original.last_epoch
    if not options.same_pack:
        planned = int(settings.values["trainer"]["max_train_epochs"])
        return same_pack.alone(run.name, planned if options.overrides else epochs), []
    if run.status == "FAILED" and epochs not in pack and epochs > 1:
        epochs -= 1  # the one that broke it is nobody's
    if missing := [epoch for epoch in range(1, epochs + 1) if epoch not in pack]:
        raise ReproduceError(
            f"{run.name}: with whom it trained in epoch {missing[0]} is not in the log; leave out"
            " --same-pack to train it alone"
        )
    others = same_pack.company({epoch: pack[epoch] for epoch in range(1, epochs + 1)}, run.name)
    gone = [name for name in sorted(others) if not original.log.named(name, run.sweep)]
    schedule = same_pack.together(pack, run.name, epochs, gone)
    return schedule, [f"pack: {', '.join(schedule.names)}", *schedule.caveats]


def _run(
    original: Original,
    name: str,
    settings: Recipe,
    options: Options,
    home: Path,
    data: tuple[Path, Path],
) -> Run:
    """A run of the schedule as it is trained here; companions get the same images and captions."""
    logged, own = original.run, settings
    if name != original.run.name:
        (logged, *_) = original.log.named(name, original.run.sweep)
        own = recipe_of(original, logged, options.places)
    values = recipe.with_captions(own.values, *data)
    kind = home.parent.name.rpartition("-")[2]
    values["name"] = f"{name}-{kind}"
    tag = PARENT_TAG if options.overrides else REPRODUCES_TAG
    run = recipe.build(
        values, home / name, f"{home.parent.name}-{home.name}", tags={tag: logged.run_id}
    )
    run.check()
    if original.run.name != name and not run.can_share_pack(
        recipe.build(recipe.with_captions(settings.values, *data), home, "")
    ):
        raise ReproduceError(f"{name} can't share a pack with the changed {original.run.name}")
    return run


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


def _of_company(
    original: Original,
    pack: Mapping[int, Mapping[str, Any]],
    options: Options,
    schedule: Schedule,
) -> list[Difference]:
    if options.same_pack:
        return [Difference("pack", "as logged", caveat) for caveat in schedule.caveats]
    others = same_pack.company(pack, original.run.name)
    if not others:
        return []
    return [
        Difference(
            "pack",
            f"trained together with {listed(sorted(others))}",
            "alone, which may round otherwise (--same-pack)",
        )
    ]


def _use_threads(origin: Mapping[str, Any] | None, run: Run) -> None:
    """Sums are split by threads, so use as many as then; on the CPU only."""
    import torch

    then = ((origin or {}).get("device") or {}).get("threads")
    if then and resolve_device(run.trainer.device) == "cpu" and then <= (os.cpu_count() or 1):
        torch.set_num_threads(int(then))
