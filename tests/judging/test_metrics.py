"""Scores: paired with the base on the same noise, for all checkpoints of a pack at once."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from adapter_packs import trained
from conftest import FAMILIES
from lorasweep.core import rng
from lorasweep.data import kohya_folders, latents
from lorasweep.judging.metrics.caption_gain import swaps
from lorasweep.judging.metrics.held_out_loss import tuples
from lorasweep.judging.metrics.metric import Images
from lorasweep.judging.metrics.tuple_losses import LossTuple
from lorasweep.runs.prepare import write_folders


@pytest.fixture
def run(make_run):
    return make_run()


@pytest.fixture
def images(run, base):
    root = write_folders(run)
    train, holdout = (
        latents.encode(base, kohya_folders.read(root / split), run.dataset, run.cache_dir)
        for split in ("train", "holdout")
    )
    return Images(train=train, holdout=holdout)


@pytest.fixture
def pack(base, make_run):
    small, large = make_run("adapter.rank=2").adapter, make_run("adapter.rank=6").adapter
    return trained(base, (small, 0), (large, 1))


@FAMILIES
@pytest.mark.parametrize("name", ["validation", "prior_drift"])
def test_scores_in_a_pack_are_those_alone(name, base, run, images, pack):
    scorer = run.metrics[name].prepare(base, images)
    together = scorer.score(pack)
    for index in range(2):
        (alone,) = scorer.score(pack.select([index]))
        assert together[index].scores == pytest.approx(alone.scores, rel=1e-4, abs=1e-5)
    assert together[0].scores != pytest.approx(together[1].scores, rel=1e-3)


@pytest.mark.parametrize("name", ["validation", "prior_drift"])
def test_a_metric_names_the_scores_that_it_gives_and_those_with_terms(
    name, base, run, images, pack
):
    named = run.metrics[name].names(run.captions, run.dataset.num_holdout)
    for scored in run.metrics[name].prepare(base, images).score(pack):
        # of an arm, whether captions differ is only known once they are read
        assert set(named) - set(scored.scores) <= {"val/caption_gain_empty"}
        assert set(scored.scores) <= set(named)
        assert {one for one, has_terms in named.items() if has_terms} == set(scored.terms)


def test_an_adapter_that_changes_nothing_scores_like_the_base(base, run, images, make_run):
    from lorasweep.adapters.pack import Pack

    both = frozenset({"text_encoder", "unet"})
    untrained = Pack.new(base.parts, [(make_run("adapter.rank=2").adapter, 0, both)])
    (scored,) = run.metrics["validation"].prepare(base, images).score(untrained)
    assert scored.scores["val/loss_rel"] == pytest.approx(1, abs=1e-6)
    assert scored.scores["val/loss_rel_lo"] == pytest.approx(1, abs=1e-6)
    assert scored.scores["val/gap"] == pytest.approx(0, abs=1e-6)
    (drift,) = run.metrics["prior_drift"].prepare(base, images).score(untrained)
    assert drift.scores["val/prior_drift"] == pytest.approx(0, abs=1e-9)


def test_every_arm_has_a_score_and_the_interval_holds_the_value(base, run, images, pack):
    for scored in run.metrics["validation"].prepare(base, images).score(pack):
        scores = scored.scores
        terms = scored.terms["val/loss_rel"]
        assert len(terms) == 2  # one a held-out image
        assert sum(terms) / 2 == pytest.approx(scores["val/loss_rel"])
        assert {f"val/loss_rel_{arm}" for arm in ("empty", "wd", "kosmos")} <= set(scores)
        assert scores["val/loss_rel_lo"] <= scores["val/loss_rel"] <= scores["val/loss_rel_hi"]
        assert all(math.isfinite(value) for value in scores.values())


def test_without_held_out_images_validation_is_left_out_and_said(base, run, images, caplog):
    none = Images(train=images.train, holdout=[])
    assert run.metrics["validation"].prepare(base, none) is None
    assert run.metrics["validation"].names(run.captions, 0) == {}
    assert "no held-out images" in caplog.text


def test_few_held_out_images_are_said(base, run, images, caplog):
    run.metrics["validation"].prepare(base, images)
    assert "held-out images: only 2, so" in caplog.text
    assert "dataset.num_holdout=8 or more" in caplog.text


def test_the_gain_is_what_swapped_captions_add_to_the_loss(base, make_run, images, pack):
    """By hand, tuple by tuple: of two images each gets the other's caption."""
    import torch

    from lorasweep.adapters.pack import computing_with
    from lorasweep.models.diffusion_loss import squared_errors

    settings = make_run("metrics.validation.max_tuples=null").metrics["validation"]
    first = pack.select([0])
    (scored,) = settings.prepare(base, images).score(first)
    of = {arm: [i for i in images.holdout if i.arm == arm] for arm in ("wd", "kosmos")}
    own, swapped = [], []
    for items in of.values():
        for t in tuples(settings, items, 1000, "holdout"):
            if t.timestep < 500:
                continue
            draw = rng.generator(settings.seed, "validation", t.image, t.timestep, t.noise)
            noise = torch.randn(t.item.latents.shape, generator=draw)
            for losses, caption in ((own, t.image), (swapped, 1 - t.image)):
                with torch.no_grad(), computing_with(first):
                    embeds = base.encode_prompt([items[caption].caption])
                    latents, timestep = t.item.latents[None], torch.tensor([t.timestep])
                    losses.append(squared_errors(base, latents, noise[None], timestep, embeds))
    gain = float(sum(swapped) / sum(own)) - 1
    assert scored.scores["val/caption_gain"] == pytest.approx(gain, rel=1e-4)
    assert abs(gain) > 1e-3
    terms = scored.terms["val/caption_gain"]
    assert sum(terms) / len(terms) == pytest.approx(gain, rel=1e-4)


