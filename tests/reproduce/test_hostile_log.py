"""A log that somebody else has written makes nothing run, leaks nothing and writes nowhere else.

Every test tries one door of a store that the fixture `store` makes: runs that never trained, with
the files that a run logs, some of which are hostile.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
import zipfile
from types import SimpleNamespace

import pytest
import yaml
from mlflow import MlflowClient

from command_line import exit_code
from conftest import SMALL
from lorasweep.config.build_run import build_run
from lorasweep.config.compose import compose, literal
from lorasweep.config.conf_folder import PACKAGE, conf_dir
from lorasweep.reproduce import original_images, reproduce_run, trusted_settings
from lorasweep.reproduce.logged_settings import rebuild
from lorasweep.reproduce.original_run import ReproduceError, find_original
from lorasweep.reproduce.reproduce_run import Options
from lorasweep.runs import prepare as preparation
from lorasweep.tracking.history import Log
from lorasweep.tracking.store import RUN_TAG, SWEEP_TAG, create_store

SECRET = "hunter2-of-this-machine"
LEAK = "${oc.env:SECRET_OF_THIS_MACHINE}"
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
PICKLE = b"\x80\x04cposix\nsystem\n(S'touch PWNED'\ntR."


@pytest.fixture(scope="module")
def store(tmp_path_factory, cache_dir):
    """A store, what a run logs into it, and a way to log a run that differs from that."""
    root = tmp_path_factory.mktemp("store")
    cfg = compose([*SMALL, f"output_root={root / 'theirs'}", f"cache_dir={cache_dir}"])
    run = build_run(cfg, output_dir=root / "theirs" / "run")
    data = preparation.write_folders(run)
    files = {
        "config.yaml": yaml.safe_load(run.config_yaml),
        "manifest.json": json.loads((data / "manifest.json").read_text()),
        "captions.json": json.loads(preparation.captions_used(run, data)),
        "overrides.yaml": [],
        "pack.json": {"1": {"members": [["x", 1]], "failed": []}},
        "origin.json": None,
    }
    uri = f"sqlite:///{root / 'mlflow.db'}"
    experiment = create_store(uri, "lorasweep", root / "mlartifacts")
    client = MlflowClient(uri)
    numbers = iter(range(1000))

    def logged(name=None, *, sweep="s", archive=None, **changed):
        """A run that failed in its first epoch; `config_yaml` is a text or a change of its values.

        Returns its id in MLflow.
        """
        name = f"r{next(numbers)}" if name is None else name
        tags = {RUN_TAG: name, SWEEP_TAG: sweep}
        made = client.create_run(experiment, tags=tags).info.run_id
        for file, content in files.items():
            content = json.loads(json.dumps(content))
            change = changed.pop(file.replace(".", "_"), None)
            if callable(change):
                change(content)
            elif change is not None:
                content = change
            if file == "pack.json" and change is None:
                content = {"1": {"members": [[name, 1]], "failed": []}}
            dump = yaml.safe_dump if file == "config.yaml" else json.dumps
            client.log_text(made, content if isinstance(content, str) else dump(content), file)
        assert not changed
        if archive is not None:
            client.log_artifact(made, str(archive))
        client.set_terminated(made, "FAILED")
        return made

    return SimpleNamespace(uri=uri, root=root, log=Log(uri, "lorasweep"), run=logged, files=files)


@pytest.fixture
def here(tmp_path, monkeypatch, cache_dir, store):
    """The folder in which the command is given; its output_root does not exist yet."""
    home = tmp_path / "here"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("SECRET_OF_THIS_MACHINE", SECRET)
    monkeypatch.setenv("COLUMNS", "200")
    places = (f"tracking.uri={store.uri}", "output_root=out", f"cache_dir={cache_dir}")
    return SimpleNamespace(home=home, tmp=tmp_path, places=places)


def refused(here, capsys, *words):
    """The one line with which `reproduce` refuses; nothing of it stays."""
    before = sorted(here.tmp.rglob("*"))
    assert exit_code("reproduce", *words, *here.places) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("lorasweep: ")
    assert "\x1b" not in said.out + said.err
    assert SECRET not in said.out + said.err
    left = [path for path in here.tmp.rglob("*") if path not in before]
    assert left == []
    return said.err


def prepared(store, here, run_id, **options):
    original = find_original(run_id, store.log)
    return reproduce_run.prepare(original, Options(places=here.places, **options))


def texts(folder):
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def test_an_honest_log_is_made_ready(store, here):
    plan = prepared(store, here, store.run())
    assert plan.run.sampling.prompts == ("a high contrast icon of a rocket",)
    assert (plan.home / "images").is_dir()


def leaking(config):
    config["sampling"]["prompts"] = [LEAK, f"\\{LEAK}", f"a\\\\{LEAK} ${{name}}"]
    config["tracking"]["registered_model"] = "\\${name}"
    config["optimizer"]["args"]["note"] = {"deep": [LEAK]}
    config["dataset"]["image_dir"] = LEAK


def captions_that_leak(captions):
    first = next(iter(captions["train"].values()))
    first[min(first)] = LEAK


def archive_of(store, folder):
    path = folder / "originals.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for image in store.files["manifest.json"]["images"]:
            file = PACKAGE / "embedded" / "demo_images" / image["file"]
            packed.writestr(image["sha256"], file.read_bytes())
    return path


def test_what_looks_like_a_variable_is_text_wherever_it_is_logged(store, here):
    run_id = store.run(
        config_yaml=lambda config: (leaking(config), config["optimizer"]["args"].clear()),
        captions_json=captions_that_leak,
        overrides_yaml=[f"name={LEAK}"],
        archive=archive_of(store, here.tmp),
    )
    plan = prepared(store, here, run_id)
    wanted = yaml.safe_load(plan.run.config_yaml)
    assert wanted["sampling"]["prompts"] == [LEAK, f"\\{LEAK}", f"a\\\\{LEAK} ${{name}}"]
    assert plan.run.sampling.prompts[0] == LEAK
    assert plan.run.tracking.registered_model == "\\${name}"
    assert SECRET not in repr(plan) + texts(here.tmp)
    assert LEAK in (plan.home / "captions.jsonl").read_text()


def test_what_looks_like_a_variable_is_text_in_a_variation_too(store, here):
    run_id = store.run(
        config_yaml=lambda config: config["sampling"].update(prompts=[LEAK]),
        overrides_yaml=[f"name={LEAK}"],
    )
    plan = prepared(store, here, run_id, overrides=["adapter.rank=8"])
    assert (plan.run.sampling.prompts, plan.run.adapter.rank) == ((LEAK,), 8)
    with pytest.raises(ValueError, match=r"optimizer\.args|refuses"):
        prepared(store, here, store.run(config_yaml=leaking), overrides=["adapter.rank=8"])
    assert SECRET not in repr(plan) + texts(here.tmp)


def test_a_written_config_has_no_variables_of_the_logs_words(store, here):
    sweep = f"s\nhydra:\n  callbacks: {LEAK}\n# @package hydra"
    run_id = store.run(config_yaml=lambda c: c["sampling"].update(prompts=[LEAK]), sweep=sweep)
    folder = here.home / "mine"
    original = find_original(run_id, store.log)
    file, _ = reproduce_run.write_config(original, Options(places=here.places), folder)
    cfg = compose([f"experiment={file.stem}"], folder)
    assert list(cfg.sampling.prompts) == [LEAK]
    assert "hydra" not in yaml.safe_load(file.read_text())
    assert SECRET not in texts(folder)


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "", "a/b", "x\0y", "n" * 300, ESCAPE])
def test_a_runs_name_that_leads_elsewhere_is_refused(name, store, here, capsys):
    assert "use " in refused(here, capsys, store.run(name))


def test_companions_are_not_made_where_their_names_lead(store, here, capsys):
    store.run("../../companion")
    pack = {"1": {"members": [["me", 1], ["../../companion", 1]], "failed": []}}
    said = refused(here, capsys, store.run("me", pack_json=pack), "--same-pack")
    assert "../../companion-reproduced" in said


def image(**changed):
    return lambda manifest: manifest["images"][0].update(changed)


@pytest.mark.parametrize(
    "change",
    [
        image(file="../../x.png"),
        image(file="/tmp/x.png"),
        image(file="a\0b"),
        image(file=3),
        image(split="../../.."),
        image(copy="images/../../../x"),
        image(copy="images/*"),
        image(sha256="0"),
        image(width="wide"),
        image(captions={}),
        image(captions={"empty": ["x"]}),
        lambda manifest: manifest.update(arms={"../../x": {"repeats": 1}}),
        lambda manifest: manifest["arms"]["wd"].update(repeats=10**9),
        lambda manifest: manifest.update(images=[]),
        lambda manifest: manifest["images"].append(manifest["images"][0]),
        "[1, 2]",
        "{",
        "[" * 100_000,
        "",
    ],
)
def test_a_manifest_of_another_shape_is_refused(change, store, here, capsys):
    assert "manifest.json" in refused(here, capsys, store.run(manifest_json=change))


def test_nothing_is_deleted_where_a_manifest_leads(tmp_path):
    data = tmp_path / "data"
    (data / "train" / "1_wd").mkdir(parents=True)
    for name in ("a.png", "a.txt", "b.png", "b.txt"):
        (data / "train" / "1_wd" / name).touch()
    original_images.take_out(data, ["train/1_wd/*.png", "train/1_wd/a.png"])
    assert sorted(path.name for path in data.rglob("*.*")) == ["b.png", "b.txt"]


@pytest.mark.parametrize(
    ("file", "content", "options"),
    [
        ("captions_json", '{"train": [1]}', ()),
        ("captions_json", "[]", ()),
        ("captions_json", '{"train": {"1_wd": {"a.png": null}}}', ()),
        ("overrides_yaml", '{"a": 1}', ("--override", "adapter.rank=8")),
        ("overrides_yaml", "[1]", ("--override", "adapter.rank=8")),
        ("pack_json", "[]", ()),
        ("pack_json", '{"x": {}}', ()),
        ("pack_json", '{"1": {"members": [["x"]], "failed": []}}', ()),
        ("pack_json", '{"1": {"members": [["x", 1e99]], "failed": []}}', ()),
        ("origin_json", '{"model": {"sha256": 1}}', ()),
        ("origin_json", '{"device": {"threads": -1}}', ()),
        ("origin_json", "[]", ()),
        ("config_yaml", "- 1", ()),
        ("config_yaml", "model: 1", ()),
        ("config_yaml", "a: [1", ()),
        ("config_yaml", "a: &a [*a]", ()),
        ("config_yaml", "\x00", ()),
    ],
)
def test_a_logged_file_of_another_shape_is_one_line(file, content, options, store, here, capsys):
    said = refused(here, capsys, store.run(**{file: content}), *options)
    assert file.replace("_", ".") in said


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["model"].update(defaults=[{"/hydra/callbacks": "x"}]),
        lambda c: c["captions"].update(defaults=["/dataset: folder"]),
        lambda c: c["captions"].update({"../x": c["captions"].pop("wd")}),
        lambda c: c["captions"].update(wd=1),
        lambda c: c["captions"]["wd"].pop("repeats"),
        lambda c: c["metrics"].update({"a/b": {}}),
        lambda c: c.update(name="../../x"),
        lambda c: c["sampling"].update({1: 2}),
        lambda c: c["trainer"].update(max_train_epochs="many"),
        lambda c: c["adapter"].update(hydra={"a": 1}),
        lambda c: c["model"].pop("path"),
        lambda c: c.update(seed="x"),
    ],
)
def test_settings_of_another_shape_are_one_line(change, store, here, capsys):
    refused(here, capsys, store.run(config_yaml=change))


def test_an_alias_bomb_is_refused_at_once(store, here, capsys):
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    before = time.process_time()
    assert "aliases" in refused(here, capsys, store.run(config_yaml=bomb))
    assert time.process_time() - before < 10


def target(group, name):
    return lambda config: config[group].update(_target_=name)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (target("adapter", "theirs.Adapter"), "adapter._target_=theirs.Adapter"),
        (target("model", "theirs.Model"), "model._target_=theirs.Model"),
        (target("model", "Sidecar"), "model._target_=Sidecar"),
        (lambda c: c["optimizer"].update(type="theirs.SGD"), "optimizer.type=theirs.SGD"),
        (
            lambda c: c["metrics"]["validation"].update(_target_="theirs.M"),
            "metrics.validation._target_=theirs.M",
        ),
    ],
)
def test_a_class_of_others_runs_only_if_it_is_named(change, key, store, here, capsys):
    """A module `theirs`, which leaves a file behind when it is imported, can be imported here."""
    (here.home / "theirs.py").write_text("open('PWNED', 'w')\nfrom torch.optim import SGD\n")
    made = store.run(config_yaml=change)
    said = refused(here, capsys, made)
    assert key in said
    assert not (here.home / "PWNED").exists()


def test_a_class_of_others_that_is_named_again_is_trusted(store, here, monkeypatch):
    monkeypatch.syspath_prepend(here.home)
    (here.home / "theirs_too.py").write_text("from torch.optim import SGD\n")
    made = store.run(config_yaml=lambda c: c["optimizer"].update(type="theirs_too.SGD", args={}))
    named = [*here.places, "optimizer.type=theirs_too.SGD"]
    plan = reproduce_run.prepare(find_original(made, store.log), Options(places=named))
    assert plan.run.optimizer.type == "theirs_too.SGD"
    with pytest.raises(ReproduceError, match="only a class that the log names"):
        rebuild(yaml.safe_dump(store.files["config.yaml"]), ["optimizer.type=theirs_too.SGD"])


def test_a_program_of_a_log_is_not_run(store, here, capsys):
    """sd-scripts runs from the checkout that a person names, in that one's Python."""
    named = {"path": str(here.home / "theirs"), "python": str(here.home / "theirs" / "python")}
    (here.home / "theirs").mkdir()
    (here.home / "theirs" / "train_network.py").touch()

    def by_sd_scripts(values):
        option = yaml.safe_load((conf_dir() / "trainer" / "sd_scripts.yaml").read_text())
        prompts = values["sampling"]["prompts"]
        values["trainer"] = {**option, **named, "sample_prompts": prompts}

    made = store.run(config_yaml=by_sd_scripts)
    assert "trainer.path=FOLDER" in refused(here, capsys, made)
    mine = here.home / "mine"
    values = copy.deepcopy(store.files["config.yaml"])
    by_sd_scripts(values)
    text = yaml.safe_dump(values)
    rebuilt = rebuild(text, [f"trainer.path={mine}"]).values["trainer"]
    assert (rebuilt["path"], rebuilt["python"]) == (str(mine), None)


