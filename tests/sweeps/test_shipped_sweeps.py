"""The sweeps that ship: each composes, and runs shrunk with a stand-in for the workers."""

import pytest

from conftest import SMALL, options
from fake_worker_pool import FakePool
from lorasweep.cli import main
from lorasweep.config.conf_folder import sweeps_dir
from lorasweep.sweeps import multirun, sweep_file
from lorasweep.sweeps import run_sweep as sweeping

SWEEPS = sorted(path.stem for path in sweeps_dir().glob("*.yaml"))
STUDIES = [name for name in SWEEPS if name != "demo"]  # the demo is a plain grid of Hydra's own
CAPTIONED = {"captions"}  # searches captions, which the demo brings its own of


def scores(run, epoch):
    return {"val/loss_rel": 1 / epoch + run.number / 100, "val/prior_drift": run.number / 100}


@pytest.fixture
def ship(tmp_path, monkeypatch):
    """Run a shipped sweep, shrunk."""

    def run(name, *overrides):
        workers = FakePool(scores)
        monkeypatch.setattr(multirun, "WorkerPool", lambda devices, max_pack: workers)
        base = [
            "model=embedded",
            "dataset.image_dir=${embedded:demo_images}",
            "dataset.min_size=64",
        ]
        base = ["experiment=demo"] if name not in CAPTIONED else base
        small = ["trainer.max_train_epochs=5", "study.n_trials=3"]
        places = [f"output_root={tmp_path}", f"cache_dir={tmp_path}/cache"]
        main.main(["sweep", name, *base, *small, *places, *overrides])
        return workers

    return run


@pytest.mark.parametrize(
    "choice",
    [
        ["study.pruner=wilcoxon"],
        ["study.pruner=wilcoxon", "++study.pruner_options.p_threshold=0.2"],
        ["study.sampler=random"],
    ],
    ids=str,
)
def test_another_pruner_or_sampler_than_the_files_has_its_own_options(ship, choice):
    assert len(ship("guide", *choice).submitted) >= 3


def test_options_beside_a_named_pruner_are_its_own(ship, capsys):
    with pytest.raises(SystemExit):
        ship("guide", "study.pruner=wilcoxon", "++study.pruner_options.no_such=2")
    assert "study.pruner_options.no_such: there is no such setting" in capsys.readouterr().err


@pytest.mark.parametrize("name", STUDIES)
def test_a_shipped_sweep_runs(ship, name, capsys):
    workers = ship(name)
    assert len({run.name for run in workers.submitted}) == 3
    said = capsys.readouterr().out
    assert "trial 2" in said
    assert "Best" in said or "On the front" in said
    assert ship(name).submitted == []  # the same command knows its own study


@pytest.mark.slow
@pytest.mark.parametrize("name", [one for one in STUDIES if one not in CAPTIONED])
def test_a_shipped_sweep_trains(name, tmp_path, cache_dir, capsys):
    """As above, but with real workers."""
    small = [one for one in SMALL if not one.startswith("sampling.")]
    places = [f"output_root={tmp_path}", f"cache_dir={cache_dir}", "sampling.every_n_epochs=0"]
    main.main(["sweep", name, *small, *places, "study.n_trials=3"])
    said = capsys.readouterr().out
    assert "Trained 6 epochs of 6 planned" in said  # the shortest runs are not pruned
    assert len(list((tmp_path / "demo" / name).glob("*/*-000002.safetensors"))) == 3


@pytest.fixture
def read(monkeypatch):
    """Read a shipped sweep's search, as its command line has it."""

    class Read(Exception):
        """The sweep's search, in place of the sweep."""

    def sweep(config, loader, launcher, arguments):
        raise Read(sweep_file.read_search(config, loader, arguments))

    def found(name, *overrides):
        with pytest.raises(Read) as found:
            main.main(["sweep", name, "dataset.image_dir=photos", *overrides])
        return found.value.args[0]

    monkeypatch.setattr(sweeping, "sweep", sweep)
    return found


