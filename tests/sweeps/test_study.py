"""The study: what it asks, notes, prunes, tries again and goes on with; nothing is trained."""

import logging
import math
import pickle
import statistics
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import get_args

import optuna
import pytest
from optuna.trial import TrialState

from lorasweep.core.failures import FailureKind
from lorasweep.core.settings import SettingsError
from lorasweep.sweeps.study import study as study_module
from lorasweep.sweeps.study.continue_trial import continue_trial
from lorasweep.sweeps.study.samplers import point_key
from lorasweep.sweeps.study.search_space import Choice, Condition, Number, Space
from lorasweep.sweeps.study.study import Study, join_study
from lorasweep.sweeps.study.study_settings import PrunerName, SamplerName
from lorasweep.sweeps.study.study_storage import find_journal, only_driver, open_storage
from lorasweep.sweeps.study.study_summary import lines, summarise
from lorasweep.sweeps.study.trial_attributes import was_pruned
from lorasweep.sweeps.study.warm_start import has_learned, known_trials, learn, learns_from
from small_study import RANK, SCORE, SETTINGS, SPACE

ADAPTER = Choice("adapter", ("lora", "locon"), ("lora", "locon"))
CONDITIONAL = Space(
    {"adapter": ADAPTER, "adapter.conv_rank": Number("adapter.conv_rank", 1, 8, step=1)},
    {"adapter.conv_rank": Condition("adapter", ("locon",))},
)


@pytest.fixture
def open_study(tmp_path):
    """Open a study of the same folder, again and again."""

    def opened(space=SPACE, guesses=(), basis=None, **changes):
        settings = replace(SETTINGS, **changes)
        folder = tmp_path / "outputs" / "demo" / settings.name
        return Study(
            settings,
            space,
            f"demo-{settings.name}",
            folder,
            max_epochs=9,
            guesses=guesses,
            basis=basis,
        )

    return opened


def report(trial, epoch, value, terms=(), **scores):
    trial.plan(9)
    trial.report(epoch, Path(f"e{epoch}"), {SCORE: value, **scores}, {SCORE: terms})
    return trial.should_prune()


def run(study, score=lambda trial, epoch: trial.number + epoch, epochs=3):
    """Run all trials of a study one after another; the numbers that were pruned."""
    pruned = []
    while trial := study.next():
        if any(report(trial, epoch, score(trial, epoch)) for epoch in range(1, epochs + 1)):
            study.prune(trial)
            pruned.append(trial.number)
        else:
            study.complete(trial)
    return pruned


def test_the_value_of_a_trial_is_its_best_candidate_not_its_last(open_study):
    study = open_study()
    trial = study.next()
    for epoch, value in enumerate([0.9, 0.5, 0.7], start=1):
        report(trial, epoch, value)
    study.complete(trial)
    assert study.trials[0].value == 0.5
    assert trial.best.epoch == 2
    assert study.trials[0].intermediate_values == {1: 0.9, 2: 0.5, 3: 0.5}


def test_larger_can_be_better(open_study):
    study = open_study(maximize=[SCORE])
    trial = study.next()
    for epoch, value in enumerate([0.1, 0.5, 0.3], start=1):
        report(trial, epoch, value)
    assert trial.best.epoch == 2


@pytest.mark.parametrize("sampler", [s for s in get_args(SamplerName) if s != "grid"])
def test_every_sampler_fills_the_study(open_study, sampler):
    study = open_study(sampler=sampler, n_trials=4)
    run(study, epochs=1)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    assert all(SPACE.holds(trial.params) for trial in study.trials)


@pytest.mark.parametrize("sampler", [s for s in get_args(SamplerName) if s != "grid"])
def test_no_sampler_warns_of_parameters_that_it_samples_one_by_one(
    open_study, sampler, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("optuna"), "propagate", True)
    run(open_study(CONDITIONAL, sampler=sampler, n_trials=6), epochs=1)
    assert "independently" not in caplog.text


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_cmaes_goes_on_from_its_own_state_and_loads_no_other_pickle(open_study, tmp_path):
    space = Space({name: Number(name, 0.0, 10.0) for name in ("a", "b")}, {})
    run(open_study(space, sampler="cmaes", n_trials=14), epochs=1)
    study = open_study(space, sampler="cmaes", n_trials=20)
    kept = [one for one in study.trials if "cma:optimizer:0" in one.system_attrs]
    assert kept  # Optuna still keeps its state so
    trial = study.next()
    storage = study.optuna_study._storage  # a journal, which a stranger may have written
    (found,) = [one for one in study.trials if one.number == trial.number]
    planted = pickle.dumps(Touch(tmp_path / "RAN")).hex()
    for part in range(max(1, sum("cma:optimizer" in key for key in found.system_attrs))):
        text = "" if part else planted
        storage.set_trial_system_attr(found._trial_id, f"cma:optimizer:{part}", text)
    report(trial, 1, 0.5)
    study.complete(trial)
    with pytest.raises(SettingsError, match="no state of the sampler's"):
        open_study(space, sampler="cmaes", n_trials=30).next()
    assert not (tmp_path / "RAN").exists()