def test_a_pickle_is_not_loaded_because_a_log_says_so(store, here, capsys):
    theirs = here.home / "theirs.ckpt"
    theirs.write_bytes(PICKLE)
    made = store.run(
        config_yaml=lambda c: c["model"].update(
            path=str(theirs), allow_pickle=True, config=c["model"]["path"]
        )
    )
    assert "model.allow_pickle=true" in refused(here, capsys, made)
    assert not (here.home / "PWNED").exists()
    plan = reproduce_run.prepare(
        find_original(made, store.log),
        Options(places=[*here.places, "model.allow_pickle=true"]),
    )
    assert plan.run.model.allow_pickle


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"path": "theirs/model"}, "model.path=theirs/model"),
        ({"path": "theirs/model", "revision": "../../x"}, "model.path=theirs/model"),
        ({"path": "https://evil.example/x"}, "model.path=https://evil.example/x"),
        ({"path": "/nowhere/model"}, "model.path=FOLDER"),
    ],
)
def test_a_model_that_is_not_here_is_not_fetched_unasked(change, key, store, here, capsys):
    made = store.run(config_yaml=lambda c: c["model"].update(change))
    assert key in refused(here, capsys, made)
    assert key in refused(here, capsys, made, "--as-config", "mine")


def test_configs_of_a_single_file_are_not_fetched_unasked(tmp_path):
    file = tmp_path / "x.safetensors"
    file.touch()
    model = {"path": str(file), "revision": None, "config": "theirs/model"}
    with pytest.raises(ReproduceError, match=r"add model\.config=theirs/model"):
        trusted_settings.refuse_downloads(model, {"model.path"})
    trusted_settings.refuse_downloads(model, {"model.path", "model.config"})


