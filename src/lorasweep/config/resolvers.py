"""What conf/ may say in `${…}` beyond OmegaConf's own: arithmetic and names, no work."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lorasweep.config.conf_folder import PACKAGE
from lorasweep.core.settings import name_for_files


def register_resolvers() -> None:
    """Make them known to OmegaConf; again does no harm."""
    for name, resolver in RESOLVERS.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def _user_cache(name: str) -> str:
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / name)


RESOLVERS: dict[str, Callable[..., Any]] = {
    "embedded": lambda path: str(PACKAGE / "embedded" / path),
    "half": lambda number: number / 2 if isinstance(number, int | float) else number,
    "named": lambda name, key="name": name_for_files(name, key),
    "times": lambda a, b: a * b,
    "over": lambda a, b: a / b,
    "basename": lambda path: re.sub(r"[^\w-]+", "-", Path(path).name).strip("-") or "lora",
    "user_cache": _user_cache,
}