def test_cmaes_learns_from_what_is_pruned(open_study):
    space = Space({name: Number(name, 0.0, 10.0) for name in ("a", "b")}, {})
    study = open_study(space, sampler="cmaes", pruner="median", n_trials=50)
    off = []
    while trial := study.next():
        off.append((trial.params["a"] - 2) ** 2 + (trial.params["b"] - 7) ** 2)
        report(trial, 1, off[-1])
        (study.prune if trial.number else study.complete)(trial)
    assert 3 * statistics.mean(off[-15:]) < statistics.mean(off[:15])


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsgaii", "random"])
def test_no_sampler_warns_where_there_are_several_objectives(open_study, sampler, recwarn):
    study = open_study(CONDITIONAL, sampler=sampler, objectives=[SCORE, "val/prior_drift"])
    while trial := study.next():
        report(trial, 1, trial.number, **{"val/prior_drift": 1.0})
        study.complete(trial)
    assert [str(one.message) for one in recwarn] == []


@pytest.mark.parametrize("pruner", get_args(PrunerName))
@pytest.mark.parametrize("objectives", [[SCORE], [SCORE, "val/prior_drift"]])
def test_every_pruner_runs_with_one_and_with_two_objectives(open_study, pruner, objectives):
    study = open_study(pruner=pruner, objectives=objectives)
    while trial := study.next():
        for epoch in range(1, 9):
            drift = {"val/prior_drift": 1 / epoch}
            terms = [trial.number + i / 100 + 1 / epoch for i in range(8)]
            if report(trial, epoch, trial.number + 1 / epoch, terms, **drift):
                study.prune(trial)
                break
        else:
            study.complete(trial)
    assert {row.state for row in summarise(study).rows} <= {"complete", "pruned"}
    assert not was_pruned(study.trials[0])
    if pruner not in ("none", "hyperband", "patient"):  # each trial is worse than the one before
        assert was_pruned(study.trials[5])


def test_a_trial_whose_job_was_pruned_is_shown_so_before_it_is_settled(open_study):
    study = open_study()
    trial = study.next()
    report(trial, 1, 0.5)
    trial.mark_pruned()
    assert [row.state for row in summarise(study).rows] == ["pruned"]


def test_a_pruned_trial_keeps_its_best_value_and_counts(open_study):
    study = open_study(pruner="median")
    assert run(study) == [2, 3, 4, 5]
    assert study.trials[5].state == TrialState.PRUNED
    assert study.trials[5].value == 5 + 1


def test_no_run_is_pruned_before_min_epochs(open_study):
    study = open_study(pruner="median", min_epochs=3)
    run(study, epochs=4)
    assert [len(trial.intermediate_values) for trial in study.trials] == [4, 4, 3, 3, 3, 3]


def test_halving_keeps_the_best_of_a_pack_and_not_the_first(open_study):
    study = open_study(pruner="asha", pruner_options={"reduction_factor": 3}, min_epochs=2)
    trials = [study.next() for _ in range(6)]
    for value, trial in enumerate(reversed(trials)):
        trial.plan(9)
        trial.report(2, Path("e"), {SCORE: value}, {})
    assert [trial.should_prune() for trial in trials] == [True] * 4 + [False] * 2


def test_wilcoxon_prunes_what_is_worse_on_every_image_but_not_what_is_noise(open_study):
    study = open_study(pruner="wilcoxon")
    first, worse, even = study.next(), study.next(), study.next()
    terms = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    report(first, 1, 4.5, terms)
    study.complete(first)
    assert report(worse, 1, 4.6, [t + 0.1 + t / 100 for t in terms])
    assert not report(even, 1, 4.6, [t + (0.2 if i % 2 else -0.1) for i, t in enumerate(terms)])


def test_wilcoxon_says_once_that_so_few_images_never_prune(open_study, caplog):
    study = open_study(pruner="wilcoxon")
    for trial in (study.next(), study.next(), study.next()):
        assert not report(trial, 1, trial.number, [trial.number + i for i in range(4)])
        study.complete(trial)
    warned = [one.getMessage() for one in caplog.records if "never prunes" in one.getMessage()]
    assert len(warned) == 1
    assert "4 held-out images: its p-value is at least 0.0625, and p_threshold 0.05" in warned[0]


def test_wilcoxon_refuses_an_objective_without_values_by_image(open_study):
    trial = open_study(pruner="wilcoxon", objectives=["val/gap"]).next()
    scores, terms = {SCORE: 0.5, "val/gap": 0.1}, {SCORE: [0.5] * 8}
    with pytest.raises(SettingsError, match=r"val/gap has no .* \(val/loss_rel has\): choose"):
        trial.report(1, Path("e1"), scores, terms)


