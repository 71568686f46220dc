"""What is not as it was when a run was trained, told before it is trained again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.config.run import Run
from lorasweep.core.settings import SettingsError, build
from lorasweep.core.text import listed
from lorasweep.data.captions import caption_images
from lorasweep.models.devices import resolve_device
from lorasweep.reproduce import trusted_settings
from lorasweep.reproduce.original_images import CaptionTexts, FoundImages
from lorasweep.runs import provenance

_NOT_COMPUTING = {"mlflow", "pillow"}  # pictures are compared by their bytes anyway


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was, in words."""

    what: str
    then: str
    now: str


def from_origin(origin: Mapping[str, Any] | None, run: Run) -> list[Difference]:
    """Base model, versions, code and device beside those of origin.json."""
    if origin is None:
        unknown = "not logged (an older lorasweep)"
        return [Difference("base model, versions, code, device", unknown, "not compared")]
    return [
        *_model(origin.get("model") or {}, run),
        *_start(origin, run),
        *_versions(origin.get("versions") or {}),
        *_code(origin.get("code") or []),
        *_device(origin.get("device") or {}, run),
    ]


def recaption(
    arms: Mapping[str, Mapping[str, Any]],
    found: FoundImages,
    logged: CaptionTexts,
    cache_dir: Path,
    image_dir: Path | None = None,
) -> tuple[CaptionTexts, list[Difference]]:
    """The captions that the captioners give today, and where they differ from the log's.

    `arms` are the captioners' settings by arm, `image_dir` the folder of images if a person gave
    it. An arm that can't be made again, or only with what the log alone names, keeps the log's.
    """
    texts = {name: dict(of) for name, of in logged.items()}
    differences = []
    for arm, node in arms.items():
        try:
            captioner = build(trusted_settings.captioner(node, image_dir), f"captions.{arm}")
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
            differences.append(
                Difference(
                    f"captions.{arm}: {len(others)} of {len(new)}",
                    f"{others[0]}: {logged[others[0]][arm]}",
                    texts[others[0]][arm],
                )
            )
    return texts, differences


def _model(then: Mapping[str, Any], run: Run) -> Iterator[Difference]:
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


def _start(origin: Mapping[str, Any], run: Run) -> Iterator[Difference]:
    then = provenance.sha256_of(origin.get(provenance.START))
    now = provenance.start_digest(run.network_weights, run.cache_dir)
    if then != now:
        pair = (f"sha256 {digest[:12]}…" if digest else "none" for digest in (then, now))
        yield Difference("trainer.network_weights", *pair)


def _versions(then: Mapping[str, str]) -> Iterator[Difference]:
    now = provenance.versions()
    for name in {**then, **now}:
        if then.get(name) != now.get(name) and name not in _NOT_COMPUTING:
            yield Difference(name, then.get(name, "none"), now.get(name, "none"))


def _code(then: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    """Of this code; of the folder a run was started in only if that is in git both times."""
    before = {one["what"]: one for one in then}
    now = {one["what"]: one for one in provenance.sources()}
    for what in sorted({*before, *now}):
        pair = _commit(before.get(what)), _commit(now.get(what))
        is_code, in_both = what == "lorasweep", what in before and what in now
        if (is_code or in_both) and pair[0] != pair[1]:
            yield Difference(f"code ({what})", *pair)


def _commit(checkout: Mapping[str, Any] | None) -> str:
    if checkout is None:
        return "no checkout: installed"
    diff = f" + uncommitted.diff {checkout['diff_sha256'][:12]}…" if checkout["dirty"] else ""
    return f"commit {str(checkout['commit'])[:12]}{diff}"


def _device(then: Mapping[str, Any], run: Run) -> Iterator[Difference]:
    now = provenance.device_of(resolve_device(run.trainer.device))
    for key in {**then, **now}:
        # as many threads as then are used wherever there are as many
        if key == "threads" and then.get(key) and then[key] <= (os.cpu_count() or 1):
            continue
        if then.get(key) != now.get(key):
            yield Difference(f"device: {key}", str(then.get(key)), str(now.get(key)))
