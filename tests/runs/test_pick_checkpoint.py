"""Picking a checkpoint, by the rule or a person's choice, and what is recorded of it."""

from __future__ import annotations

import io
import json
import math
import random
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from candidates import BY
from logged import SETTINGS as ANY_STORE
from lorasweep import tracking
from lorasweep.lora_files import checkpoint
from lorasweep.lora_files.checkpoint import Checkpoint
from lorasweep.runs import pick_checkpoint, pick_table
from lorasweep.tracking import NewRun, Tracker, Tracking

CONFIG = """\
model: {path: some/base-model, clip_skip: 2}
sampling: {prompts: ["a rocket --w 64 --s 9", a house]}
"""
SETTINGS = replace(ANY_STORE, upload="picked", registered_model="style")


@dataclass(frozen=True)
class Store:
    """A store with a sweep of two runs, and a later single run."""

    root: Path
    settings: Tracking
    client: MlflowClient

    def pick(self, **choice: str | int | None) -> pick_checkpoint.Pick:
        by = {"by": BY, "sweep": "grid", **choice}
        return pick(self.settings, self.root, **by)


def pick(settings: Tracking, root: Path, **choice: Any) -> pick_checkpoint.Pick:
    chosen = pick_checkpoint.choose(settings, root, **choice)
    return pick_checkpoint.record(chosen, settings, root, replaces=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("picking")
    nan = math.nan
    with Tracker(SETTINGS, root) as tracker:
        fill(tracker, root, "one", "grid", [(0.9, 0.91, 0.1), (0.71, 0.73, 0.3), (nan, nan, 0.0)])
        fill(tracker, root, "two", "grid", [(0.8, 0.82, 0.2), (0.72, 0.75, 0.6), (math.inf, 1, 0)])
        fill(tracker, root, "alone", None, [(0.5, 0.6, 0.1)])
    return Store(root, SETTINGS, MlflowClient(SETTINGS.resolve(root)))


def fill(
    tracker: Tracker,
    root: Path,
    name: str,
    sweep: str | None,
    scored: list[tuple[float, float, float]],
    setting: str | None = None,
    seed: int | None = None,
    params: Mapping[str, str] | None = None,
) -> None:
    """One run with an epoch for each (score, upper end of its interval, drift)."""
    new = replace(new_run(name, sweep, root), setting=setting, seed=seed, params=params or {})
    log = tracker.open_run(new)
    for epoch, (score, high, drift) in enumerate(scored, start=1):
        path = root / name / f"{name}-{epoch:06d}.safetensors"
        checkpoint.write(path, {"lora_unet_x.alpha": torch.tensor(score)}, {"ss_output_name": name})
        scores = {BY: score, f"{BY}_hi": high, "val/prior_drift": drift}
        log.log_epoch(Checkpoint(path=path, run=name, epoch=epoch, step=epoch), scores, {})
    log.finish("FINISHED")


def new_run(name: str, sweep: str | None, root: Path) -> NewRun:
    return NewRun(
        name=name,
        sweep=sweep,
        output_dir=root / name,
        params={},
        config_yaml=CONFIG,
        overrides=[],
        image_dir=root / "images",
        dataset_digest="0" * 64,
    )


def test_the_choice_by_rule_is_recorded_and_copied(store: Store) -> None:
    result = store.pick()
    version = store.client.get_model_version_by_alias("style", "best")
    run = store.client.get_run(result.winner.run_id)
    model = store.client.get_logged_model(result.winner.model_id)
    assert (result.winner.name, result.chosen_by) == ("one-e002", "rule")
    assert version.tags["lorasweep.checkpoint"] == "one-e002"
    assert version.source == f"models:/{result.winner.model_id}"
    assert run.data.tags["lorasweep.picked"] == model.tags["lorasweep.picked"] == "one-e002"
    assert run.data.tags["lorasweep.chosen_by"] == "rule"
    trained = store.root / "one" / "one-000002.safetensors"
    assert (result.folder / "one-e002.safetensors").read_bytes() == trained.read_bytes()
    assert (result.folder / "config.yaml").read_text() == CONFIG
    stored = {file.path for file in store.client.list_logged_model_artifacts(model.model_id)}
    assert stored == {"one-e002.safetensors", "config.yaml", "README.md"}


def test_the_readme_names_base_file_prompts_and_clip_skip(store: Store) -> None:
    text = (store.pick().folder / "README.md").read_text()
    for part in ("some/base-model", "one-e002.safetensors", "- a rocket\n- a house", "clip_skip=1"):
        assert part in text
    assert "--w 64" not in text


def test_a_persons_choice_replaces_the_rules_and_is_recorded_as_such(store: Store) -> None:
    by_rule = store.pick().winner
    own = store.pick(run="two", epoch=1)
    version = store.client.get_model_version_by_alias("style", "best")
    assert (own.winner.name, own.chosen_by) == ("two-e001", "person")
    assert version.tags["lorasweep.checkpoint"] == "two-e001"
    assert version.tags["lorasweep.chosen_by"] == "person"
    assert "lorasweep.picked" not in store.client.get_run(by_rule.run_id).data.tags
    assert "lorasweep.picked" not in store.client.get_logged_model(by_rule.model_id).tags


def test_the_rule_takes_a_persons_place_only_if_it_is_told_to(store: Store) -> None:
    store.pick(run="two", epoch=1)
    by_rule = pick_checkpoint.choose(store.settings, store.root, by=BY, sweep="grid")
    assert by_rule.before is not None and by_rule.before.name == "two-e001"
    assert "choice: two-e001, by person" in pick_table.not_recorded(by_rule)[0]
    of_another_sweep = pick_checkpoint.choose(store.settings, store.root, by=BY, sweep="alone")
    for choice in (by_rule, of_another_sweep):  # of which `best` is the alias too
        with pytest.raises(pick_checkpoint.PickError, match="two-e001 is a person's choice"):
            pick_checkpoint.record(choice, store.settings, store.root, replaces=False)
    version = store.client.get_model_version_by_alias("style", "best")
    assert version.tags["lorasweep.checkpoint"] == "two-e001"
    done = pick_checkpoint.record(by_rule, store.settings, store.root, replaces=True)
    assert "takes the place of two-e001, a person's choice" in pick_table.summary(done)[1]
    again = pick_checkpoint.choose(store.settings, store.root, by=BY, sweep="alone")
    pick_checkpoint.record(again, store.settings, store.root, replaces=False)


def test_picking_the_same_twice_makes_no_second_version(store: Store) -> None:
    assert store.pick().version == store.pick().version


def test_candidates_without_a_finite_score_are_left_out_by_name(store: Store) -> None:
    result = store.pick()
    assert result.ranked[0].file.name == "one-e002"
    assert len(result.ranked) == 4
    assert [line.split()[0] for line in result.left_out] == ["one-e003", "two-e003"]


def test_one_of_run_and_epoch_narrows_the_rule(store: Store) -> None:
    result = store.pick(run="two")
    assert (result.winner.name, result.chosen_by) == ("two-e002", "rule")
    assert store.pick(epoch=1).winner.name == "two-e001"


def test_without_a_name_the_newest_sweep_is_picked_from(store: Store) -> None:
    assert store.pick(sweep=None).winner.name == "alone-e001"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"sweep": "gird"}, "there is no sweep gird; there are: alone, grid"),
        ({"run": "three", "epoch": 1}, "there is no run three in sweep grid; there are: one, two"),
        ({"run": "one", "epoch": 9}, "there is no checkpoint of epoch 9; there are: 1, 2, 3"),
        ({"by": "val/los"}, "no checkpoint has a finite val/los"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(
    store: Store, choice: dict[str, str | int], message: str
) -> None:
    with pytest.raises(pick_checkpoint.PickError, match=message) as error:
        store.pick(**choice)
    assert "\n" not in str(error.value)


def test_a_file_that_is_gone_is_named_with_the_remedy(store: Store) -> None:
    path = store.root / "two" / "two-000003.safetensors"
    path.rename(path.with_suffix(".moved"))
    with pytest.raises(tracking.TrackingError, match=r"two-000003.safetensors is gone.*upload=all"):
        store.pick(run="two", epoch=3)


def test_the_table_shows_the_winner_the_ties_and_what_was_left_out(store: Store) -> None:
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(pick_table.table(store.pick(), limit=2))
    text = console.export_text()
    rows = [line for line in text.splitlines() if line.startswith("│")]
    assert [("≈" in row, row.split("│")[2].strip()) for row in rows] == [
        (False, "one"),
        (True, "two"),
    ]
    assert "0.7100" in rows[0]
    assert "2 more" in text
    assert "one-e003 is left out" in text
    assert "held-out image" not in text


@pytest.mark.parametrize(("number", "is_few"), [(4, True), (8, False)])
def test_a_pick_by_few_held_out_images_says_so(store: Store, number: int, is_few: bool) -> None:
    result = store.pick()
    winner = replace(result.winner, terms={BY: [0.7] * number})
    caption = str(pick_table.table(replace(result, winner=winner)).caption)
    assert ("a mean over 4 held-out images only" in caption) == is_few


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="not Linux")
def test_of_20000_candidates_one_is_picked_in_seconds_and_little_memory(tmp_path: Path) -> None:
    """1,000 runs of 20 epochs; 9 s and 290 MB, of which MLflow's import is 1 s and 170 MB."""
    settings = replace(SETTINGS, upload="none")
    with Tracker(settings, tmp_path) as tracker:
        fill(tracker, tmp_path, "best", "grid", [(0.1, 0.11, 0.1)])
    draw = random.Random(0)
    uri = settings.resolve(tmp_path)
    (best,) = tracking.candidates(uri, "e", "grid")
    base = [draw.uniform(0.3, 1.2) for _ in range(16)]
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        (columns,) = zip(
            *database.execute("SELECT name FROM pragma_table_info('runs')"), strict=True
        )
        values = ", ".join("?" if name == "run_uuid" else name for name in columns)
        for number in range(1000):
            run = f"{number:032x}"
            database.execute(
                f"INSERT INTO runs SELECT {values} FROM runs WHERE run_uuid = ?", (run, best.run_id)
            )
            database.execute("INSERT INTO tags VALUES ('lorasweep.sweep', 'grid', ?)", (run,))
            params = [(f"param{one}", "a value", run) for one in range(150)]
            database.executemany("INSERT INTO params VALUES (?, ?, ?)", params)
        for number in range(20_000):
            new, name = f"m-{number:032x}", f"big-{number // 20}-e{number % 20:03d}"
            terms = [round(term + 0.1 + draw.gauss(0, 0.05), 7) for term in base]
            tags = {"checkpoint": name, "terms": json.dumps({BY: terms, "val/loss": terms})}
            database.execute(
                "INSERT INTO logged_models SELECT ?, experiment_id, ?, artifact_location, ?, 1, 2,"
                " lifecycle_stage, model_type, ?, '' FROM logged_models WHERE model_id = ?",
                (new, name, number, f"{number // 20:032x}", best.model_id),
            )
            for key in ("sweep", "run", "epoch", "path", "hash"):
                tags[key] = {"sweep": "grid", "epoch": "1"}.get(key, str(best.path))
            database.executemany(
                "INSERT INTO logged_model_tags VALUES (?, 1, ?, ?)",
                [(new, f"lorasweep.{key}", value) for key, value in tags.items()],
            )
            score = sum(terms) / len(terms)
            database.executemany(
                "INSERT INTO logged_model_metrics (model_id, metric_name, metric_timestamp_ms,"
                " metric_step, metric_value, experiment_id, run_id) VALUES (?, ?, 1, 1, ?, 1, ?)",
                [(new, f"{BY}{end}", score, best.run_id) for end in ("", "_lo", "_hi", "_a", "_b")],
            )
    code = (
        "import re, time\n"
        "from pathlib import Path\n"
        "from lorasweep.cli.main import main\n"
        "try: main(['pick', 'grid', 'tracking.experiment=e', 'output_root=.'])\n"
        "finally:\n"
        "  peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]\n"
        "  print(time.process_time(), int(peak) / 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "best-e001, picked by" in done.stdout, done.stderr
    seconds, megabytes = map(float, done.stdout.splitlines()[-1].split())
    print(seconds, megabytes)
    assert seconds < 25, seconds
    assert megabytes < 340, megabytes


def test_a_pick_takes_no_other_picks_place_and_its_path_tells_the_sweep(tmp_path: Path) -> None:
    settings = replace(SETTINGS, upload="none")
    found = {}
    for sweep, score in (("first", 0.1), ("second", 0.2), ("first", 0.3)):
        with Tracker(settings, tmp_path) as tracker:  # the last one trains the first run anew
            fill(tracker, tmp_path, "same", sweep, [(score, score, 0.1)])
        file = pick(settings, tmp_path, by=BY, sweep=sweep).folder
        assert pick(settings, tmp_path, by=BY, sweep=sweep).folder == file
        found[file.relative_to(tmp_path / "picked").as_posix()] = score
    assert found == {"first/same-e001": 0.1, "second/same-e001": 0.2, "first/same-e001-2": 0.3}
    for folder, score in found.items():
        tensors = load_file(tmp_path / "picked" / folder / "same-e001.safetensors")
        assert tensors["lora_unet_x.alpha"].item() == pytest.approx(score)


def test_of_several_seeds_the_best_one_of_the_best_mean_is_picked(tmp_path: Path) -> None:
    settings = replace(SETTINGS, upload="none")
    with Tracker(settings, tmp_path) as tracker:
        for number, (rank, scores) in enumerate(((4, (0.5, 0.9, 0.6)), (16, (0.58, 0.62, 0.6)))):
            for seed, score in enumerate(scores):
                name = f"r-{number * 3 + seed}"
                values = {
                    "adapter.rank": f"{rank}",
                    "adapter.alpha": f"{rank / 2}",
                    "seed": f"{seed}",
                }
                row = [(score, score, 0.1)]
                fill(tracker, tmp_path, name, "s", row, f"rank {rank}", seed, values)
        fill(tracker, tmp_path, "older", "s", [(0.7, 0.7, 0.1)])  # whose seed isn't known
    result = pick(settings, tmp_path, by=BY)
    assert [one.scores[BY] for one in result.ranked] == pytest.approx([0.6, 2 / 3, 0.7])
    assert (result.winner.name, result.winner.seed) == ("r-3-e001", "0")
    text = (result.folder / "README.md").read_text()
    assert f"{BY} = 0.5800." in text
    assert f"seed 0 of 0, 1, 2, over which {BY} is 0.6000 on average [0.5503, 0.6497]" in text
    assert "r-3-e001, picked by val/loss_rel, seed 0 of 0, 1, 2: " in pick_table.summary(result)[0]
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(pick_table.table(result))
    rows = [line for line in console.export_text().splitlines() if line.startswith("│")]
    # alpha goes with the rank
    assert [[cell.strip() for cell in row.split("│")[2:6]] for row in rows] == [
        ["r-3", "16", "1", "0.6000 [0.55, 0.65]"],
        ["r-0", "4", "1", "0.6667 [0.15, 1.18]"],
        ["older", "", "1", "0.7000"],
    ]
    assert [row.split("│")[-2].strip() for row in rows] == ["0, 1, 2", "0, 1, 2", ""]
    # of one run the rule sees no other seeds
    assert pick(settings, tmp_path, by=BY, run="r-1").winner.run == "r-1"


def test_a_pick_by_the_score_tells_of_captions_and_lies_beside_base_and_runner_up(
    tmp_path: Path,
) -> None:
    """The run whose loss is best has stopped listening, and drew no pictures of this epoch."""
    scored = {"deaf": (0.34, 0.02, 0.4), "good": (0.41, 0.36, 0.3), "next": (0.42, 0.3, 0.3)}
    with Tracker(SETTINGS, tmp_path) as tracker:
        for shade, (name, (loss, gain, drift)) in enumerate(scored.items(), start=1):
            log = tracker.open_run(new_run(name, "s", tmp_path))
            drawn = [
                {f"{n:02d} {prompt}": picture(tmp_path / name / f"{at}{n}.png", 60 * shade + at)}
                for at in (0, 20)
                for n, prompt in enumerate(["a rocket", "a house"])
            ]
            of_base = {"val/loss_rel": 1.0, "val/caption_gain": 0.12, "val/score": 0.88}
            log.log_base(of_base, {**drawn[0], **drawn[1]})
            path = tmp_path / name / f"{name}-000001.safetensors"
            checkpoint.write(path, {"lora_unet_x.alpha": torch.tensor(loss)}, {})
            scores = {
                "val/score": loss - gain,
                BY: loss,
                "val/caption_gain": gain,
                "val/caption_gain_lo": gain - 0.1,
                "val/prior_drift": drift,
            }
            one = Checkpoint(path=path, run=name, epoch=1, step=1)
            log.log_epoch(one, scores, {} if name == "deaf" else {**drawn[2], **drawn[3]})
            log.finish("FINISHED")
    result = pick(SETTINGS, tmp_path, by="val/score")
    assert (result.winner.name, result.by) == ("good-e001", "val/score")
    listens = "Listens to captions: 3.0x the base's (val/caption_gain 0.36, the base's 0.12)"
    assert result.notes == [listens]
    sheet = result.folder / "comparison.png"
    said = pick_table.summary(result)
    assert said[1:3] == [listens, f"Beside the base and the next best: {sheet}"]
    text = (result.folder / "README.md").read_text()
    assert "chosen by rule (the best val/score)" in text
    assert "3.0x the base's" in text
    client = MlflowClient(SETTINGS.resolve(tmp_path))
    stored = client.list_logged_model_artifacts(result.winner.model_id)
    assert "comparison.png" in {file.path for file in stored}
    with Image.open(sheet) as image:  # of cells of 128 pixels and gaps of 6
        columns = [image.width - 204, image.width - 70]
        heights = [image.height - 70 - 134 * above for above in (2, 1, 0)]
        shades = [[image.getpixel((x, y))[0] for x in columns] for y in heights]
    assert shades == [[120, 120], [140, 140], [200, 200]]  # the base, the pick and the next best

    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(pick_table.table(result))
    table = console.export_text()
    assert "val/score = loss - gain" in " ".join(table.split())
    assert all(word in table for word in ("loss", "gain", "drift", "0.0500", "0.410", "0.360"))

    by_loss = pick_checkpoint.choose(SETTINGS, tmp_path, by=BY)
    (_, warning, _) = pick_table.not_recorded(by_loss)
    assert warning.startswith(
        "Warning: deaf-e001 listens to captions less than the bare base (0.02"
    )
    assert "the best without: good-e001" in warning
    # a choice whose epoch drew nothing has no picture to lie beside others
    own = pick(SETTINGS, tmp_path, by="val/score", run="deaf", epoch=1)
    assert not (own.folder / "comparison.png").exists()


def picture(path: Path, shade: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), (shade, shade, shade)).save(path)
    return path


