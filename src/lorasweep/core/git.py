"""Asking git about a checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

GIT_SECONDS = 20


def git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command in `folder`, stripped; None if it fails or takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            check=True,
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()
