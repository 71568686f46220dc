"""Before a run trains: its images are drawn, captioned, written into folders and encoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from lorasweep.config.run import Run
from lorasweep.config.settings_digest import settings_digest
from lorasweep.core.atomic_write import FolderGoneError, write_atomically
from lorasweep.core.settings import SettingsError
from lorasweep.data import dataset, kohya_folders, latents
from lorasweep.data.captions import caption_images
from lorasweep.data.dataset import ImageSet
from lorasweep.data.kohya_folders import Arm, ArmCaptions
from lorasweep.data.masks import mask_files
from lorasweep.data.regularisation import balanced
from lorasweep.data.subset_captions import subset_captions
from lorasweep.data.subset_settings import SubsetSettings
from lorasweep.data.subsets import subsets
from lorasweep.judging.metrics.metric import Images
from lorasweep.judging.pick_rule import sign
from lorasweep.models.base_model import BaseModel
from lorasweep.runs import provenance
from lorasweep.tracking import NewRun, Tracker
from lorasweep.tracking.store import FOLDERS_TAG, TRIAL_TAG


def check_inputs(runs: Iterable[Run]) -> None:
    """Raise SettingsError for images that can't be used and captions that are missing.

    Called before a sweep, all of whose runs would fail by them. Captions that a model writes are
    not made here.
    """
    runs = list(runs)
    was, dataset.logger.disabled = dataset.logger.disabled, True  # each run gives its warnings
    try:
        found = {one: dataset.select(one) for one in dict.fromkeys(run.dataset for run in runs)}
        for one, images in found.items():
            subset_captions(one, images)
            mask_files(one, images)
    finally:
        dataset.logger.disabled = was
    arms = dict.fromkeys((run.dataset, *arm) for run in runs for arm in run.captions.items())
    for one, arm, captioner in arms:
        if not captioner.cached:
            caption_images.caption_images(captioner, found[one].images, runs[0].cache_dir, arm=arm)


def check_server(run: Run) -> None:
    """Raise TrackingError for a tracking server that can't be reached; before a sweep, likewise.

    One that has a run of the sweep may be away, with a warning.
    """
    if run.tracking.is_remote and not run.tracking.offline:
        with Tracker(run.tracking, run.output_root) as tracker:
            tracker.ready(run.output_dir, run.sweep)


def write_folders(run: Run) -> Path:
    """Draw, caption and write the images into kohya's folders; the same inputs share one place."""
    images = dataset.select(run.dataset)
    texts, of_folders = _made_captions(run, images), subset_captions(run.dataset, images)
    if both := sorted(texts.keys() & of_folders.keys()):
        raise SettingsError(
            f"captions.{both[0]} and a folder of dataset.reg_data_dir have one name; rename the"
            " folder"
        )
    texts |= of_folders
    masks = mask_files(run.dataset, images)
    of_masks = [hashlib.sha256(data).hexdigest() for data in masks.values()]
    of_masks += [arm for arm, made in texts.items() if made.keeps_alpha]
    parts = (images.digest, texts, run.dataset.caption_extension)
    inputs = repr((*parts, of_masks) if of_masks else parts).encode()
    name = f"{run.dataset.image_dir.resolve().name}-{hashlib.sha256(inputs).hexdigest()[:8]}"
    root = run.output_root / "datasets" / name
    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f".{name}.lock")):
        return kohya_folders.write(images, texts, root, run.dataset.caption_extension, masks)


def _made_captions(run: Run, images: ImageSet) -> dict[str, ArmCaptions]:
    """Each arm's captions, by its captioner; regularisation images have their own."""
    captions = run.captions.items()
    models = {arm: caption_images.identity(one, arm=arm) for arm, one in captions}  # all are here
    return {
        arm: ArmCaptions(
            repeats=captioner.repeats,
            captions=(
                *caption_images.caption_images(captioner, images.images, run.cache_dir, arm=arm),
                *(None for _ in images.reg),
            ),
            captioner=models[arm],
            has_lines=run.dataset.enable_wildcard,
            keeps_alpha=run.dataset.alpha_mask,
        )
        for arm, captioner in captions
    }