def test_patient_stops_what_has_not_improved(open_study):
    study = open_study(pruner="patient", pruner_options={"patience": 2})
    trial = study.next()
    values = [0.9, 0.5, 0.6, 0.7]
    assert [report(trial, e, v) for e, v in enumerate(values, start=1)] == [False] * 3 + [True]


def test_several_objectives_are_those_of_the_best_candidate_by_the_first(open_study):
    study = open_study(objectives=[SCORE, "val/prior_drift"])
    trial = study.next()
    for epoch, (value, drift) in enumerate([(0.9, 0.1), (0.5, 0.3), (0.7, 0.2)], start=1):
        report(trial, epoch, value, **{"val/prior_drift": drift})
    study.complete(trial)
    assert study.trials[0].values == [0.5, 0.3]


@pytest.mark.parametrize("pruner", ["median", "asha", "wilcoxon"])
def test_pruning_by_the_first_objective_decides_as_with_that_objective_alone(open_study, pruner):
    one = open_study(name="one", pruner=pruner, n_trials=9)
    two = open_study(name="two", pruner=pruner, n_trials=9, objectives=[SCORE, "val/prior_drift"])
    decisions = []
    for _ in range(3):  # packs of three, as trials overlap in a sweep
        pack = [(one.next(), two.next()) for _ in range(3)]
        for epoch in (1, 2, 3):
            values = [(7 * ours.number) % 5 + 1 / epoch for ours, _ in pack]
            terms = [[value + i / 100 for i in range(8)] for value in values]
            for (ours, theirs), value, of_images in zip(pack, values, terms, strict=True):
                report(ours, epoch, value, of_images)
                report(theirs, epoch, value, of_images, **{"val/prior_drift": 1.0})
            decided = [(a.should_prune(), b.should_prune()) for a, b in pack]
            decisions += decided
        for (ours, theirs), (to_prune, _) in zip(pack, decided, strict=True):
            (one.prune if to_prune else one.complete)(ours)
            (two.prune if to_prune else two.complete)(theirs)
    assert [ours for ours, _ in decisions] == [theirs for _, theirs in decisions]
    assert {ours for ours, _ in decisions} == {True, False}


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii"])
def test_samplers_know_a_pruned_trials_values_with_several_objectives_too(open_study, sampler):
    study = open_study(sampler=sampler, objectives=[SCORE, "val/prior_drift"])
    trial = study.next()
    report(trial, 1, 0.5, **{"val/prior_drift": 0.1})
    study.prune(trial)
    assert [one.values for one in study.optuna_study.best_trials] == [[0.5, 0.1]]
    (row,) = summarise(study).rows
    assert (row.state, row.epochs) == ("pruned", 1)
    study.next()


def test_batch_mates_are_told_apart(open_study):
    """TPE that doesn't know of running trials asks for the same good place again and again."""

    def rates_asked(seed, **options):
        name = f"mates{len(options)}-{seed}"
        study = open_study(
            name=name, n_trials=30, sampler="tpe", sampler_options=options, seed=seed
        )
        for _ in range(14):
            trial = study.next()
            report(trial, 1, abs(math.log10(trial.params["optimizer.unet_lr"]) + 4))
            study.complete(trial)
        mates = [study.next() for _ in range(16)]
        return statistics.pstdev(math.log10(one.params["optimizer.unet_lr"]) for one in mates)

    pairs = [(rates_asked(seed), rates_asked(seed, constant_liar=False)) for seed in range(3)]
    assert sum(told for told, _ in pairs) > 2 * sum(untold for _, untold in pairs)


def test_a_candidate_that_keeps_the_constraints_goes_before_a_better_one(open_study):
    study = open_study(constraints={"val/prior_drift": 0.2})
    trial = study.next()
    for epoch, (value, drift) in enumerate([(0.9, 0.1), (0.5, 0.3)], start=1):
        report(trial, epoch, value, **{"val/prior_drift": drift})
    study.complete(trial)
    assert study.trials[0].value == 0.9
    assert study.trials[0].constraints == {"val/prior_drift": pytest.approx(-0.1)}


def test_a_run_without_a_finite_score_fails_with_its_reason(open_study):
    study = open_study()
    trial = study.next()
    report(trial, 1, math.nan)
    study.complete(trial)
    assert study.trials[0].state == TrialState.FAIL
    assert "finite" in study.trials[0].user_attrs["reason"]


def test_a_score_that_the_runs_lack_is_refused_with_those_there_are(open_study):
    trial = open_study(objectives=["val/los"]).next()
    with pytest.raises(SettingsError, match=r"study.objectives.*val/los; they have val/loss_rel"):
        report(trial, 1, 0.5)


def test_guesses_come_first_each_once_even_after_a_break(open_study):
    guesses = [{"adapter.rank": 8, "optimizer.unet_lr": 1e-4}, {"adapter.rank": 16}]
    study = open_study(guesses=guesses)
    first = study.next()
    assert first.params == guesses[0]
    report(first, 1, 0.5)
    study.complete(first)
    resumed = open_study(guesses=guesses)
    assert resumed.next().params["adapter.rank"] == 16
    assert open_study(guesses=guesses).next().number == 2


