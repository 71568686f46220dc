"""Prompts as CLIP's text encoders read them: cut and padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTokenizer


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str], length: int) -> Tensor:
    """Token ids (N, length), padded and cut."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = tokens.input_ids
    return ids


def are_cut(tokenizer: CLIPTokenizer, prompts: Sequence[str], length: int) -> list[bool]:
    """Which of the prompts have more tokens than `length`, with the two that frame them."""
    tokens = tokenizer(list(prompts), verbose=False).input_ids if prompts else []
    return [len(ids) > length for ids in tokens]


def max_length(tokenizer: CLIPTokenizer, text_encoder: Any) -> int:
    """Tokens that fit; a tokenizer without a limit of its own takes the text encoder's."""
    positions = int(text_encoder.config.max_position_embeddings)
    return min(positions, int(tokenizer.model_max_length))
