"""The folders conf/ and sweeps/: where they are and what options they have."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
"""The folder of the installed package lorasweep."""


def conf_dir() -> Path:
    """The folder of options: inside the installed package, or the checkout's."""
    return _data_dir("conf")


def sweeps_dir() -> Path:
    """The folder of the sweeps that ship, likewise."""
    return _data_dir("sweeps")


def _data_dir(name: str) -> Path:
    installed = PACKAGE / name
    return installed if installed.is_dir() else PACKAGE.parents[1] / name


def groups() -> dict[str, list[str]]:
    """The groups of conf/ and sweeps/, with the names of their options."""
    folders = [*sorted(path for path in conf_dir().iterdir() if path.is_dir()), sweeps_dir()]
    found = {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in folders}
    return {name: options for name, options in found.items() if options}
