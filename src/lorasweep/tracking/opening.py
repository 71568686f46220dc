"""What is known of a run when it starts, and the operation that begins it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.tracking.operations import MAX_PARAM, MAX_TAG, DatasetInfo, Open, now, safe_key
from lorasweep.tracking.source import source_tags
from lorasweep.tracking.store import public_uri

DIGEST = 16  # characters of the data set's digest in MLflow's tables; the profile has it whole


@dataclass(frozen=True, kw_only=True)
class NewRun:
    """What is known of a run when it starts."""

    name: str
    sweep: str | None
    """Runs that search together share it; None stands alone under its own name."""
    output_dir: Path
    """The run's own folder; what waits to be sent is kept there."""
    params: Mapping[str, Any]
    """The resolved config, flat: `{"adapter.rank": 8}`."""
    config_yaml: str
    overrides: Sequence[str]
    manifest: Path | Mapping[str, Any]
    image_dir: Path
    dataset_digest: str
    tags: Mapping[str, str] = field(default_factory=dict)


def open_operation(new: NewRun, *, goes_on: bool) -> Open:
    """The operation that begins the run, or goes on with it; without secrets of URIs."""
    tags = {**source_tags(), **new.tags}
    # JSON is YAML, and spares rules for quoting
    overrides = json.dumps(list(new.overrides), ensure_ascii=False, indent=1)
    return Open(
        time=now(),
        tags={safe_key(key): public_uri(value)[:MAX_TAG] for key, value in tags.items()},
        params={safe_key(key): _cut(public_uri(str(v))) for key, v in new.params.items()},
        files={
            "config.yaml": public_uri(new.config_yaml),
            "overrides.yaml": public_uri(f"{overrides}\n"),
            "manifest.json": _manifest_text(new.manifest),
        },
        dataset=DatasetInfo(
            name=new.image_dir.name or "images",
            digest=new.dataset_digest[:DIGEST],
            source=json.dumps({"uri": str(new.image_dir.resolve())}),
            profile=json.dumps({"digest": new.dataset_digest}),
        ),
        replaces=not goes_on and new.sweep is not None,
        goes_on=goes_on,
    )


def _manifest_text(manifest: Path | Mapping[str, Any]) -> str:
    if isinstance(manifest, Path):
        return manifest.read_text()
    return json.dumps(manifest, indent=1, ensure_ascii=False, default=str)


def _cut(value: str) -> str:
    return value if len(value) <= MAX_PARAM else f"{value[: MAX_PARAM - 1]}…"
