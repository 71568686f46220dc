"""A logged run is made again from its log alone, and what differs is told."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from conftest import FEW, SMALL
from lorasweep.cli import main
from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose
from lorasweep.config.conf_folder import PACKAGE
from lorasweep.lora_files import checkpoint
from lorasweep.reproduce import (
    differences,
    logged_settings,
    original_images,
    reproduce,
    reproduce_run,
    same_pack,
)
from lorasweep.reproduce.compare import ROUNDING, by_module, compare
from lorasweep.reproduce.original_run import ReproduceError, find_original
from lorasweep.reproduce.reproduce_run import Options
from lorasweep.runs import prepare as preparation
from lorasweep.runs import provenance
from lorasweep.runs import session as runs
from lorasweep.tracking.history import Log

pytestmark = pytest.mark.usefixtures("shared_base")
DEMO_IMAGES = PACKAGE / "embedded" / "demo_images"
PACK = (("adapter.rank=4", "seed=1"), ("adapter.rank=2", "seed=2", "lr_scheduler=cosine"))


def build(root, cache_dir, number, *overrides):
    cfg = compose([*SMALL, FEW, f"output_root={root}", f"cache_dir={cache_dir}", *overrides])
    return build_run(
        cfg, output_dir=root / "s" / str(number), overrides=overrides, sweep="s", number=number
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_dir):
    """Two runs of one pack, one caption edited by hand before, whose images are logged; then all
    that is not the store is moved away."""
    root = tmp_path_factory.mktemp("trained")
    options = ("dataset.log_images=true", "tracking.upload=none")
    pack = [build(root, cache_dir, n, *of, *options) for n, of in enumerate(PACK)]
    folder = preparation.write_folders(pack[0]) / "train" / "1_wd"
    edited = min(folder.glob("*.txt"))
    edited.write_text("a caption of my own\n")
    left_out = max(folder.glob("*.png"))
    left_out.unlink()
    left_out.with_suffix(".txt").unlink()
    assert not [report for report in runs.run_pack(pack) if isinstance(report, runs.Failure)]
    kept = tmp_path_factory.mktemp("kept")
    for name in ("s", "datasets"):
        shutil.move(root / name, kept / name)
    log = Log(f"sqlite:///{root / 'mlflow.db'}", "lorasweep")
    return SimpleNamespace(
        root=root, log=log, kept=kept, edited=edited.stem, left_out=left_out.name, run=pack[0]
    )


@pytest.fixture(scope="module")
def places(trained, cache_dir):
    """Where things are here: no image of it."""
    empty = trained.root / "empty"
    empty.mkdir()
    return (
        f"output_root={trained.root}",
        f"cache_dir={cache_dir}",
        f"dataset.image_dir={empty}",
    )


def again(trained, places, word="demo-0", **options):
    plan = reproduce_run.prepare(
        find_original(word, trained.log), Options(places=places, **options)
    )
    reproduce_run.train(plan)
    return plan, *reproduce_run.judge(plan)


@pytest.fixture(scope="module")
def in_its_pack(trained, places):
    return again(trained, places, same_pack=True)


@pytest.fixture(scope="module")
def alone(trained, places):
    """Alone, with the old checkpoints back in their place."""
    shutil.copytree(trained.kept / "s", trained.root / "s")
    try:
        return again(trained, places)
    finally:
        shutil.rmtree(trained.root / "s")


def rows(result):
    return {row.what: row for row in result.rows}


def test_the_store_alone_gives_bit_equal_runs_in_the_same_pack(in_its_pack):
    plan, _, result = in_its_pack
    assert result.verdict == "bit-equal"
    assert {row.verdict for row in result.rows} == {"bit-equal"}
    assert "6 in the log" in " ".join(plan.notes)
    assert [one for one in plan.differences if one.what != "code (lorasweep)"] == []


def test_captions_edited_and_images_left_out_by_hand_are_so_again(in_its_pack, trained):
    plan, new, _ = in_its_pack
    texts = json.loads((plan.run.output_dir / "captions.json").read_text())["train"]["1_wd"]
    assert "a caption of my own" in texts.values()
    assert trained.left_out not in texts
    assert len(texts) == 3
    assert json.loads(trained.log.text(new, "captions.json"))["train"]["1_wd"] == texts


def test_alone_it_is_the_same_within_the_stated_rounding(alone):
    plan, _, result = alone
    found = rows(result)
    assert result.verdict in ("bit-equal", "within rounding"), found  # some CPUs round alike
    assert found["losses"].numbers["steps"] == 8
    if found["weights"].verdict != "bit-equal":
        assert 0 < found["weights"].numbers["relative"] < ROUNDING
        assert "lora_unet_mid_block_attentions_0_proj_in" in found["weights"].numbers["modules"]
    assert "pack" in [one.what for one in plan.differences]


def test_the_new_run_points_at_the_old_and_has_the_verdict(alone, trained):
    plan, new, result = alone
    (tagged,) = trained.log.named(new.name, new.sweep)
    assert tagged.tags["lorasweep.reproduces"] == plan.original.run.run_id
    assert tagged.tags["lorasweep.reproduction"] == result.verdict
    report = json.loads(trained.log.text(tagged, "reproduction.json"))
    assert report["original"]["run"] == "demo-0"
    assert {row["what"] for row in report["rows"]} == {"losses", "weights", "pictures", "scores"}


def test_a_renamed_file_finds_its_run_and_is_trained_up_to_its_epoch(
    trained, places, tmp_path, capsys
):
    file = tmp_path / "renamed.safetensors"
    shutil.copyfile(trained.kept / "s" / "1" / "demo-1-000001.safetensors", file)
    plan, new, result = again(trained, places, str(file))
    assert (plan.original.run.name, plan.original.until) == ("demo-1", 1)
    assert list(trained.log.checkpoints(new)) == [1]
    assert rows(result)["weights"].numbers.get("relative", 0.0) < ROUNDING
    assert rows(result)["weights"].verdict != "not known"
    assert rows(result)["losses"].numbers["steps"] == 4


def test_a_file_without_its_metadata_finds_its_run_too(trained, tmp_path):
    from safetensors.torch import save_file

    tensors, _ = checkpoint.read(trained.kept / "s" / "1" / "demo-1-000002.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    found = find_original(str(tmp_path / "bare.safetensors"), trained.log)
    assert (found.run.name, found.until) == ("demo-1", 2)


def test_weights_whose_file_is_gone_are_not_called_equal(trained, alone):
    _, new, _ = alone
    (old, *_) = trained.log.named("demo-0")
    result = compare(trained.log, old, new, trained.root)  # the old checkpoints are away again
    row = rows(result)["weights"]
    if row.verdict != "bit-equal":
        assert row.verdict == "not known"
        assert "demo-0-e002's file is gone" in row.detail
        assert result.verdict == "within rounding"


def test_a_variation_follows_confs_rules_and_names_its_parent(trained, places, capsys):
    options = Options(places=places, overrides=["adapter.rank=8", "trainer.max_train_epochs=1"])
    console = Console(width=200)
    assert reproduce.execute("demo-1", trained.log.uri, "lorasweep", options, console) == 0
    said = capsys.readouterr().out
    assert "adapter.alpha follows: 4.0" in said
    assert "val/loss_rel" in said
    (new,) = trained.log.named("demo-1-variation")
    (old, *_) = trained.log.named("demo-1")
    assert new.tags["lorasweep.parent"] == old.run_id
    assert "lorasweep.reproduces" not in new.tags
    values = trained.log.text(new, "config.yaml")
    assert "rank: 8\n  alpha: 4.0" in values


def test_as_config_writes_a_folder_that_trains_the_same(trained, places, tmp_path, cache_dir):
    original = find_original("demo-0", trained.log)
    folder = tmp_path / "mine"
    file, notes = reproduce_run.write_config(original, Options(places=places), folder)
    assert notes == []
    assert sorted(path.name for path in (folder / "images").iterdir())
    cfg = compose([f"experiment={file.stem}", f"output_root={tmp_path / 'out'}"], folder)
    run = build_run(cfg, output_dir=tmp_path / "run")
    logged = trained.run
    assert (run.adapter, run.optimizer, run.sampling) == (
        logged.adapter,
        logged.optimizer,
        logged.sampling,
    )
    texts = json.loads(preparation.captions_used(run, preparation.write_folders(run)))
    assert texts["train"]["1_wd"][f"{trained.edited}.png"] == "a caption of my own"


def test_a_config_holds_no_secret_of_the_tracking_uri(trained, places, tmp_path, monkeypatch):
    original = find_original("demo-0", trained.log)
    secret = (*places, "tracking.uri=postgresql://me:hunter2@localhost/x")
    reproduce_run.write_config(original, Options(places=secret), tmp_path)
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.suffix in (".yaml", ".jsonl")]
    assert texts
    assert not [text for text in texts if "hunter2" in text or "tracking" in text]


def test_strict_stops_at_a_difference_before_anything_is_trained(trained, places, capsys):
    options = Options(places=places, strict=True)
    before = len(trained.log.names()), sorted(trained.root.glob("*-reproduced/*"))
    with pytest.raises(ReproduceError, match="--strict: "):
        reproduce.execute("demo-0", trained.log.uri, "lorasweep", options, Console(width=200))
    assert "trained together with demo-1" in capsys.readouterr().out
    assert (len(trained.log.names()), sorted(trained.root.glob("*-reproduced/*"))) == before


def test_another_model_library_and_device_are_told(trained, places, monkeypatch):
    origin = json.loads(trained.log.text(trained.log.named("demo-0")[0], "origin.json"))
    then = json.loads(json.dumps(origin))
    then["versions"]["torch"] = "1.0"
    then["device"]["name"] = "an abacus"
    then["model"]["files"]["unet/config.json"] = then["model"]["sha256"] = "f" * 64
    then["code"] = [{"what": "lorasweep", "commit": "c" * 40, "dirty": False, "diff_sha256": None}]
    found = differences.from_origin(then, trained.run)
    told = {one.what: (one.then, one.now) for one in found}
    assert told["torch"] == ("1.0", origin["versions"]["torch"])
    assert told["device: name"][0] == "an abacus"
    assert "unet/config.json" in told["base model"][1]
    assert told["code (lorasweep)"][0] == "commit cccccccccccc"
    unchanged = differences.from_origin(origin, trained.run)
    assert [one for one in unchanged if one.what != "code (lorasweep)"] == []


def test_captions_made_again_are_compared_with_the_log(trained, places):
    original = find_original("demo-0", trained.log)
    plan = reproduce_run.prepare(original, Options(places=places, recaption=True))
    (told,) = [one for one in plan.differences if one.what.startswith("captions.wd")]
    assert told.what == "captions.wd: 1 of 6"  # the one that was edited by hand
    assert "a caption of my own" in told.then


def test_missing_images_are_named(trained, tmp_path):
    manifest = dict(find_original("demo-0", trained.log).manifest)
    with pytest.raises(ReproduceError) as error:
        original_images.find_images(manifest, tmp_path, None, tmp_path / "spare")
    assert "6 of its 6 images are not in" in str(error.value)
    assert all(image["file"] in str(error.value) for image in manifest["images"])
    assert "dataset.log_images=true" in str(error.value)


def test_images_under_other_names_are_found_by_content(trained, tmp_path):
    manifest = find_original("demo-0", trained.log).manifest
    for number, image in enumerate(manifest["images"]):
        shutil.copyfile(DEMO_IMAGES / image["file"], tmp_path / f"{number}.png")
    found = original_images.find_images(manifest, tmp_path, None, tmp_path)
    assert str(found) == "6 under other names"
    assert [image.name for image in found.images] == [one["file"] for one in manifest["images"]]


def test_words_that_mean_no_run_list_those_there_are(trained):
    with pytest.raises(ReproduceError, match=r"nobody is neither.*demo-0"):
        find_original("nobody", trained.log)


def test_a_variation_may_train_longer_and_on_fewer_images(trained, places):
    changes = ["trainer.max_train_epochs=5", "dataset.num_images=2"]
    original = find_original("demo-0", trained.log)
    plan = reproduce_run.prepare(original, Options(places=places, overrides=changes))
    assert len(plan.schedule.epochs) == 5
    assert plan.run.dataset.num_images == 2
    with pytest.raises(ReproduceError, match="captions can't be swapped"):
        reproduce_run.prepare(original, Options(places=places, overrides=["captions=[empty]"]))


def test_a_variation_may_swap_a_whole_option(trained, places):
    original = find_original("demo-0", trained.log)
    plan = reproduce_run.prepare(original, Options(places=places, overrides=["adapter=loha"]))
    assert type(plan.run.adapter).__name__ == "LoHa"


def test_a_setting_that_changes_the_training_is_an_override():
    with pytest.raises(ReproduceError, match=r"--override adapter\.rank=8"):
        logged_settings.check_places(["output_root=x", "adapter.rank=8"])


def test_a_misspelt_override_is_refused_with_the_setting_that_is_meant(trained, places, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["reproduce", "demo-0", *places, "--override", "adapter.rnk=8"])
    assert end.value.code == 2
    assert "did you mean adapter.rank" in capsys.readouterr().err


def test_settings_of_a_later_lorasweep_are_filled_in_and_told(trained, places):
    text = trained.log.text(trained.log.named("demo-0")[0], "config.yaml")
    older = "".join(line for line in text.splitlines(True) if "log_images" not in line)
    found = logged_settings.rebuild(older, places)
    assert found.filled == {"dataset.log_images": False}
    assert found.values["dataset"]["log_images"] is False


@pytest.mark.parametrize("key", ["reg_data_dir", "conditioning_data_dir"])
def test_what_is_not_laid_out_again_is_said(key, trained, places):
    text = trained.log.text(trained.log.named("demo-0")[0], "config.yaml")
    with pytest.raises(ReproduceError, match="not laid out again"):
        logged_settings.rebuild(text.replace(f"{key}: null", f"{key}: there"), places)


ROLLING = {
    1: {"members": [["a", 3], ["me", 1]], "failed": []},
    2: {"members": [["a", 4], ["me", 2], ["b", 1]], "failed": []},
    3: {"members": [["me", 3], ["b", 2]], "failed": ["c"]},
}


def test_companions_join_and_leave_when_they_did():
    schedule = same_pack.together(ROLLING, "me", 3)
    assert [(list(r.joining), list(r.leaving)) for r in schedule.epochs] == [
        (["a"], []),  # its first two epochs, before the run came
        ([], []),
        (["me"], []),
        (["b"], []),
        (["c"], ["a"]),
    ]
    assert schedule.names == ["me", "a", "b", "c"]
    assert "a had begun before it" in schedule.caveats[0]
    assert "c broke off inside an epoch" in schedule.caveats[1]


def test_a_companion_that_is_gone_from_the_log_leaves_its_place_empty():
    schedule = same_pack.together(ROLLING, "me", 2, gone=["b"])
    assert all("b" not in one.joining for one in schedule.epochs)
    assert "b, of its pack, is no longer logged" in schedule.caveats[0]


@pytest.mark.slow
def test_a_run_that_joined_a_pack_later_is_bit_equal_in_it(tmp_path, cache_dir):
    options = ("optimizer.text_encoder_lr=0", f"dataset.image_dir={DEMO_IMAGES}")
    pack = [
        build(tmp_path, cache_dir, n, f"trainer.max_train_epochs={epochs}", f"seed={n}", *options)
        for n, epochs in enumerate((1, 3, 2))
    ]
    with runs.Session(pack[0]) as session:
        for number, _ in enumerate(session.train(pack[:2])):
            if number == 1:  # the first epoch: the shortest has ended
                session.join(pack[2])
    log = Log(f"sqlite:///{tmp_path / 'mlflow.db'}", "lorasweep")
    places = (f"output_root={tmp_path}", f"cache_dir={cache_dir}")
    shutil.rmtree(tmp_path / "s")
    plan = reproduce_run.prepare(
        find_original("demo-2", log), Options(places=places, same_pack=True)
    )
    reproduce_run.train(plan)
    _, result = reproduce_run.judge(plan)
    assert plan.schedule.names == ["demo-2", "demo-1"]
    assert {row.verdict for row in result.rows} == {"bit-equal"}


def test_relative_differences_are_by_module():
    old = {"x.lora_up.weight": torch.ones(2, 2), "y.lora_up.weight": torch.ones(2)}
    new = {"x.lora_up.weight": torch.ones(2, 2) * 1.1, "y.lora_up.weight": torch.ones(2)}
    modules, total = by_module(old, new)
    assert modules["y"] == 0
    assert modules["x"] == pytest.approx(0.1)
    assert total == pytest.approx(0.1 * (4 / 6) ** 0.5)
    assert by_module(old, {**new, "y.lora_up.weight": torch.ones(3)})[0]["y"] == float("inf")


def test_a_file_of_weights_is_hashed_once_and_again_when_it_changes(tmp_path, cache_dir):
    from lorasweep.core.settings import build as build_component

    folder = tmp_path / "model"
    shutil.copytree(PACKAGE / "embedded" / "base_model", folder)
    cfg = compose(["experiment=demo", f"model.path={folder}"])
    model = build_component(cfg.model, "model")
    first = provenance.identity(model, tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    known = json.loads((tmp_path / "file_hashes.json").read_text())
    known[str(file.resolve())][2] = "0" * 64
    (tmp_path / "file_hashes.json").write_text(json.dumps(known))
    name = "unet/diffusion_pytorch_model.safetensors"
    assert provenance.identity(model, tmp_path)["files"][name] == "0" * 64  # taken from the cache
    file.write_bytes(file.read_bytes() + b" ")
    third = provenance.identity(model, tmp_path)
    assert third["files"][name] not in ("0" * 64, first["files"][name])
    assert third["sha256"] != first["sha256"]


def test_companions_are_kept_across_a_broken_off_process(tmp_path):
    for epoch in (1, 2, 3):
        provenance.note_companions(tmp_path, "me", [("me", epoch), ("x", epoch)], [])
    path = provenance.note_companions(tmp_path, "me", [("me", 2)], ["x"])
    found = provenance.read_pack(path.read_text())
    assert found == {
        1: {"members": [["me", 1], ["x", 1]], "failed": []},
        2: {"members": [["me", 2]], "failed": ["x"]},
    }


def test_uncommitted_changes_are_kept_with_the_run(tmp_path, monkeypatch):
    def commit(*words):
        assert (
            provenance.git(tmp_path, "-c", "user.name=x", "-c", "user.email=x@x", *words)
            is not None
        )

    commit("init")
    Path(tmp_path / "notes.txt").write_text("one\n")
    commit("add", ".")
    commit("commit", "-m", "one")
    monkeypatch.chdir(tmp_path)
    provenance.sources.cache_clear()
    try:
        (clean,) = [one for one in provenance.sources() if one["what"] == "started in"]
        assert not clean["dirty"]
        Path(tmp_path / "notes.txt").write_text("two\n")
        provenance.sources.cache_clear()
        (dirty,) = [one for one in provenance.sources() if one["what"] == "started in"]
        assert dirty["dirty"]
        assert "+two" in dirty["diff"]
        assert dirty["commit"] == clean["commit"]
    finally:
        provenance.sources.cache_clear()