def test_runs_without_the_score_are_ranked_by_their_loss_and_that_is_said(store: Store) -> None:
    result = store.pick(by="val/score")
    assert (result.winner.name, result.by) == ("one-e002", BY)
    assert result.notes[0].startswith("Ranked by val/loss_rel: some have no val/score")
    assert "one-e002, picked by val/loss_rel: " in pick_table.summary(result)[0]


def test_what_was_deleted_in_mlflow_is_not_chosen(tmp_path: Path) -> None:
    settings = replace(SETTINGS, upload="none")
    with Tracker(settings, tmp_path) as tracker:
        fill(tracker, tmp_path, "good", "s", [(0.1, 0.11, 0.1)])
        fill(tracker, tmp_path, "fair", "s", [(0.5, 0.51, 0.1)])
        fill(tracker, tmp_path, "alone", None, [(0.3, 0.31, 0.1)])
    uri = settings.resolve(tmp_path)
    client = MlflowClient(uri)
    by_name = {one.run: one.run_id for one in tracking.candidates(uri, "e")}
    client.delete_run(by_name["good"])
    client.delete_run(by_name["alone"])
    result = pick(settings, tmp_path, by=BY)  # the newest sweep that is there
    assert [one.file.run for one in result.ranked] == ["fair"]
    assert [one.run for one in tracking.candidates(uri, "e")] == ["fair"]
    with pytest.raises(pick_checkpoint.PickError, match=r"no sweep alone; there are: s$"):
        pick(settings, tmp_path, by=BY, sweep="alone")
    client.restore_run(by_name["good"])
    assert pick(settings, tmp_path, by=BY).winner.run == "good"


def test_an_experiment_that_was_renamed_or_deleted_is_said(tmp_path: Path) -> None:
    with Tracker(SETTINGS, tmp_path) as tracker:
        fill(tracker, tmp_path, "a", "s", [(0.1, 0.11, 0.1)])
    client = MlflowClient(SETTINGS.resolve(tmp_path))
    experiment = client.get_experiment_by_name("e").experiment_id
    client.rename_experiment(experiment, "renamed")
    with pytest.raises(tracking.TrackingError, match="there are: renamed"):
        pick(SETTINGS, tmp_path, by=BY)
    settings = replace(SETTINGS, experiment="renamed")
    assert pick(settings, tmp_path, by=BY).winner.run == "a"
    client.delete_experiment(experiment)
    said = f"was deleted in MLflow; .*restore -x {experiment}"
    with pytest.raises(tracking.TrackingError, match=said):
        pick(settings, tmp_path, by=BY)
    with pytest.raises(tracking.TrackingError, match=said), Tracker(settings, tmp_path) as tracker:
        tracker.ready(tmp_path / "b", "other")
    assert not (tmp_path / "b").exists()