def test_a_model_that_a_person_names_may_be_fetched(store):
    logged = yaml.safe_dump(store.files["config.yaml"])
    found = rebuild(logged, ["model.path=theirs/model"])
    assert found.values["model"]["path"] == "theirs/model"


def test_captions_are_not_made_of_this_machines_files(store, here):
    secret = here.home / "private.jsonl"
    names = [one["file"] for one in store.files["manifest.json"]["images"]]
    secret.write_text("".join(json.dumps({"file": n, "t": SECRET}) + "\n" for n in names))
    theirs = {"suffix": None, "jsonl": str(secret), "text_key": "t"}
    made = store.run(config_yaml=lambda c: c["captions"]["wd"].update(theirs))
    plan = prepared(store, here, made, recaption=True)
    (told,) = [one for one in plan.differences if one.what == "captions.wd"]
    assert told.then == "the log's are used"
    assert SECRET not in (plan.home / "captions.jsonl").read_text()


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system", "command": "touch PWNED"},
        {"_target_": "WD14", "model": "theirs/tagger", "revision": None},
        {"_target_": "Sidecar", "suffix": None, "jsonl": "/etc/passwd", "text_key": "x"},
    ],
)
def test_a_logged_captioner_uses_only_what_is_here(node, tmp_path):
    with pytest.raises(ReproduceError):
        trusted_settings.captioner(node, tmp_path)


