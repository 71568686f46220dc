"""Captions as they are read at a step, by the answers of sd-scripts' own process_caption."""

import json
from pathlib import Path
from random import Random

import pytest

from lorasweep.core.settings import SettingsError
from lorasweep.data.caption_variants import settled_caption, varied_caption
from lorasweep.data.subset_settings import SubsetSettings

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "kohya_captions.json").read_text())
OFF = {
    "flip_aug": False,
    "shuffle_caption": False,
    "keep_tokens": 0,
    "caption_dropout_rate": 0.0,
    "caption_dropout_every_n_epochs": 0,
    "caption_tag_dropout_rate": 0.0,
}


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda one: f"{one['settings']}"[:60])
def test_captions_are_what_sd_scripts_makes_of_them_with_the_same_chance(case):
    settings = SubsetSettings(**{**OFF, **case["settings"]})
    for seed, step, expected in case["answers"]:
        draw = Random(seed)
        found = varied_caption(case["caption"], settings, draw, step=step, max_train_steps=20)
        assert found == expected
        if not settings.captions_vary:
            assert settled_caption(case["caption"], settings) == expected


@pytest.mark.parametrize(
    ("caption", "own", "scored"),
    [
        ("a, b,c", {"shuffle_caption": True}, "a, b,c"),
        ("a ||| b, c ||| d", {"shuffle_caption": True}, "a, b, c, d"),
        ("a ||| b, c", {}, "a ||| b, c"),  # as sd-scripts leaves it where nothing is moved
        ("a;;b, {c|d} {{e}}\nf", {"enable_wildcard": True}, "p a,b, c {e}"),
    ],
)
def test_scores_are_of_captions_without_chance(caption, own, scored):
    also = {"keep_tokens_separator": "|||", "secondary_separator": ";;"}
    prefix = "p" if "p " in scored else None
    settings = SubsetSettings(**{**OFF, **also, **own, "caption_prefix": prefix})
    assert settled_caption(caption, settings) == scored


def test_separators_that_no_caption_is_taken_apart_by_are_refused(make_run):
    with pytest.raises(SettingsError, match=r"keep_tokens_separator=.* has no effect"):
        make_run("dataset.keep_tokens_separator='|||'")
    make_run("dataset.keep_tokens_separator='|||'", "dataset.token_warmup_step=0.5")