def test_the_gain_has_an_interval_arms_whose_captions_differ_and_a_value_of_the_base(
    base, run, images, pack
):
    scorer = run.metrics["validation"].prepare(base, images)
    for scores in (scorer.baseline(), scorer.score(pack)[1].scores):
        of_gain = {key.removeprefix("val/caption_gain") for key in scores if "gain" in key}
        assert of_gain == {"", "_lo", "_hi", "_wd", "_kosmos"}
        gain = scores["val/caption_gain"]
        assert scores["val/caption_gain_lo"] <= gain <= scores["val/caption_gain_hi"]


def test_where_captions_tell_nothing_there_is_no_gain_and_it_is_said_once(
    base, run, images, pack, caplog
):
    alike = [replace(item, caption="sks") for item in images.holdout]
    scorer = run.metrics["validation"].prepare(base, Images(train=images.train, holdout=alike))
    for scored in scorer.score(pack):
        assert not any("gain" in key for key in [*scored.scores, *scored.terms])
    assert "gain" not in str(scorer.baseline())
    assert caplog.text.count("val/caption_gain") == 1
    assert not any("gain" in name for name in run.metrics["validation"].names(["wd"], 1))


def test_without_swaps_the_held_out_loss_is_the_same_to_the_last_bit(base, run, images, pack):
    settings = run.metrics["validation"]
    (with_gain, _) = settings.prepare(base, images).score(pack)
    (without, _) = replace(settings, num_swaps=0).prepare(base, images).score(pack)
    of_gain = ("gain", "score")
    losses = {n: value for n, value in with_gain.scores.items() if not any(o in n for o in of_gain)}
    assert {n: value for n, value in without.scores.items() if "score" not in n} == losses
    assert without.terms["val/loss_rel"] == with_gain.terms["val/loss_rel"]


def test_the_score_is_the_loss_less_the_gain_image_by_image(base, run, images, pack):
    settings = run.metrics["validation"]
    for scored in settings.prepare(base, images).score(pack):
        scores, terms = scored.scores, scored.terms
        expected = scores["val/loss_rel"] - scores["val/caption_gain"]
        assert scores["val/score"] == pytest.approx(expected)
        assert scores["val/score_lo"] < scores["val/score"] < scores["val/score_hi"]
        assert sum(terms["val/score"]) / 2 == pytest.approx(expected)
        parts = zip(terms["val/loss_rel"], terms["val/caption_gain"], strict=True)
        assert terms["val/score"] == pytest.approx([loss - gain for loss, gain in parts])


def test_without_a_gain_the_score_is_the_loss_alone(base, run, images, pack):
    settings = replace(run.metrics["validation"], num_swaps=0)
    for scored in settings.prepare(base, images).score(pack):
        assert not any("gain" in name for name in scored.scores)
        for end in ("", "_lo", "_hi"):
            ours, loss = (scored.scores[f"val/{name}{end}"] for name in ("score", "loss_rel"))
            assert ours == loss
        assert scored.terms["val/score"] == scored.terms["val/loss_rel"]


def test_each_image_gets_others_captions_and_none_that_equals_its_own(images):
    captions = ["a cat", "a dog", "a dog", "a fox", "a hen"]
    like = images.holdout[0]
    chosen = [LossTuple(replace(like, caption=c), n, 900, 0) for n, c in enumerate(captions)]
    found = swaps(chosen, 2, seed=0)
    assert list(found.own) == chosen
    assert Counter(found.of) == dict.fromkeys(range(5), 2)
    for t in found.swapped:
        assert t.item.caption != captions[t.image]
    different = [t for t in chosen if t.image != 2]  # all captions differ: each is used as often
    used = Counter(t.item.caption for t in swaps(different, 3, seed=1).swapped)
    assert used == dict.fromkeys(("a cat", "a dog", "a fox", "a hen"), 3)
    assert swaps([replace(t, item=like) for t in chosen], 2, seed=0).own == []


def test_all_tuples_cross_images_arms_timesteps_and_noises(make_run, images):
    settings = make_run("metrics.validation.max_tuples=null").metrics["validation"]
    chosen = tuples(settings, images.holdout, 1000, "holdout")
    # 2 images, 3 arms, 2 timesteps, 4 noises
    assert len({(t.image, t.item.arm, t.timestep, t.noise) for t in chosen}) == 2 * 3 * 2 * 4
    assert {t.timestep for t in chosen} == {250, 750}  # the middles of two halves


def test_a_choice_of_tuples_is_even_and_the_same_for_every_arm(make_run, images):
    settings = make_run(
        "metrics.validation.max_tuples=24", "metrics.validation.num_timesteps=4"
    ).metrics["validation"]
    items = images.train  # 4 images
    chosen = tuples(settings, items, 1000, "train")
    by_arm = {}
    for t in chosen:
        by_arm.setdefault(t.item.arm, []).append((t.image, t.timestep, t.noise))
    assert len(chosen) == 24
    assert len({tuple(cells) for cells in by_arm.values()}) == 1
    cells = by_arm["wd"]
    assert len(set(cells)) == len(cells)
    for place in (0, 1):
        counts = Counter(cell[place] for cell in cells)
        assert len(counts) == 4
        assert max(counts.values()) - min(counts.values()) <= 1