def test_the_disk_is_not_searched_because_a_log_names_its_root(store, here, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(original_images, "_by_content", lambda *_: asked.append(1) or iter(()))
    made = store.run(config_yaml=lambda c: c["dataset"].update(image_dir="/"))
    assert "images are not in /" in refused(here, capsys, made)
    assert not asked


@pytest.mark.parametrize("damage", ["no zip", "another file", "a password", "cut"])
def test_images_of_a_damaged_archive_are_missing(damage, store, here, capsys):
    archive = archive_of(store, here.tmp)
    content = archive.read_bytes()
    if damage == "another file":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for one in store.files["manifest.json"]["images"]:
                packed.writestr(one["sha256"], b"\0" * 1_000_000)
    else:
        encrypted = content.replace(b"PK\1\2\x14\x03\x14\0\0", b"PK\1\2\x14\x03\x14\0\1")
        bad = {"no zip": b"PK", "a password": encrypted, "cut": b"\xff" * 200 + content[200:]}
        archive.write_bytes(bad[damage])
    made = store.run(config_yaml=lambda c: c["dataset"].update(image_dir="none"), archive=archive)
    archive.unlink()
    assert "of its 6 images are not in none" in refused(here, capsys, made)


def test_an_image_that_would_unpack_to_gigabytes_is_left_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(original_images, "MAX_IMAGE", 1_000)
    digest = hashlib.sha256(b"\0" * 2_000).hexdigest()
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(digest, b"\0" * 2_000)
    wanted = {"images": [{"file": "x.png", "sha256": digest, "width": 1, "height": 1}]}
    with pytest.raises(ReproduceError, match="1 of its 1 images"):
        original_images.find_images(wanted, tmp_path, tmp_path / "x.zip", tmp_path / "spare")
    assert not (tmp_path / "spare").exists()


def test_escapes_reach_no_terminal(store, here, capsys, monkeypatch):
    monkeypatch.setattr(reproduce_run, "train", lambda plan: reproduce_run.discard(plan.home))
    monkeypatch.setattr(reproduce_run, "judge", lambda plan: (_ for _ in ()).throw(KeyError))
    captions = {"train": {f"1_{ESCAPE}": {ESCAPE: ESCAPE}}}
    made = store.run(
        sweep=f"s{ESCAPE}\nMLflow run 2",
        captions_json=captions,
        origin_json={"versions": {ESCAPE: ESCAPE}, "device": {ESCAPE: ESCAPE}},
    )
    with pytest.raises(KeyError):
        exit_code("reproduce", made, *here.places)
    said = capsys.readouterr()
    assert "s?]0;owned" in said.out
    assert "\nMLflow run 2" not in said.out
    assert "\x1b" not in said.out + said.err


def test_an_epoch_without_end_is_refused(store, here, capsys):
    deep = {"1": {"members": [["deep", 1], ["far", 10**12]], "failed": []}}
    store.run("far")
    said = refused(here, capsys, store.run("deep", pack_json=deep), "--same-pack")
    assert "pack.json" in said


def test_a_pack_without_the_run_itself_is_refused(store, here, capsys):
    pack = {"1": {"members": [], "failed": []}}
    assert "leave out --same-pack" in refused(
        here, capsys, store.run(pack_json=pack), "--same-pack"
    )


@pytest.mark.parametrize("text", ["${", "\\${x}", "a\\\\${oc.env:HOME}", "$${x}", "${x}\\", "\\"])
def test_literal_values_are_what_they_were_once_resolved(text):
    from omegaconf import OmegaConf

    values = {"a": text, "b": [{"c": text}], "d": None, "e": 1.5}
    assert OmegaConf.to_container(OmegaConf.create(literal(values)), resolve=True) == values
