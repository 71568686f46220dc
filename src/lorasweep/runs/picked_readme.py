"""The README beside a picked checkpoint: how to use the LoRA in each program."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lorasweep.core.text import harmless, listed, markdown
from lorasweep.judging.pick_rule import Ranked
from lorasweep.tracking import Candidate

ChosenBy = Literal["rule", "person"]

README = """\
# {name}

Run `{run}`, epoch {epoch}, of sweep `{sweep}`; chosen by {chosen}.
{score}{notes}
A LoRA for the base model {base}.{merged} `config.yaml` is how it was trained.

Prompts that its samples were drawn with:

{prompts}

## diffusers

```python
from diffusers import AutoPipelineForText2Image

pipe = AutoPipelineForText2Image.from_pretrained({base_python})
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

With a base model of SDXL add `--sdxl`.

## ComfyUI

Copy `{name}.safetensors` into `models/loras/`, and put the node *Load LoRA* (`LoraLoader`) between
*Load Checkpoint* and *CLIP Text Encode*: `lora_name` is `{name}.safetensors`, both strengths 1.0.
{skip_comfy}"""


def readme(
    winner: Candidate,
    config: Mapping[str, Any],
    by: str,
    chosen_by: ChosenBy,
    ranked: Ranked[Candidate] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The text for a checkpoint of a run that was trained with this config.

    `ranked` is the checkpoint with those of other seeds, `notes` what else is said of it.
    """
    lines = value_at(config, "sampling", "prompts")
    prompts = [_bare(str(line)) for line in lines] if isinstance(lines, list) else []
    prompts = prompts or ["your prompt"]
    clip_skip = value_at(config, "model", "clip_skip")
    base = _one_line(value_at(config, "model", "path") or "the base model of config.yaml")
    return README.format(
        name=winner.name,
        run=_quotable(winner.run),
        epoch=winner.epoch,
        sweep=_quotable(winner.sweep),
        chosen="a person" if chosen_by == "person" else f"rule (the best {by})",
        score=_score(winner, by, ranked),
        notes="".join(f"{markdown(note)}\n" for note in notes),
        base=markdown(base),
        merged=merged_note(config),
        base_python=json.dumps(base, ensure_ascii=False),
        base_shell=shlex.quote(base),
        prompts="\n".join(f"- {markdown(prompt)}" for prompt in prompts),
        prompt_python=json.dumps(prompts[0], ensure_ascii=False),
        prompt_shell=shlex.quote(prompts[0]),
        prompt_plain=prompts[0],
        **_clip_skip_hints(clip_skip if isinstance(clip_skip, int) else 1),
    )


def merged_note(config: Mapping[str, Any]) -> str:
    """What was merged into the base, and so belongs beside the LoRA wherever it is used."""
    files = value_at(config, "model", "base_weights") or []
    files = [files] if isinstance(files, str) else files
    if not (isinstance(files, list) and files):
        return ""
    weights = value_at(config, "model", "base_weights_multiplier")
    weights = weights if isinstance(weights, list) else []
    numbers = [*weights, *[1.0] * (len(files) - len(weights))]
    named = [f"{one} times {number}" for one, number in zip(files, numbers, strict=False)]
    return (
        f" It was trained with other LoRAs merged into the base, and needs them beside it:"
        f" {markdown(_one_line(', '.join(named)))}."
    )


def _score(winner: Candidate, by: str, ranked: Ranked[Candidate] | None) -> str:
    if by not in winner.scores:
        return ""
    own = f"{by} = {winner.scores[by]:.4f}.\n"
    if ranked is None or len(ranked.checkpoints) == 1:
        return own
    mean, low, high = (ranked.scores[f"{by}{part}"] for part in ("", "_lo", "_hi"))
    return (
        f"{own}This is seed {winner.seed} of {seeds_of(ranked)}, over which {by} is {mean:.4f} on"
        f" average [{low:.4f}, {high:.4f}].\n"
    )


def seeds_of(ranked: Ranked[Candidate]) -> str:
    """The seeds that a setting was trained with: 0, 1, 2."""
    seeds = {one.seed for one in ranked.checkpoints if one.seed is not None}
    return listed(sorted(seeds, key=int))


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


def _quotable(name: str) -> str:
    """A name between Markdown's backticks."""
    return _one_line(name).replace("`", "'")


def value_at(node: Any, *keys: str) -> Any:
    """What YAML holds at a path of keys; None where there is nothing."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node