def captions_used(run: Run, data: Path) -> str:
    """The captions in the folders now, edited ones too, as JSON: split, folder, file."""
    own = _own_settings(run)
    found = {
        split: {
            f"{arm.repeats}_{arm.name}": {item.path.name: item.caption for item in arm.items}
            for arm in _read(run, data / split, own)
        }
        for split in ("train", "holdout", "reg")
        if (data / split).is_dir()
    }
    return json.dumps(found, indent=1, ensure_ascii=False)


def new_run(run: Run, data: Path, texts: str) -> NewRun:
    """What MLflow gets of a run when it begins.

    Also writes captions.json and the data set's manifest.json into the run's folder.
    """
    if not run.output_root.is_dir():
        raise FolderGoneError(run.output_root)
    run.output_dir.mkdir(parents=True, exist_ok=True)
    manifest = (data / "manifest.json").read_bytes()
    write_atomically(run.output_dir / "manifest.json", manifest)
    write_atomically(run.output_dir / "captions.json", texts.encode())
    digest = hashlib.sha256(manifest + texts.encode()).hexdigest()
    others = {key: value for key, value in run.params.items() if key not in ("seed", "name")}
    pick_by = str(run.params.get("pick.by") or "")
    return NewRun(
        name=run.name,
        sweep=run.sweep,
        output_dir=run.output_dir,
        params=run.params,
        config_yaml=run.config_yaml,
        overrides=run.overrides,
        image_dir=run.dataset.image_dir,
        dataset_digest=digest,
        tags={
            **provenance.source_tags(),
            "lorasweep.output_dir": str(run.output_dir),
            FOLDERS_TAG: str(data),
            **({} if run.number is None else {TRIAL_TAG: str(run.number)}),
            **run.tags,
        },
        pick_by=pick_by or None,
        pick_sign=sign(pick_by),
        setting=settings_digest({**others, "images": digest}),
        seed=run.seed,
    )


def encoded_images(base: BaseModel, run: Run, data: Path) -> Images:
    """The latents and captions of the folders in `data`: of all splits."""
    own = _own_settings(run)

    def split(name: str) -> list[latents.Item]:
        folder = data / name
        arms = _read(run, folder, own) if folder.is_dir() else []
        return latents.encode(base, arms, run.dataset, run.cache_dir, own)

    train = split("train")
    reg = balanced(split("reg"), sum(item.repeats for item in train))
    holdout = split("holdout")
    if run.dataset.is_kohyas and not _compare([*train, *holdout]):
        train, holdout = ([replace(item, arm="all") for item in of] for of in (train, holdout))
    return Images(train=train, holdout=holdout, reg=reg)


def _compare(items: Iterable[latents.Item]) -> bool:
    """Do the arms hold the same images, so that their scores tell which captions are better?"""
    of_arms: dict[str, set[str]] = {}
    for item in items:
        of_arms.setdefault(item.arm, set()).add(item.path.name)
    return len({frozenset(names) for names in of_arms.values()}) == 1


def _own_settings(run: Run) -> dict[str, SubsetSettings]:
    """What arms have of their own in how they are read."""
    # a folder that someone has added has no captioner: its captions are taken as kohya does
    sentences = {
        arm: run.dataset.of_sentences()
        for arm, one in run.captions.items()
        if not caption_images.are_tags(one)
    }
    return sentences | {subset.name: subset.settings for subset in subsets(run.dataset)}


def _read(run: Run, folder: Path, own: Mapping[str, SubsetSettings]) -> list[Arm]:
    return kohya_folders.read(
        folder,
        run.dataset.caption_extension,
        lambda arm: own.get(arm, run.dataset).enable_wildcard,
    )