def test_n_trials_is_the_total_over_all_commands(open_study):
    run(open_study(n_trials=2))
    study = open_study(n_trials=5)
    run(study)
    assert [trial.number for trial in study.trials] == [0, 1, 2, 3, 4]
    assert open_study(n_trials=5).next() is None


def test_a_resumed_study_asks_what_the_unbroken_one_asks(open_study):
    run(open_study(name="whole", sampler="tpe", n_trials=8))
    whole = [trial.params for trial in open_study(name="whole", n_trials=8).trials]
    for n_trials in (3, 5, 8):
        run(open_study(name="broken", sampler="tpe", n_trials=n_trials))
    assert [trial.params for trial in open_study(name="broken", n_trials=8).trials] == whole


def test_a_passing_failure_is_tried_again_with_the_same_parameters_and_counts_once(open_study):
    study = open_study(n_trials=2)
    first = study.next()
    report(first, 1, 0.5)
    assert study.fail(first, "killed", kind=FailureKind.RETRY)
    again = study.next()
    assert (again.number, again.params) == (first.number, first.params)
    assert not study.fail(again, "killed once more", kind=FailureKind.RETRY)  # retries: 1
    assert study.next().number == 1
    assert study.next() is None
    assert [t.user_attrs.get("reason") for t in study.trials] == ["killed once more", None]


def test_what_a_trial_reports_again_counts_once_and_is_not_pruned_before_it_came_so_far(open_study):
    study = open_study(n_trials=2, pruner="asha", min_epochs=1)
    first = study.next()
    for epoch in (1, 2):
        report(first, epoch, 0.5)
    study.complete(first)
    worse = study.next()
    report(worse, 1, 0.7)
    report(worse, 2, 0.6)
    assert study.fail(worse, "killed", kind=FailureKind.RETRY)
    again = study.next()
    report(again, 1, 0.7)
    assert not again.should_prune()
    assert again.best.epoch == 2
    report(again, 2, 0.61)  # its file is the newer one
    assert again.values == [0.61]
    report(again, 3, 0.62)
    assert study.optuna_study.trials[1].intermediate_values == {1: 0.7, 2: 0.6, 3: 0.61}


def test_a_raised_error_is_not_tried_again(open_study):
    study = open_study(n_trials=1)
    assert not study.fail(study.next(), "wrong")
    assert study.next() is None


def test_this_version_of_optuna_lets_a_trial_go_on_under_its_number(tmp_path):
    """By its private parts, which another version may not have."""
    assert optuna.__version__.partition(".")[0] == "5", "see continue_trial.py"
    study = optuna.create_study(storage=open_storage(None, tmp_path))
    begun = study.ask()
    begun.suggest_float("x", 0, 1)
    again = continue_trial(study, open_storage(None, tmp_path), 0)
    again.report(0.5, 1)
    assert (again.number, again.params) == (0, begun.params)
    assert study.trials[0].intermediate_values == {1: 0.5}


def test_what_a_killed_driver_left_running_goes_on_under_its_number(open_study):
    first = open_study(n_trials=1).next()
    resumed = open_study(n_trials=1)
    assert resumed.take_over() == [0]
    again = resumed.next()
    assert (again.number, again.params) == (first.number, first.params)
    assert resumed.next() is None


def test_a_trial_that_was_killed_before_it_had_all_parameters_gets_the_rest(
    open_study, monkeypatch
):
    reference = open_study(n_trials=1, name="reference").next()

    def killed(trial, name, parameter, real=study_module._suggest):
        if name == "optimizer.unet_lr":
            raise KeyboardInterrupt
        return real(trial, name, parameter)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(study_module, "_suggest", killed)
        open_study(n_trials=1).next()
    resumed = open_study(n_trials=1)
    assert [list(trial.params) for trial in resumed.trials] == [["adapter.rank"]]
    resumed.take_over()
    assert resumed.next().params == reference.params


def test_a_trial_that_was_enqueued_but_not_begun_is_begun(open_study):
    study = open_study(n_trials=1, guesses=[{"adapter.rank": 8}])
    study.optuna_study.enqueue_trial({"adapter.rank": 4}, user_attrs={"origin": "guess"})
    assert open_study(n_trials=1).next().params["adapter.rank"] == 4


def test_a_line_that_a_kill_cut_short_is_mended(open_study, tmp_path):
    run(open_study(n_trials=2))
    journal = find_journal("demo-s", tmp_path / "outputs")
    with journal.open("ab") as file:
        file.write(b'{"op_code": 5, "wor')
    study = open_study(n_trials=3)
    run(study)
    assert len(open_study(n_trials=3).trials) == 3


def test_one_driver_at_a_time(tmp_path):
    refused = pytest.raises(SettingsError, match="driven by process")
    with only_driver(tmp_path, "s"), refused, only_driver(tmp_path, "s"):
        pass
    with only_driver(tmp_path, "s"):
        pass


