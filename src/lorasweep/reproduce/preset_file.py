"""What somebody trains with elsewhere, from a file of any of three kinds, as settings of ours.

A preset of kohya_ss (.json), what sd-scripts or kohya_ss writes for sd-scripts (.toml), or a LoRA
with kohya's metadata. The file may be anybody's: no place, class or variable of it is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasweep.core.foreign_files import ForeignFileError, read_json, read_toml
from lorasweep.core.settings import SettingsError
from lorasweep.reproduce import foreign_lora
from lorasweep.reproduce.found_settings import FoundSettings, Said, said_as
from lorasweep.reproduce.kohya_gui import as_options
from lorasweep.reproduce.kohya_settings import take_over

_MAX_KEYS = 2_000  # a preset of kohya_ss has 300
_ALL_IMAGES = "sd-scripts trains on every image of its folders"


def read_preset(path: Path, name: str) -> FoundSettings:
    """The settings of a file, which will be called `name`.

    Raises SettingsError, ForeignFileError, CheckpointError or OSError for what can't be taken.
    """
    if path.suffix.lower() not in (".json", ".toml"):
        found = foreign_lora.read_settings(path)
        found.name = name
        return found
    found = FoundSettings(name=name)
    try:
        if path.suffix.lower() == ".json":
            options = as_options(read_json(path), found)
        else:
            options = _flat(read_toml(path))
        if len(options) + len(found.rows) > _MAX_KEYS:
            raise SettingsError(f"it has more than {_MAX_KEYS} keys: it is no preset")
        take_over(options, found, with_defaults=True)
    except ForeignFileError:
        raise
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    found.take("dataset.num_images", "all", _ALL_IMAGES)
    found.take("dataset.min_size", 1, _ALL_IMAGES)
    found.notes += [
        "Repeats are in the names of kohya's folders (10_woman): captions.sidecar.repeats says them"
        " here",
        "Of all images at most a fifth, 8 by default, are held out for scores; sd-scripts holds out"
        " none: dataset.num_holdout=0",
    ]
    return found


def _flat(content: Mapping[str, Any]) -> dict[str, Said]:
    """Options by name; a TOML's sections are for people, as sd-scripts reads them."""
    if "datasets" in content or "general" in content:
        raise SettingsError(
            "it is a config of data sets and says nothing of the training; give the TOML of"
            " --config_file"
        )
    options: dict[str, Said] = {}
    for name, value in content.items():
        section = value if isinstance(value, dict) else {name: value}
        options |= {key: said_as(key, one) for key, one in section.items()}
    return options
