"""What is not as it was when a run was trained."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.config.config import Run
from lorasweep.core.settings import SettingsError
from lorasweep.data.captions import caption_images
from lorasweep.data.captions.caption_images import Captioner
from lorasweep.data.dataset import listed
from lorasweep.models.devices import resolve_device
from lorasweep.reproduce.original_images import Captions, Found
from lorasweep.runs import provenance

_NOT_COMPUTING = {"mlflow", "pillow"}  # pictures are compared by their bytes anyway


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was, in words."""

    what: str
    then: str
    now: str


def of_origin(origin: Mapping[str, Any] | None, run: Run) -> list[Difference]:
    """Base model, versions, code and device beside those of origin.json."""
    if origin is None:
        unknown = "not logged (an older lorasweep)"
        return [Difference("base model, versions, code, device", unknown, "not compared")]
    return [
        *_of_model(origin.get("model") or {}, run),
        *_of_versions(origin.get("versions") or {}),
        *_of_code(origin.get("code") or []),
        *_of_device(origin.get("device") or {}, run),
    ]


def of_settings(filled: Mapping[str, Any]) -> list[Difference]:
    """Settings that the log lacks."""
    return [Difference(key, "no such setting yet", str(value)) for key, value in filled.items()]


def of_captions(told: Captions, made: Sequence[Difference]) -> list[Difference]:
    """What `made_again` found, and images in the folders that nobody has logged."""
    differences = list(made)
    if told.added:
        differences.append(
            Difference(
                "images", f"put into the folders by hand: {listed(told.added)}", "not logged"
            )
        )
    return differences


def made_again(
    arms: Mapping[str, Captioner], found: Found, told: Captions, cache_dir: Path
) -> tuple[dict[str, dict[str, str]], list[Difference]]:
    """The captions that the captioners give today, and where they differ from the log's.

    An arm that can't be made again keeps the log's.
    """
    texts = {name: dict(of) for name, of in told.texts.items()}
    differences = []
    for arm, captioner in arms.items():
        try:
            new = caption_images.caption_images(captioner, found.images, cache_dir, arm=arm)
        except (SettingsError, OSError) as error:
            first = str(error).splitlines()[0]
            differences.append(Difference(f"captions.{arm}", "the log's are used", first))
            continue
        others = []
        for image, text in zip(found.images, new, strict=True):
            if texts[image.name][arm] != text:
                others.append(image.name)
                texts[image.name][arm] = text
        if others:
            example = others[0]
            differences.append(
                Difference(
                    f"captions.{arm}: {len(others)} of {len(new)}",
                    f"{example}: {told.texts[example][arm]}",
                    texts[example][arm],
                )
            )
    return texts, differences


def _of_model(then: Mapping[str, Any], run: Run) -> Iterator[Difference]:
    now = provenance.identity(run.model, run.cache_dir)
    if now["sha256"] is None:
        yield Difference(
            "base model", str(then.get("path")), "not on this machine yet: not compared"
        )
    elif then.get("sha256") is None:
        yield Difference("base model", "not known", f"sha256 {now['sha256'][:12]}…")
    elif now["sha256"] != then["sha256"]:
        files = {*then["files"], *now["files"]}
        other = sorted(f for f in files if then["files"].get(f) != now["files"].get(f))
        yield Difference(
            "base model",
            f"{then['path']}, sha256 {then['sha256'][:12]}…",
            f"{now['path']}, sha256 {now['sha256'][:12]}…: {listed(other)}",
        )


def _of_versions(then: Mapping[str, str]) -> Iterator[Difference]:
    now = provenance.versions()
    for name in {**then, **now}:
        if then.get(name) != now.get(name) and name not in _NOT_COMPUTING:
            yield Difference(name, then.get(name, "none"), now.get(name, "none"))


def _of_code(then: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    """Of this code; of the folder a run was started in only if that is in git both times."""
    before = {one["what"]: one for one in then}
    now = {one["what"]: one for one in provenance.sources()}
    for what in sorted({*before, *now}):
        is_code, both = what == "lorasweep", what in before and what in now
        pair = _version(before.get(what)), _version(now.get(what))
        if (is_code or both) and pair[0] != pair[1]:
            yield Difference(f"code ({what})", *pair)


def _version(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "no checkout: installed"
    commit = str(one["commit"])[:12]
    return f"commit {commit}" + (
        f" + uncommitted.diff {one['diff_sha256'][:12]}…" if one["dirty"] else ""
    )


def _of_device(then: Mapping[str, Any], run: Run) -> Iterator[Difference]:
    now = provenance.device_of(resolve_device(run.trainer.device))
    for key in {**then, **now}:
        # as many threads as then are used wherever there are as many
        if key == "threads" and then.get(key) and then[key] <= (os.cpu_count() or 1):
            continue
        if then.get(key) != now.get(key):
            yield Difference(f"device: {key}", str(then.get(key)), str(now.get(key)))


def read_origin(text: str | None) -> dict[str, Any] | None:
    """origin.json of a run, None where none was logged."""
    if text is None:
        return None
    loaded = json.loads(text)
    return loaded if isinstance(loaded, dict) else None
