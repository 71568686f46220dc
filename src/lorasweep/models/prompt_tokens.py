"""Token ids of prompts: longer than one pass of the text encoder, and with weights, as kohya's.

A long prompt is encoded in chunks, each framed by its own begin and end, and the chunks' insides
are joined. Weights are written as in A1111: (word), [word], (word:1.3). What sd-scripts does was
read from library/strategy_base.py and library/strategy_sd.py of February 2026.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTokenizer

_STEP = 1.1
"""What a pair of round brackets without a number multiplies by; square ones divide."""
_MARKS = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\]?)    # the bracket itself
    | (?P<open>[(\[])
    | :(?P<number>[+-]?[.\d]+)\)  # ends a pair of round brackets
    | (?P<close>[)\]])
    | [^\\()\[\]:]+ | :
    """,
    re.VERBOSE,
)


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """A prompt's text in parts, each with its weight; brackets that aren't closed count too."""
    texts: list[str] = []
    weights: list[float] = []
    begun: dict[str, list[int]] = {"(": [], "[": []}

    def end(bracket: str, factor: float) -> None:
        first = begun[bracket].pop()
        weights[first:] = [weight * factor for weight in weights[first:]]

    for mark in _MARKS.finditer(prompt):
        number = _number(mark["number"])
        if mark["open"]:
            begun[mark["open"]].append(len(texts))
        elif number is not None and begun["("]:
            end("(", number)
        elif mark["close"] == ")" and begun["("]:
            end("(", _STEP)
        elif mark["close"] == "]" and begun["["]:
            end("[", 1 / _STEP)
        else:
            texts.append(mark[0] if mark["escaped"] is None else mark["escaped"])
            weights.append(1.0)
    for bracket, factor in (("(", _STEP), ("[", 1 / _STEP)):
        while begun[bracket]:
            end(bracket, factor)
    parts: list[tuple[str, float]] = []
    for text, weight in zip(texts, weights, strict=True):
        if parts and parts[-1][1] == weight:
            parts[-1] = (parts[-1][0] + text, weight)
        else:
            parts.append((text, weight))
    return parts or [("", 1.0)]


def weighted_ids(
    tokenizer: CLIPTokenizer, prompts: Sequence[str], length: int
) -> tuple[Tensor, Tensor]:
    """Token ids and their weights, both (N, length), framed, padded and cut; frames weigh 1."""
    import torch

    ids, weights = [], []
    for prompt in prompts:
        pairs = [
            (token, weight)
            for text, weight in weighted_parts(prompt)
            for token in tokenizer(text, verbose=False).input_ids[1:-1]
        ][: length - 2]
        padding = length - 2 - len(pairs)
        begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        ids.append([begin, *(token for token, _ in pairs), end, *[pad] * padding])
        weights.append([1.0, *(weight for _, weight in pairs), *[1.0] * (padding + 1)])
    return torch.tensor(ids), torch.tensor(weights)


def in_chunks(ids: Tensor, length: int) -> Tensor:
    """Ids (N, 2 + n * (length - 2)) as chunks (N * n, length), a prompt's one after the other."""
    import torch

    if ids.shape[1] == length:
        return ids
    inside = ids[:, 1:-1].unflatten(1, (-1, length - 2))
    begin, end = (ids[:, place, None, None].expand(-1, inside.shape[1], 1) for place in (0, -1))
    return torch.cat([begin, inside, end], dim=2).flatten(0, 1)


def joined(hidden: Tensor, num_prompts: int) -> Tensor:
    """Chunks (N * n, L, D) as prompts (N, 2 + n * (L - 2), D): first begin, insides, last end."""
    import torch

    if len(hidden) == num_prompts:
        return hidden
    chunks = hidden.unflatten(0, (num_prompts, -1))
    inside = chunks[:, :, 1:-1].flatten(1, 2)
    return torch.cat([chunks[:, 0, :1], inside, chunks[:, -1, -1:]], dim=1)


def _number(said: str | None) -> float | None:
    try:
        return None if said is None else float(said)
    except ValueError:  # such as 1.2.3
        return None
