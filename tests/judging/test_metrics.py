"""Scores: paired with the base on the same noise, for all checkpoints of a pack at once."""

import math
from collections import Counter

import pytest

from adapter_packs import trained
from lorasweep.data import kohya_folders, latents
from lorasweep.judging.metrics.held_out_loss import tuples
from lorasweep.judging.metrics.metric import Images
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
        assert set(named) == set(scored.scores)
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
