"""What code and libraries a run was made with."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

LIBRARIES = ("lorasweep", "torch", "diffusers", "transformers", "safetensors", "mlflow")


def source_tags() -> dict[str, str]:
    """Tags of versions and git commit, under MLflow's own names where it has one."""
    versions = {f"version.{name}": _version(name) for name in LIBRARIES}
    return {
        "mlflow.source.name": "lorasweep",
        "mlflow.source.type": "LOCAL",
        "mlflow.loggedImages": "true",  # what makes MLflow look for sample cards
        "version.python": ".".join(map(str, sys.version_info[:3])),
        **{key: value for key, value in versions.items() if value},
        **_git_tags(Path(__file__).resolve()),
    }


def _git_tags(file: Path) -> dict[str, str]:
    """Commit of the checkout that holds this code; nothing when it is installed."""
    if _git(file, "ls-files", "--error-unmatch", file.name) is None:
        return {}
    commit = _git(file, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return {}
    dirty = bool(_git(file, "status", "--porcelain", "--untracked-files=no"))
    return {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": str(dirty).lower()}


def _git(file: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(file.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, no checkout, or no commit yet
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
