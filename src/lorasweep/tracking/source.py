"""What code and libraries a run was made with."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from lorasweep.core.git import git

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
    if git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return {}
    commit = git(file.parent, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return {}
    dirty = bool(git(file.parent, "status", "--porcelain", "--untracked-files=no"))
    return {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": str(dirty).lower()}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
