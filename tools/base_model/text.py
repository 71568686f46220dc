"""The text side: a CLIP tokenizer cut for our own captions, and a narrow CLIPTextModel."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tools.base_model import captions, icons
from tools.base_model.presets import Preset
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(preset: Preset, work: Path) -> CLIPTokenizer:
    """Train byte-level BPE in CLIP's format on the captions, labels and tags of all icons."""
    rendered = icons.load(work / f"icons{preset.pixels}", "noto", preset.pixels)
    merges = train_merges(captions.corpus(rendered.labels, rendered.tags), preset.vocabulary)
    return tokenizer_of(merges, preset.tokens)


def train_merges(lines: Sequence[str], vocabulary: int) -> list[tuple[str, str]]:
    """The merges that, with CLIP's 512 bytes and 2 marks, fill `vocabulary` at most."""
    clip = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        end_of_word_suffix="</w>",
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges][: vocabulary - 514]


def tokenizer_of(merges: Sequence[tuple[str, str]], length: int) -> CLIPTokenizer:
    """A CLIPTokenizer whose ids are in CLIP's order: bytes, final bytes, merges, marks."""
    alphabet = byte_alphabet()
    words = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(m) for m in merges), BOS, EOS]
    vocab = {word: i for i, word in enumerate(words)}
    assert len(vocab) == len(words)
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=length)


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write it for transformers 5 (tokenizer.json) and 4 (vocab.json, merges.txt)."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = "\n".join(f"{left} {right}" for left, right in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


def build(preset: Preset, tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    """A new text encoder for a tokenizer."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.text_width,
        intermediate_size=3 * preset.text_width,
        num_hidden_layers=preset.text_layers,
        num_attention_heads=4,
        max_position_embeddings=77,  # as Stable Diffusion's, whatever the tokenizer's length
        projection_dim=preset.text_width,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """(B, tokens) ids, padded and cut as the pipeline does it."""
    ids = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
    return torch.as_tensor(ids.input_ids)


def save_encoder(encoder: CLIPTextModel, folder: Path) -> None:
    """Write it in fp16 with the `text_model.` keys that transformers 4 and 5 both load."""
    encoder.config.architectures = ["CLIPTextModel"]
    encoder.config.dtype = "float32"  # else transformers 5 loads half beside a float32 UNet
    encoder.config.save_pretrained(folder)
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": value.half().contiguous().cpu()
        for name, value in encoder.state_dict().items()
        if not name.endswith("position_ids")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