def test_one_driver_at_a_time_of_a_journal_that_two_folders_share(tmp_path):
    shared = str(tmp_path / "shared.journal")
    refused = pytest.raises(SettingsError, match="s is being driven by another process, from")
    with only_driver(tmp_path / "a", "s", shared):
        with refused, only_driver(tmp_path / "b", "s", shared):
            pass
        with only_driver(tmp_path / "c", "another", shared):
            pass
    with only_driver(tmp_path / "b", "s", shared):
        pass


def test_another_question_is_another_study(open_study):
    run(open_study(n_trials=1))
    other = Space({"adapter.rank": Choice("adapter.rank", (4, 8), ("4", "8"))}, {})
    with pytest.raises(SettingsError, match=r"another study.params.adapter.rank; give another"):
        open_study(other)
    with pytest.raises(SettingsError, match=r"begun with study.objectives=.*give another \S*$"):
        open_study(objectives=["val/gap"])  # a warm start from it would be refused


@pytest.mark.parametrize("more", [[], ["val/prior_drift"]])
def test_a_study_that_an_older_version_began_by_its_loss_goes_on_by_it(
    open_study, tmp_path, caplog, more
):
    caplog.set_level(logging.INFO)
    older = ["val/loss_rel", *more]
    open_study(objectives=older).next()
    study = open_study(objectives=["val/score", *more])
    assert study.settings.objectives == older
    assert f"begun by {', '.join(older)}, and goes on by it" in caplog.text
    asked, folder = replace(study.settings, objectives=["val/score", *more]), tmp_path / "outputs"
    (job,) = join_study(asked, folder / "demo" / "s", [study.next().number], max_epochs=9)
    for trial in (study.next(), job):
        report(trial, 1, 0.5, **{"val/prior_drift": 0.1})
        assert trial.values == [0.5, *([0.1] if more else [])]


def test_a_study_under_way_is_not_begun_anew_though_nothing_has_trained_yet(open_study, tmp_path):
    changed = r"begun with settings=1, not 2"
    study = open_study(basis={"settings": 1})
    study.next()  # by a driver that was killed: its job may report yet
    with pytest.raises(SettingsError, match=changed):
        open_study(basis={"settings": 2})
    study.note_setup_failed()
    assert open_study(basis={"settings": 2}).trials == []
    shared = {"storage": str(tmp_path / "shared.journal"), "name": "shared"}
    study = open_study(basis={"settings": 1}, **shared)
    study.note_setup_failed()
    with pytest.raises(SettingsError, match=changed):  # of another folder's driver, maybe
        open_study(basis={"settings": 2}, **shared)


@pytest.mark.parametrize(("before", "after"), [(None, 1.0), (1.0, None), (None, None)])
def test_what_some_points_have_and_others_lack_is_compared(open_study, before, after):
    def basis(value):
        points = {} if value == 1.0 else {"a=1: norm": 1.0, "a=2: norm": value}
        return {"settings": {"norm": 1.0}, "points": points}

    run(open_study(basis=basis(before), n_trials=1))
    if before == after:
        open_study(basis=basis(after), n_trials=1)
        return
    with pytest.raises(SettingsError, match=r"a=\d: norm=.*; give another"):
        open_study(basis=basis(after), n_trials=1)


def test_a_study_that_kept_no_points_goes_on(open_study):
    run(open_study(basis={"settings": {}}, n_trials=1))
    open_study(basis={"settings": {}, "points": {"a=1: norm": 1.0}}, n_trials=1)


def test_other_constraints_are_another_study_but_not_of_one_that_kept_none(open_study):
    study = open_study(constraints={"val/prior_drift": 0.2})
    report(study.next(), 1, 0.5, **{"val/prior_drift": 0.1})
    changed = r"with study.constraints.val/prior_drift=0.2, not 0.3; .* \(and study.warm_start"
    with pytest.raises(SettingsError, match=changed):
        open_study(constraints={"val/prior_drift": 0.3})
    kept = study.optuna_study.user_attrs["basis"]
    del kept["study.constraints"]  # begun by an earlier version
    study.optuna_study.set_user_attr("basis", kept)
    open_study(constraints={"val/prior_drift": 0.3})


def test_the_grid_has_every_point_once(open_study):
    space = Space({"adapter.rank": RANK, "seed": Number("seed", 0, 2, step=1)}, {})
    study = open_study(space, sampler="grid", n_trials=None)
    run(study)
    points = {tuple(trial.params.values()) for trial in study.trials}
    assert len(study.trials) == 9 == len(points)


