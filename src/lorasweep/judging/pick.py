"""Choose a checkpoint of a sweep: by rule or by a person, recorded and ready for use."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasweep import tracking
from lorasweep.core.text import harmless, markdown
from lorasweep.tracking import Candidate, Tracking, read_candidates, web_page

if TYPE_CHECKING:
    from rich.table import Table

DRIFT = "val/prior_drift"
TABLE_LIMIT = 15
BOOTSTRAP = 1000
CONTACT_SHEET = "contact_sheet.png"  # beside a run's files, where it draws pictures

README = """\
# {name}

Run `{run}`, epoch {epoch}, of sweep `{sweep}`; chosen by {chosen}.
{score}
A LoRA for the base model {base}. `config.yaml` is how it was trained.

Prompts that its samples were drawn with:

{prompts}

## diffusers

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained({base_python})
pipe.load_lora_weights(".", weight_name="{name}.safetensors")
image = pipe({prompt_python}, cross_attention_kwargs={{"scale": 1.0}}{skip_diffusers}).images[0]
image.save("image.png")
```

## AUTOMATIC1111, Forge

Copy `{name}.safetensors` into `models/Lora/` and prompt:

    {prompt_plain} <lora:{name}:1>
{skip_webui}
## kohya sd-scripts, kohya_ss

    python gen_img.py --ckpt {base_shell} --network_module networks.lora \\
        --network_weights {name}.safetensors --network_mul 1.0 \\
        --prompt {prompt_shell} --outdir images{skip_kohya}

## ComfyUI

Copy `{name}.safetensors` into `models/loras/`, and put the node *Load LoRA* (`LoraLoader`) between
*Load Checkpoint* and *CLIP Text Encode*: `lora_name` is `{name}.safetensors`, both strengths 1.0.
{skip_comfy}"""


class PickError(ValueError):
    """There is nothing to pick, or not what was asked for; the message lists what there is."""


@dataclass(frozen=True, kw_only=True)
class Pick:
    """What was chosen, among what, and where its copy lies."""

    winner: Candidate
    ranked: Sequence[Candidate]
    """Best first; without those in `left_out`."""
    left_out: Sequence[str]
    """One line for each candidate that has no usable score."""
    by: str
    chosen_by: Literal["rule", "person"]
    folder: Path
    version: str
    """Number of the registered version that the alias `best` points at."""
    uri: str


def pick(
    settings: Tracking,
    output_root: Path,
    *,
    by: str,
    sweep: str | None = None,
    run: str | None = None,
    epoch: int | None = None,
) -> Pick:
    """Choose a checkpoint of a sweep (the newest by default), record it and copy it out.

    `run` and `epoch` together are a person's own choice; one alone narrows what the rule sees.
    Raises PickError, or TrackingError when nothing is tracked.
    """
    uri = settings.resolve(output_root)
    found = _find(uri, settings.experiment, sweep)
    usable, left_out = _usable(found, by)
    ranked = rank(usable, by)
    by_person = run is not None and epoch is not None
    # newest first: a run that was trained again under its name is meant in its last form
    winner = _choose(found[::-1] if by_person else ranked, run, epoch, by)
    chosen_by: Literal["rule", "person"] = "person" if by_person else "rule"
    folder = _copy_out(uri, winner, output_root / "picked", by, chosen_by)
    upload = None if settings.upload == "none" else folder
    settings = replace(settings, registered_model=_registered_model(folder, settings))
    version = tracking.record_choice(uri, settings, winner, chosen_by=chosen_by, upload=upload)
    return Pick(
        winner=winner,
        ranked=ranked,
        left_out=left_out,
        by=by,
        chosen_by=chosen_by,
        folder=folder,
        version=version,
        uri=uri,
    )


def rank(candidates: Iterable[Candidate], by: str) -> list[Candidate]:
    """Candidates with the best first, by a score of which smaller is better.

    The scores are measured on few images, so the smallest is partly luck. As in the
    one-standard-error rule (Breiman et al., 1984), all that can't be told from the smallest one
    (`ties`) count as equal to it, and among them the most modest comes first: the lowest
    `val/prior_drift`, then the earlier epoch. The rest follow by their score.
    """
    by_score = sorted(candidates, key=lambda one: (one.scores[by], one.epoch))
    tied = [ties(one, by_score[0], by) for one in by_score]
    modest = sorted(
        (one for one, is_tied in zip(by_score, tied, strict=True) if is_tied),
        key=lambda one: (one.scores.get(DRIFT, math.inf), one.epoch),
    )
    return modest + [one for one, is_tied in zip(by_score, tied, strict=True) if not is_tied]


def ties(candidate: Candidate, smallest: Candidate, by: str) -> bool:
    """Does the 95 % interval of the candidate's distance to the smallest score hold zero?

    Both were scored on the same images and noise, so they are compared image by image: how much
    images differ among themselves, which makes each score's own interval wide, drops out. Where a
    score's terms are not known, the candidate must lie within the smallest one's own interval.
    """
    ours, best = candidate.terms.get(by), smallest.terms.get(by)
    if ours and best and len(ours) == len(best):
        return _lower_bound([a - b for a, b in zip(ours, best, strict=True)]) <= 0
    limit = smallest.scores.get(f"{by}_hi", smallest.scores[by])
    return candidate.scores[by] <= max(limit, smallest.scores[by])


def _lower_bound(terms: Sequence[float]) -> float:
    """2.5 % quantile of the terms' mean, by bootstrap."""
    draw = random.Random(0)
    means = sorted(sum(draw.choices(terms, k=len(terms))) / len(terms) for _ in range(BOOTSTRAP))
    return means[BOOTSTRAP // 40]


def table(result: Pick, limit: int = TABLE_LIMIT) -> Table:
    """The candidates, best first; `≈` marks those that tie with the smallest score."""
    from rich.table import Table

    score = result.by.rpartition("/")[2]
    shown = Table(title=_title(result), caption=_caption(result, limit), caption_justify="left")
    for header in ("rank", "run", "epoch", f"{score} [lo, hi]", "gap", "drift"):
        shown.add_column(header, justify="left" if header == "run" else "right", overflow="fold")
    for number, candidate in _rows(result, limit):
        is_winner = candidate.model_id == result.winner.model_id
        shown.add_row(*_cells(result, number, candidate), style="bold green" if is_winner else None)
    return shown


def summary(result: Pick) -> list[str]:
    """What was picked and where it is now, in lines for a person."""
    who = "your own choice" if result.chosen_by == "person" else f"picked by {result.by}"
    sheet = result.folder / CONTACT_SHEET
    return [
        f"{result.winner.name}, {who}: {result.folder / result.winner.name}.safetensors",
        f"How to use it: {result.folder / 'README.md'}",
        *([f"Its run's contact sheet: {sheet}"] if sheet.exists() else []),
        "Look at everything: lorasweep ui",
    ]


def _title(result: Pick) -> str:
    chosen = "own choice" if result.chosen_by == "person" else "picked"
    return f"{result.winner.sweep}: {chosen} {result.winner.name}"


def _caption(result: Pick, limit: int) -> str:
    lines = ["≈ can't be told from the smallest score; of these, the least drift wins."]
    if len(result.ranked) > limit:
        lines.append(f"{len(result.ranked) - limit} more are in MLflow (`lorasweep ui`).")
    return "\n".join([*lines, *result.left_out])


def _rows(result: Pick, limit: int) -> list[tuple[int, Candidate]]:
    """The first `limit` with their ranks, and the chosen one wherever it stands."""
    rows = list(enumerate(result.ranked, start=1))
    return [row for row in rows if row[0] <= limit or row[1].model_id == result.winner.model_id]


def _cells(result: Pick, number: int, candidate: Candidate) -> list[str]:
    by, scores = result.by, candidate.scores
    smallest = min(result.ranked, key=lambda one: one.scores[by])
    interval = f" [{_short(scores.get(f'{by}_lo'))}, {_short(scores.get(f'{by}_hi'))}]"
    return [
        f"≈ {number}" if ties(candidate, smallest, by) else str(number),
        _link(candidate.run, web_page.page(result.uri, candidate)),
        _link(str(candidate.epoch), candidate.path.as_uri()),
        _short(scores[by]) + _escaped(interval if f"{by}_hi" in scores else ""),
        _short(scores.get("val/gap")),
        _short(scores.get(DRIFT), "#.3g"),
    ]


def _find(uri: str, experiment: str, sweep: str | None) -> list[Candidate]:
    names = read_candidates.sweeps(uri, experiment)
    if not names:
        raise PickError(f"experiment {experiment} holds no runs yet: train first")
    if sweep is not None and sweep not in names:
        raise PickError(f"there is no sweep {sweep}; there are: {_listed(names)}")
    name = sweep or names[0]
    found = tracking.candidates(uri, experiment, name)
    if not found:
        raise PickError(f"sweep {name} holds no checkpoint yet; there are: {_listed(names)}")
    return found


def _usable(candidates: Sequence[Candidate], by: str) -> tuple[list[Candidate], list[str]]:
    """Candidates with a finite score, and a line for each of the others."""
    usable = [one for one in candidates if math.isfinite(one.scores.get(by, math.nan))]
    left_out = [
        f"{one.name} is left out: it has no finite {by}" for one in candidates if one not in usable
    ]
    return usable, left_out


def _choose(
    candidates: Sequence[Candidate], run: str | None, epoch: int | None, by: str
) -> Candidate:
    """The first candidate of that run and epoch (None: any)."""
    if not candidates:
        raise PickError(f"no checkpoint has a finite {by}: set pick.by, or give --run and --epoch")
    of_run = [one for one in candidates if run in (None, one.run)]
    if not of_run:
        runs = _listed(sorted({one.run for one in candidates}))
        sweep = candidates[0].sweep
        raise PickError(
            f"there is no run {run} in sweep {sweep}; there are: {runs}. Another sweep is named"
            " before --run"
        )
    fitting = [one for one in of_run if epoch in (None, one.epoch)]
    if not fitting:
        epochs = _listed([str(number) for number in sorted({one.epoch for one in of_run})])
        raise PickError(f"there is no checkpoint of epoch {epoch}; there are: {epochs}")
    return fitting[0]


def _copy_out(
    uri: str, winner: Candidate, root: Path, by: str, chosen_by: Literal["rule", "person"]
) -> Path:
    """Put the file, its config and how to use it into a folder of their own."""
    if not re.fullmatch(r"[\w-]+", winner.name):  # a shared store is written by others too
        raise PickError(f"{harmless(winner.name)!r} is no name of a checkpoint")
    folder = root / winner.name
    folder.mkdir(parents=True, exist_ok=True)
    tracking.fetch_file(uri, winner, folder / f"{winner.name}.safetensors")
    config = tracking.config_of(uri, winner)
    (folder / "config.yaml").write_text(config)
    sheet = winner.path.parent / CONTACT_SHEET
    if sheet.exists():
        shutil.copyfile(sheet, folder / CONTACT_SHEET)
    (folder / "README.md").write_text(_readme(winner, config, by, chosen_by))
    return folder


def _registered_model(folder: Path, settings: Tracking) -> str:
    """The name that the winner's own run was to be registered under."""
    import yaml  # type: ignore[import-untyped]

    config = yaml.safe_load((folder / "config.yaml").read_text())
    return str(_at(config, "tracking", "registered_model") or settings.registered_model)


def _readme(winner: Candidate, config_yaml: str, by: str, chosen_by: str) -> str:
    import yaml  # type: ignore[import-untyped]

    config = yaml.safe_load(config_yaml)
    prompts = [_bare(line) for line in _at(config, "sampling", "prompts") or []] or ["your prompt"]
    clip_skip = int(_at(config, "model", "clip_skip") or 1)
    base = _one_line(_at(config, "model", "path") or "the base model of config.yaml")
    return README.format(
        name=winner.name,
        run=winner.run,
        epoch=winner.epoch,
        sweep=winner.sweep,
        chosen="a person" if chosen_by == "person" else f"rule ({by}; of equals, the lowest drift)",
        score=f"{by} = {winner.scores[by]:.4f}.\n" if by in winner.scores else "",
        base=markdown(base),
        base_python=json.dumps(base, ensure_ascii=False),
        base_shell=shlex.quote(base),
        prompts="\n".join(f"- {markdown(prompt)}" for prompt in prompts),
        prompt_python=json.dumps(prompts[0], ensure_ascii=False),
        prompt_shell=shlex.quote(prompts[0]),
        prompt_plain=prompts[0],
        **_clip_skip_hints(clip_skip),
    )


def _clip_skip_hints(clip_skip: int) -> dict[str, str]:
    """How each program is told to leave out text-encoder layers; nothing when none is."""
    if clip_skip == 1:
        return dict.fromkeys(("skip_diffusers", "skip_webui", "skip_kohya", "skip_comfy"), "")
    return {
        "skip_diffusers": f", clip_skip={clip_skip - 1}",  # diffusers counts the layers left out
        "skip_webui": f"\nSet *Clip skip* to {clip_skip}.\n",
        "skip_kohya": f" --clip_skip {clip_skip}",
        "skip_comfy": f"Add *CLIP Set Last Layer* with -{clip_skip}.\n",
    }


def _bare(prompt_line: str) -> str:
    """A prompt without kohya's options: `text --n negative --s 20`."""
    return _one_line(re.split(r"\s--[a-z]+\s", prompt_line, maxsplit=1)[0])


def _one_line(text: object) -> str:
    """Without line ends and control characters, which would end a line of the README's code."""
    return " ".join(harmless(str(text)).split())


def _at(node: Any, *keys: str) -> Any:
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def _short(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)


def _link(text: str, address: str) -> str:
    return f"[link={address}]{_escaped(text)}[/link]"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
