"""Long and weighted prompts are read as kohya's own code reads them.

recorded/kohya_prompts.json holds what sd-scripts (commit 48d368f, February 2026) made of them with
the embedded model, whose chunks are of 32 tokens. Its weights of several chunks were recorded with
the 75 in its code set to the 30 of this model.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import FEW
from lorasweep.core.settings import SettingsError
from lorasweep.lora_files import checkpoint
from lorasweep.models.prompt_tokens import in_chunks, joined, weighted_parts
from lorasweep.training.training_captions import warn_of_cut_captions
from small_training import load, train

KOHYA = json.loads((Path(__file__).parents[1] / "recorded" / "kohya_prompts.json").read_text())
LONG = KOHYA["texts"][-1]["text"]
"""Of some 80 tokens, with weights."""


def reading(base, **settings):
    return replace(base, settings=replace(base.settings, **settings))


@pytest.mark.parametrize("case", KOHYA["texts"], ids=lambda case: case["text"][:20] or "empty")
def test_prompts_are_encoded_as_kohya_does(case, base):
    parts = [(text, pytest.approx(weight)) for text, weight in case["parts"]]
    assert weighted_parts(case["text"]) == parts
    for one in case["encoded"]:
        length = 75 * one["chunks"]
        read = reading(base, max_token_length=length, weighted_captions=one["weighted"])
        with torch.no_grad():
            (embeds,) = read.encode_prompt([case["text"]]).embeds
        assert len(embeds) == read.max_tokens + 2 == 30 * one["chunks"] + 2
        values = embeds[:: max(1, len(embeds) // 9), 7].tolist()
        assert values == pytest.approx(one["values"], abs=2e-3)


def test_numbers_that_are_none_are_text():
    assert weighted_parts("(a:1.2.3)") == [("a:1.2.3)", pytest.approx(1.1))]
    assert weighted_parts("a:1.3)") == [("a:1.3)", 1.0)]


def test_chunks_come_back_in_their_order():
    ids = torch.arange(2 * 152).view(2, 152)
    chunks = in_chunks(ids, 77)
    assert chunks.shape == (4, 77) and chunks[1, 0] == 0 and chunks[1, -1] == ids[0, -1]
    assert torch.equal(joined(chunks[..., None], 2)[..., 0], ids)
    assert in_chunks(ids[:, :77], 77).shape == (2, 77)


def test_training_reads_the_whole_of_a_long_caption(make_run, base, caplog):
    run = make_run(FEW, "model.max_token_length=225", "trainer.max_train_epochs=1", "name=long")
    long = reading(base, max_token_length=225)
    data = load(run, long)
    items = [replace(item, caption=LONG) for item in data.items[:3]]
    whole = replace(data, items=items)
    cut = replace(data, items=[replace(item, caption=LONG[: len(LONG) // 2]) for item in items])
    losses, last, _ = train(long, whole, run)
    assert losses[run.name] != train(long, cut, run)[0][run.name]
    assert checkpoint.read_metadata(last[run.name].path)["ss_max_token_length"] == "225"
    with caplog.at_level(logging.WARNING):
        warn_of_cut_captions(long, items)
        assert "longer than" not in caplog.text
        warn_of_cut_captions(reading(base, max_token_length=150), items)
    assert "longer than the 60 tokens" in caplog.text
    again = train(base, whole, make_run(FEW, "trainer.max_train_epochs=1", "name=short"))
    assert again[0]["short"] != losses[run.name]


def test_other_lengths_are_refused(make_run):
    with pytest.raises(SettingsError, match=r"model\.max_token_length=100"):
        make_run("model.max_token_length=100")
