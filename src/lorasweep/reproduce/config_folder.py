"""A logged run as a folder of options for `lorasweep train --config-dir`."""

from __future__ import annotations

from pathlib import Path

from lorasweep.reproduce import original_images, recipe
from lorasweep.reproduce.original_run import Original
from lorasweep.reproduce.plan import Options, find_images, recipe_of
from lorasweep.reproduce.recipe import ReproduceError


def write_config(original: Original, options: Options, folder: Path) -> tuple[Path, list[str]]:
    """Write a folder for `lorasweep train --config-dir`; its experiment's file, and what to know.

    Images that can be found are copied into the folder; else the log's path of them stays.
    """
    recipe.check_places(options.places)
    settings = recipe_of(original, original.run, options.places, options.overrides)
    folder.mkdir(parents=True, exist_ok=True)
    told = original_images.captions(original.manifest, original.text("captions.json"))
    notes = [f"{key} is not in the log: {value}" for key, value in settings.filled.items()]
    notes += [f"{key} follows: {value}" for key, value in settings.followed.items()]
    image_dir, jsonl = folder / "images", folder / "captions.jsonl"
    try:
        found = find_images(original, settings, folder / "images")
        original_images.lay_out(found, told.texts, folder)
    except ReproduceError as error:
        notes.append(str(error))
        image_dir = Path(str(settings.values["dataset"]["image_dir"]))
        original_images.write_captions(told.texts, jsonl)
    values = recipe.with_captions(settings.values, image_dir.absolute(), jsonl.absolute())
    run, is_variation = original.run, bool(options.overrides)
    name = f"{run.name}-{'variation' if is_variation else 'reproduced'}"
    what = "A variation" if is_variation else "The settings"
    of = f"{what} of {run.name} of {run.sweep}, MLflow run {run.run_id}."
    return recipe.write_config({**values, "name": name}, folder, name, of), notes
