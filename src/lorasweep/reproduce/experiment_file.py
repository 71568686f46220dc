"""Found settings as an experiment: one file of options, each with what it comes from beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose_without_images, flat, literal, plain_values
from lorasweep.config.conf_folder import groups
from lorasweep.core.atomic_write import write_atomically
from lorasweep.core.settings import SettingsError, name_for_files
from lorasweep.core.text import shown
from lorasweep.reproduce.found_settings import FoundSettings

_GROUPS_OF_MANY = ("captions", "metrics")


def write_experiment(
    found: FoundSettings,
    folder: Path,
    comment: str,
    overrides: Sequence[str] = (),
    *,
    replace: bool = False,
) -> Path:
    """Write `folder`/experiment/NAME.yaml, once a run can be built of it; the file.

    The images are left for the user to give. Raises SettingsError or Hydra's errors if the settings
    can't be trained here, and for a name that is taken.
    """
    name = name_for_files(found.name, "--as")
    file = folder / "experiment" / f"{name}.yaml"
    if name in groups()["experiment"]:
        raise SettingsError(f"experiment={name} is lorasweep's own; give another name")
    if file.exists() and not replace:
        raise SettingsError(f"{file} is there already; give another name, or delete it")
    chosen = [f"{group}={option}" for group, option in found.choices.items()]
    ours = plain_values(compose_without_images(["captions=[sidecar]", *chosen]))
    found.drop_defaults(flat(ours))
    _change(found, overrides)
    text = _text(found, comment, ours["captions"]["sidecar"])
    _check(text, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.encode())
    return file


def _check(text: str, name: str) -> None:
    """Compose it as `train --config-dir` does, and build the run."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "experiment", f"{name}.yaml")
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        cfg = compose_without_images([f"experiment={name}"], Path(folder))
        build_run(cfg, output_dir=Path())


def _change(found: FoundSettings, overrides: Sequence[str]) -> None:
    """Put overrides of the command line in the place of what was found."""
    if not overrides:
        return
    values = flat(plain_values(compose_without_images(["captions=[sidecar]", *overrides])))
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in groups() and key not in _GROUPS_OF_MANY:
            found.choices[key] = value
        elif key in values:
            found.settings[key] = values[key]
        found.sources[key] = override


def _text(found: FoundSettings, comment: str, sidecar: Mapping[str, Any]) -> str:
    """The YAML. What others have written is in it as text: in values, `${` too."""
    lines = ["# @package _global_", f"# {shown(comment, 500)}"]
    lines += [f"# {shown(note, 500)}" for note in found.notes]
    arms = "[]" if found.arms else "[sidecar]"
    lines += ["defaults:", f"  - override /captions: {arms}"]
    lines += [
        f"  - override /{group}: {option}  # {shown(found.sources[group], 200)}"
        for group, option in found.choices.items()
    ]
    tree: dict[str, Any] = {}
    for setting, value in found.settings.items():
        node = tree
        *parents, last = setting.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value, found.sources.get(setting, "")
    for arm, repeats in found.arms.items():
        values = {"_target_": "Empty"} if arm in found.empty_arms else dict(sidecar)
        own = {**values, "repeats": repeats}
        tree.setdefault("captions", {})[arm] = {key: (one, "") for key, one in own.items()}
    return "\n".join([*lines, "", *_lines(tree, "")]) + "\n"


def _lines(tree: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key, node in tree.items():
        if isinstance(node, dict):
            lines += [f"{indent}{key}:", *_lines(node, f"{indent}  ")]
        else:
            value, source = node
            said = f"  # {shown(source, 200)}" if source else ""
            lines.append(f"{indent}{key}: {json.dumps(literal(value))}{said}")
    return lines