@pytest.mark.parametrize("name", STUDIES)
def test_what_would_train_without_the_sweep_is_tried_first(name, read):
    found = read(name)
    space, guess = found.space, found.guesses[0]
    assert space.holds(guess)
    guide = {
        "adapter": "lora",
        "adapter.rank": 64,
        "captions": "[empty,wd14,kosmos2]",
        **{f"captions.{arm}.repeats": 10 for arm in ("empty", "wd", "kosmos")},
        "lr_scheduler": "constant",
        "optimizer.unet_lr": 1e-4,
        "optimizer.text_encoder_lr": 5e-5,
        "study.vars.alpha_ratio": 0.5,
        "study.vars.lr": 1e-4,
        "study.vars.text_encoder_ratio": 0.5,
    }
    assert guess == {key: guide[key] for key in guess}


@pytest.mark.parametrize(
    ("name", "override", "gone", "conditions"),
    [
        ("adapter_types", "adapter=locon", ["adapter.factor"], {}),
        ("adapter_types", "adapter=dora", ["adapter.conv_rank", "adapter.factor"], {}),
        (
            "adapter_types",
            "adapter=choice(lora,locon)",
            ["adapter.factor"],
            {"adapter.conv_rank": ("locon",)},
        ),
        ("captions", "captions=[wd14]", ["captions.empty.repeats", "captions.kosmos.repeats"], {}),
        (
            "captions",
            "captions=choice([empty,wd14],[wd14])",
            ["captions.kosmos.repeats"],
            {
                "captions.empty.repeats": ("[empty,wd14]",),
                "captions.wd.repeats": ("[wd14]", "[empty,wd14]"),
            },
        ),
    ],
)
def test_a_sweep_narrowed_on_the_command_line_searches_what_is_left(
    read, name, override, gone, conditions
):
    whole, narrow = read(name).space, read(name, override).space
    fixed = [] if "choice" in override else [override.partition("=")[0]]
    assert list(narrow.parameters) == [n for n in whole.parameters if n not in [*gone, *fixed]]
    assert {name: one.texts for name, one in narrow.conditions.items()} == conditions


def test_a_point_to_try_first_goes_without_what_the_command_line_leaves_out(read):
    guesses = read("guide", "adapter.rank=choice(8,16)").guesses
    assert [guess.get("adapter.rank") for guess in guesses] == [None, None, 16]
    assert [guess["study.vars.lr"] for guess in guesses] == [1e-4] * 3


def test_what_the_command_line_asks_for_is_searched_whatever_the_conditions(read):
    space = read("adapter_types", "adapter=locon", "adapter.factor=choice(4,8)").space
    assert {"adapter.conv_rank", "adapter.factor"} < set(space.parameters)


@pytest.mark.parametrize("override", ["adapter=lora", "adapter=locon", "adapter=choice(lora,loha)"])
def test_a_condition_on_what_its_parent_never_is_is_refused(read, override, capsys):
    with pytest.raises(SystemExit):
        read("adapter_types", override, "study.conditions={adapter.conv_rank: 'adapter=nolora'}")
    assert "study.conditions.adapter.conv_rank: adapter is never nolora" in capsys.readouterr().err


def test_the_guides_own_advice_is_the_first_trial_of_its_sweep(ship):
    first = ship("guide", "adapter.rank=64").submitted[0]
    assert first.adapter.alpha == 32
    assert first.optimizer.unet_lr == pytest.approx(1e-4)
    assert first.optimizer.text_encoder_lr == pytest.approx(5e-5)


def test_the_guides_rates_fall_as_alpha_over_rank_grows(ship):
    coupled = ["study.vars.alpha_ratio=1.0", "study.vars.lr=1e-4"]
    first = ship("guide", "adapter.rank=64", *coupled).submitted[0]
    assert first.adapter.alpha == 64
    assert first.optimizer.unet_lr == pytest.approx(5e-5)
    assert first.optimizer.text_encoder_lr == pytest.approx(2.5e-5)


def test_adapter_types_searches_our_own_types_with_what_each_has(ship):
    runs = ship("adapter_types", "study.n_trials=12").submitted
    keys = {}
    for run in runs:
        values = dict(override.split("=", 1) for override in run.overrides if "=" in override)
        keys.setdefault(values["adapter"], set()).update(values)
    assert set(keys) <= set(options("adapter")) - {"lycoris"}
    assert len(keys) > 1
    for name, given in keys.items():
        assert ("adapter.conv_rank" in given) == (name == "locon")
        assert ("adapter.factor" in given) == (name == "lokr")
