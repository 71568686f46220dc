"""Prompts as CLIP's text encoders read them: cut and padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTokenizer


def tokenize(tokenizer: CLIPTokenizer, text_encoder: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids (N, L) on the text encoder's device, padded and cut to its length."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=max_length(tokenizer, text_encoder),
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = tokens.input_ids.to(text_encoder.device)
    return ids


def too_long(tokenizer: CLIPTokenizer, text_encoder: Any, prompts: Sequence[str]) -> list[str]:
    """The prompts that are cut."""
    tokens = tokenizer(list(prompts), verbose=False).input_ids if prompts else []
    length = max_length(tokenizer, text_encoder)
    return [one for one, ids in zip(prompts, tokens, strict=True) if len(ids) > length]


def max_length(tokenizer: CLIPTokenizer, text_encoder: Any) -> int:
    """Tokens of a prompt; a tokenizer without a limit of its own takes the text encoder's."""
    positions = int(text_encoder.config.max_position_embeddings)
    return min(positions, int(tokenizer.model_max_length))
