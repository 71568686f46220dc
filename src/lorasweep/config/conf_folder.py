"""The folders conf/ and sweeps/: where they are and what options they have."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
"""The folder of the package lorasweep."""
_SHIPPED = PACKAGE / "shipped"  # of a wheel; pyproject.toml puts conf/ and sweeps/ there


def conf_dir() -> Path:
    """The folder of options: inside the installed package, or the checkout's."""
    return _root() / "conf"


def sweeps_dir() -> Path:
    """The folder of the sweeps that ship: inside the installed package, or the checkout's."""
    return _root() / "sweeps"


def _root() -> Path:
    return _SHIPPED if _SHIPPED.is_dir() else PACKAGE.parents[1]


def groups() -> dict[str, list[str]]:
    """The groups of conf/ and sweeps/, with the names of their options."""
    folders = [*sorted(path for path in conf_dir().iterdir() if path.is_dir()), sweeps_dir()]
    found = {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in folders}
    return {name: options for name, options in found.items() if options}
