"""The folders conf/ and sweeps/: where they are and what options they have; and --config-dir's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from lorasweep.core.settings import SettingsError

PACKAGE = Path(__file__).parents[1]
"""The folder of the package lorasweep."""
OPTIONS_SCHEME = "options"
"""By it Hydra finds the reader of a folder of options: hydra_plugins.lorasweep.options_folder."""
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


@contextmanager
def options_from(folder: Path | None) -> Iterator[None]:
    """Within, Hydra finds the options of this folder too. Raises SettingsError if there is none."""
    if folder is not None and not folder.is_dir():
        raise SettingsError(f"--config-dir {folder}: there is no such folder")
    token = _OPTIONS.set(folder and folder.absolute())
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def search_path() -> Iterator[tuple[str, str]]:
    """What Hydra searches beside conf/: who names a folder, and its address."""
    yield "lorasweep", f"file://{sweeps_dir().parent}"
    folder = _OPTIONS.get()
    if folder is not None:
        yield "command-line", f"{OPTIONS_SCHEME}://{folder}"


_OPTIONS: ContextVar[Path | None] = ContextVar("_OPTIONS", default=None)