def test_guesses_come_first_in_a_grid_even_of_one_that_was_begun_without(open_study):
    space = Space({"adapter.rank": RANK, "seed": Number("seed", 0, 2, step=1)}, {})
    guesses = [{"adapter.rank": 16, "seed": 1}, {}, {"seed": 2}, {"adapter.rank": 4, "seed": 0}]
    run(open_study(space, guesses, sampler="grid", n_trials=9))
    asked = [tuple(t.params.values()) for t in open_study(space, sampler="grid").trials]
    assert asked[:4] == [(16, 1), (4, 2), (4, 0), (4, 1)]
    assert len(set(asked)) == 9
    run(open_study(space, sampler="grid", name="begun", n_trials=2))
    run(open_study(space, guesses, sampler="grid", name="begun", n_trials=9))
    asked = [tuple(t.params.values()) for t in open_study(space, name="begun").trials]
    assert asked[:5] == [(4, 0), (4, 1), (16, 1), (4, 2), (8, 0)]
    assert len(set(asked)) == 9


@pytest.mark.parametrize("sampler", [name for name in get_args(SamplerName) if name != "grid"])
def test_no_point_is_tried_twice_and_a_sweep_ends_when_all_were(open_study, sampler):
    space = Space({"adapter.rank": RANK, "seed": Number("seed", 0, 2, step=1)}, {})
    for n_trials in (4, 30):  # the second command goes on where the first has ended
        run(open_study(space, sampler=sampler, n_trials=n_trials))
    trials = open_study(space, sampler=sampler, n_trials=30).trials
    assert len({point_key(trial.params) for trial in trials}) == len(trials) == 9


@pytest.mark.parametrize(
    ("number", "values"),
    [
        (Number("x", 1, 3), [1, 2, 3]),
        (Number("x", 1, 3, log=True), [1, 2, 3]),
        (Number("x", 3.0, 3.0), [3.0]),
        # as Hydra adds up range(0.1,0.8,0.2)
        (Number("x", 0.1, 0.7000000000000001, step=0.20000000000000004), [0.1, 0.3, 0.5, 0.7]),
    ],
    ids=str,
)
@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_few_numbers_are_tried_once_each(open_study, number, values, sampler):
    space = Space({"x": number}, {})
    for n_trials in (2, 9):  # the second command goes on where the first has ended
        run(open_study(space, [{"x": values[-1]}], sampler=sampler, n_trials=n_trials))
    trials = open_study(space, sampler=sampler, n_trials=9).trials
    assert sorted(trial.params["x"] for trial in trials) == values


def test_a_value_kept_with_the_end_of_a_sum_is_the_point_it_stands_for(open_study):
    space = Space({"x": Number("x", 0.1, 0.3, step=0.1)}, {})
    kept = optuna.trial.create_trial(
        value=0.5,
        params={"x": 0.30000000000000004},
        distributions={"x": optuna.distributions.FloatDistribution(0.1, 0.4)},
    )
    open_study(space).optuna_study.add_trial(kept)
    run(open_study(space))
    assert len(open_study(space).trials) == 3


def test_too_many_whole_numbers_are_no_points_to_count():
    assert Space({"x": Number("x", 1, 10_000)}, {}).count() == 10_000
    assert Space({"x": Number("x", 1, 10_001)}, {}).count() is None


def test_a_guess_is_no_second_trial_of_a_point(open_study):
    space = Space({"adapter.rank": RANK}, {})
    run(open_study(space, n_trials=1))
    first = open_study(space, n_trials=1).trials[0].params
    guesses = [first, {"adapter.rank": 8}, {"adapter.rank": 8}]
    run(open_study(space, guesses, n_trials=9))
    asked = [trial.params["adapter.rank"] for trial in open_study(space, n_trials=9).trials]
    assert sorted(asked) == [4, 8, 16]


@pytest.mark.parametrize(
    ("values", "bounds", "is_log"),
    [
        ((4, 8, 16), (3, 22), True),
        ((0.5, 0.25, 1.0), (0.25 / math.sqrt(2), math.sqrt(2)), True),
        ((1, 2, 3, 4), (1, 4), False),
        ((-1, 4, 8), (-3, 10), False),
    ],
)
def test_choices_between_numbers_are_told_to_optuna_as_near_or_far(values, bounds, is_log):
    choice = Choice("x", values, tuple(map(str, values)))
    assert (choice.interval.low, choice.interval.high) == pytest.approx(bounds)
    assert choice.interval.log is is_log
    assert [choice.nearest(value) for value in values] == list(values)


@pytest.mark.parametrize("values", [("a", "b"), (True, False), (8, 10, 128), (None, 1, 2), (5,)])
def test_other_choices_are_names(values):
    assert Choice("x", values, tuple(map(str, values))).interval is None


def test_a_choice_between_numbers_is_kept_as_its_value(open_study):
    study = open_study(sampler="tpe", n_trials=12)
    run(study)
    assert {trial.params["adapter.rank"] for trial in study.trials} == {4, 8, 16}
    assert all(trial.distributions["adapter.rank"].log for trial in study.trials)


def test_a_conditional_parameter_exists_only_where_it_should(open_study):
    study = open_study(CONDITIONAL, sampler="tpe", n_trials=9)
    run(study)
    for trial in study.trials:
        assert ("adapter.conv_rank" in trial.params) == (trial.params["adapter"] == "locon")
    assert len(CONDITIONAL.grid()) == 1 + 8


def test_warm_start_takes_the_trials_that_fit_as_knowledge_but_not_as_its_own(open_study, tmp_path):
    run(open_study(name="old", n_trials=4))
    known = known_trials("demo-old", SETTINGS, tmp_path / "outputs", tmp_path)
    study = open_study(name="new", n_trials=2)
    assert learn(study, known, "demo-old") == 4
    assert learn(study, known, "demo-old") == 0  # once
    assert study.trials == []
    run(study)
    assert [trial.number for trial in study.trials] == [4, 5]
    narrow = Space({"adapter.rank": Choice("adapter.rank", (99,), ("99",))}, {})
    assert learn(open_study(narrow, name="other"), known, "demo-old") == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objectives": ["val/gap"]}, r"its study.objectives is \['val/loss_rel'\], not"),
        ({"maximize": [SCORE]}, r"its study.maximize is \[\], not"),
    ],
)
def test_a_warm_start_from_another_question_is_refused(open_study, tmp_path, changes, said):
    run(open_study(name="old", n_trials=1))
    with pytest.raises(SettingsError, match=said):
        known_trials("demo-old", replace(SETTINGS, **changes), tmp_path / "outputs", tmp_path)


def test_a_warm_start_that_a_kill_broke_off_is_finished_and_has_each_trial_once(
    open_study, tmp_path, monkeypatch
):
    run(open_study(name="old", n_trials=4))
    known = known_trials("demo-old", SETTINGS, tmp_path / "outputs", tmp_path)
    study = open_study(name="new")
    add, added = study.optuna_study.add_trial, []

    def killed(trial):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(trial)
        add(trial)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(study.optuna_study, "add_trial", killed)
        learn(study, known, "demo-old")
    resumed = open_study(name="new")
    assert (has_learned(resumed), learns_from(resumed)) == (False, "demo-old")
    assert learn(resumed, known, "demo-old") == 4
    params = [trial.params for trial in resumed.optuna_study.trials]
    assert params == [trial.params for trial in known]
    assert has_learned(open_study(name="new"))


def test_a_warm_start_finds_a_sweep_in_the_storage_and_in_a_journal_of_its_own(
    open_study, tmp_path
):
    shared = replace(SETTINGS, storage=str(tmp_path / "shared.journal"))
    run(open_study(name="old", n_trials=2))
    run(open_study(name="kept", n_trials=3, storage=shared.storage))
    outputs = tmp_path / "outputs"
    for sweep, number in {"demo-old": 2, outputs / "demo" / "old": 2, "demo-kept": 3}.items():
        assert len(known_trials(str(sweep), shared, outputs, tmp_path)) == number
    with pytest.raises(SettingsError, match=r"none: there is no such .*; in study.storage .*kept"):
        known_trials("none", shared, outputs, tmp_path)


@pytest.mark.parametrize("pruner", [one for one in get_args(PrunerName) if one != "patient"])
@pytest.mark.parametrize("objectives", [[SCORE], [SCORE, "val/prior_drift"]])
def test_no_run_is_compared_with_those_of_a_warm_start(open_study, tmp_path, pruner, objectives):
    asked = {"pruner": pruner, "objectives": objectives}
    terms = [i / 100 for i in range(8)]
    old = open_study(name="old", **asked)
    while trial := old.next():
        trial.report(1, Path("e1"), {SCORE: 0.1, "val/prior_drift": 0.1}, {SCORE: terms})
        old.complete(trial)
    study = open_study(name="new", **asked)
    known = known_trials("demo-old", study.settings, tmp_path / "outputs", tmp_path)
    assert learn(study, known, "demo-old") == 6
    first, worse = study.next(), study.next()
    drift = {"val/prior_drift": 0.5}
    assert not report(first, 1, 0.8, [0.8 + one for one in terms], **drift)
    study.complete(first)
    worst = report(worse, 1, 0.9, [0.9 + one for one in terms], **drift)
    assert worst == (pruner in ("asha", "hyperband", "wilcoxon"))  # others wait for two of its own


def test_a_trial_whose_parent_has_another_value_is_no_point_of_the_space():
    assert not CONDITIONAL.holds({"adapter": "dora"})
    assert not CONDITIONAL.holds({"adapter": "dora", "adapter.conv_rank": 4})


@pytest.mark.parametrize("values", [{SCORE: 0.5}, {SCORE: 0.5, "val/prior_drift": 0.1}])
def test_a_pruned_trial_of_a_warm_start_is_known_by_its_values(open_study, values):
    other = open_study(name="old", n_trials=2, objectives=list(values))
    trial, without = other.next(), other.next()
    trial.report(1, Path("e1"), values, {})
    for one in (trial, without):
        other.prune(one)
    study = open_study(name="new", objectives=list(values))
    assert learn(study, other.trials, "old") == 1
    (known,) = study.optuna_study.trials
    assert (known.state, known.values) == (TrialState.COMPLETE, list(values.values()))


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsgaii"])
def test_a_warm_starts_trials_keep_or_break_the_constraints_of_this_study(open_study, sampler):
    old = open_study(name="old", n_trials=3)
    for scores in ({"val/prior_drift": 0.1}, {"val/prior_drift": 0.3}, {}):
        trial = old.next()
        report(trial, 1, 0.5, **scores)
        old.complete(trial)
    asked = {"constraints": {"val/prior_drift": 0.2}, "sampler": sampler}
    study = open_study(name="new", n_trials=4, **asked)
    assert learn(study, old.trials, "old") == 2  # of the third it isn't known
    known = [trial.constraints["val/prior_drift"] for trial in study.optuna_study.trials]
    assert known == pytest.approx([-0.1, 0.1])
    while trial := study.next():
        report(trial, 1, 0.5, **{"val/prior_drift": 0.1})
        study.complete(trial)
    assert len(study.trials) == 4


def test_a_job_in_another_process_reports_to_its_trial(open_study, tmp_path):
    study = open_study()
    number = study.next().number
    folder = tmp_path / "outputs" / "demo" / "s"
    (joined,) = join_study(replace(SETTINGS), folder, [number], max_epochs=9)
    report(joined, 1, 0.5)
    joined.mark_pruned()
    assert study.settle(number, []) is None
    assert study.trials[0].state == TrialState.PRUNED
    assert study.trials[0].value == 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"sampler_options": {"n_startup": 3}},
            "study.sampler_options.n_startup: there is no such",
        ),
        (
            {"pruner": "asha", "pruner_options": {"reduction_factor": 1}},
            "reduction_factor at least",
        ),
        ({"pruner": "median", "pruner_options": {"n_startup_trials": "x"}}, "pruner_options of"),
        ({"n_trials": None}, "study.n_trials is missing"),
        ({"maximize": ["val/x"]}, "study.maximize: val/x"),
        ({"sampler": "grid"}, "needs choice"),
        ({"objectives": [SCORE, "val/gap"], "sampler": "cmaes"}, "takes one objective"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(open_study, changes, said):
    with pytest.raises(SettingsError, match=said) as error:
        open_study(**changes)
    assert "\n" not in str(error.value)


def test_the_summary_says_what_pruning_saved_what_failed_and_what_mattered(open_study):
    study = open_study(pruner="median", n_trials=12, startup_trials=9)
    failed = study.next()
    study.fail(failed, "out of memory", kind=FailureKind.RETRY)
    run(
        study, score=lambda trial, epoch: trial.params["adapter.rank"] + trial.number / 99, epochs=9
    )
    summary = summarise(study)
    said = "\n".join(lines(summary))
    epochs = sum(row.epochs for row in summary.rows)
    assert f"Trained {epochs} epochs of 108 planned: pruning saved {108 - epochs}" in said
    assert "Trial 0 was begun again: out of memory" in said
    assert "What mattered for val/loss_rel: " in said
    assert f"Best: trial {summary.best[0].number}, epoch 1" in said


def test_trials_that_differ_in_their_seed_alone_are_compared_by_their_mean(open_study):
    space = Space({"adapter.rank": RANK, "seed": Choice("seed", (0, 1), ("0", "1"))}, {})
    study = open_study(space, sampler="grid", pruner="none", n_trials=None)
    lucky = {(4, 0): 0.40, (4, 1): 0.80, (8, 0): 0.55, (8, 1): 0.45, (16, 0): 0.6, (16, 1): 0.6}
    point = itemgetter("adapter.rank", "seed")
    run(study, score=lambda trial, epoch: lucky[point(trial.params)], epochs=1)
    summary = summarise(study)
    (best,) = summary.best
    assert (best.params["adapter.rank"], best.params["seed"]) == (8, 1)
    first, second, *_ = lines(summary)
    assert first.startswith(f"Best: trial {best.number}, epoch 1, val/loss_rel 0.45: ")
    numbers = [row.number for row in summary.rows if row.params["adapter.rank"] == 8]
    assert second == (
        "Its setting has val/loss_rel 0.5 [-0.1353, 1.135] on average over seeds 0, 1 (trials"
        f" {numbers[0]}, {numbers[1]})."
    )


def test_the_summary_knows_the_candidates_of_trials_that_train_or_failed(open_study):
    study = open_study(objectives=["val/loss_rel", "val/prior_drift"], pruner="none")
    failed, training = study.next(), study.next()
    assert lines(summarise(study)) == ["No trial has a candidate yet."]
    report(failed, 1, 0.5, **{"val/prior_drift": 0.00001234})
    study.fail(failed, "its loss is NaN")
    report(training, 1, 0.75, **{"val/prior_drift": 0.1})
    summary = summarise(study)
    assert [row.state for row in summary.best] == ["failed"]
    first, *others = lines(summary)
    assert first.startswith("On the front: trial 0, epoch 1, val/loss_rel 0.5, ")
    assert "val/prior_drift 1.234e-05: " in first
    assert "No trial has a candidate yet." not in others
