"""What `lorasweep doctor` says of this machine and the configured run, before anything is run."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import save

import sd_scripts_stand_in as stand_in
from lorasweep import __version__
from lorasweep.config.compose import compose
from lorasweep.core.settings import SettingsError
from lorasweep.runs import doctor, doctor_probes
from lorasweep.runs.doctor_probes import Finding
from lorasweep.tracking.store import create_store

DEMO = "experiment=demo"
NOWHERE = "http://127.0.0.1:9"  # nobody listens on the discard port


@pytest.fixture
def examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Examined]:
    """Findings of a config, written below tmp_path; the hub's cache is empty, the hub offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield Examined(tmp_path)


class Examined:
    def __init__(self, root: Path) -> None:
        self.places = [f"output_root={root / 'outputs'}", f"cache_dir={root / 'cache'}"]

    def __call__(self, *overrides: str) -> dict[str, Finding]:
        found = doctor.findings(compose([*self.places, *overrides]), overrides)
        return {finding.check: finding for finding in found}

    def problems(self, *overrides: str) -> dict[str, Finding]:
        return {k: one for k, one in self(*overrides).items() if one.level == "problem"}


def diffusers_folder(root: Path) -> Path:
    for part in ("text_encoder", "unet", "vae"):
        (root / part).mkdir(parents=True)
        (root / part / "model.safetensors").touch()
    for file in ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        (root / file).parent.mkdir()
        (root / file).touch()
    return root


def cached_snapshot(hub: Path, repo_id: str) -> Path:
    """An empty snapshot of a repository in the hub's cache."""
    repo = hub / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    return snapshot


def test_demo_has_all_it_needs_and_leaves_nothing_behind(
    examined: Examined, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.examine(compose([*examined.places, DEMO])) == 0
    assert "has what it needs" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_missing_need_comes_first_and_gives_exit_code_1(
    examined: Examined, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert doctor.examine(compose([*examined.places, DEMO, "model.path=nobody/none"])) == 1
    said = capsys.readouterr().out.splitlines()
    lines = said[said.index(f"lorasweep {__version__}") :]  # others' libraries may have spoken
    assert lines[1].startswith("problem model.path: nobody/none")
    remedies = [line for line in lines if line.startswith("    ")]
    assert any("hf download nobody/none" in line for line in remedies)  # uncut
    well = [line for line in lines if line.startswith("OK")]
    assert well and all(len(line) <= 80 for line in well)
    assert len(lines) <= 28 and lines[-1].startswith("1 to fix")


def test_works_without_an_image_folder(examined: Examined) -> None:
    found = examined("model=embedded", "captions=empty")
    assert found["dataset.image_dir"].text == "not given"
    assert not [one for one in found.values() if one.level == "problem"]


def test_image_folder_that_is_not_there_is_a_problem(examined: Examined, tmp_path: Path) -> None:
    (problem,) = examined.problems(DEMO, f"dataset.image_dir={tmp_path / 'no'}").values()
    assert "no such folder" in problem.text
    assert problem.remedy == "give the folder of your images"


def test_too_few_images_are_a_warning_with_both_numbers(examined: Examined, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "one.png")
    finding = examined(DEMO, f"dataset.image_dir={tmp_path / 'photos'}")["dataset.image_dir"]
    assert finding.level == "warning"
    assert "1 of 1 images are trained on, 0 held out" in finding.text
    assert "38 wanted" in finding.text


def sd_scripts(examined: Examined, folder: Path, *overrides: str) -> list[tuple[str, str, str]]:
    """What is said of a checkout: level, text and remedy."""
    words = DEMO, "trainer=sd_scripts", f"trainer.path={folder}", *overrides
    found = doctor.findings(compose([*examined.places, *words]), words)
    checks = ("trainer", "trainer.path", "trainer.python", "sd-scripts")
    return [(one.level, one.text, one.remedy) for one in found if one.check in checks]


def test_a_checkout_of_sd_scripts_its_python_and_packages_are_examined(
    examined: Examined, tmp_path: Path
) -> None:
    (tmp_path / "no.safetensors").touch()
    stand_in.write(tmp_path / "checkout", tmp_path / "no.safetensors", preset=True)
    pins = "accelerate==1.6.0\ndiffusers[torch]==1.0\n"
    (tmp_path / "checkout" / "requirements.txt").write_text(pins)
    folder, python, packages, starts = sd_scripts(examined, tmp_path / "checkout")
    assert folder[0] == "OK" and "not from git" in folder[1]
    assert python[0] == "OK" and "checkout/venv/bin/python: Python 3.10.14" in python[1]
    assert packages[0] == "warning"
    assert packages[1].endswith("and its requirements.txt asks for accelerate 1.6.0")
    assert starts[:2] == ("OK", "train_network.py starts with torch 2.6.0 on cpu")
    *_, lycoris = sd_scripts(examined, tmp_path / "checkout", "adapter=loha")
    assert lycoris[0] == "warning" and "time embedding twice" in lycoris[1]


def test_what_a_checkout_of_sd_scripts_lacks_is_a_problem_with_its_remedy(
    examined: Examined, tmp_path: Path
) -> None:
    (problem,) = sd_scripts(examined, tmp_path)
    assert problem[0] == "problem" and "there is no train_network.py" in problem[1]
    (tmp_path / "no.safetensors").touch()
    stand_in.write(tmp_path / "bare", tmp_path / "no.safetensors", ["torch", "toml"])
    *_, problem = sd_scripts(examined, tmp_path / "bare")
    assert problem[:2] == ("problem", "no accelerate, tensorboard there")
    assert problem[2].endswith("venv/bin/python -m pip install accelerate tensorboard")
    (tmp_path / "bare" / "venv" / "bin" / "python").write_text("#!/bin/sh\necho no >&2; exit 1\n")
    *_, problem = sd_scripts(examined, tmp_path / "bare")
    assert problem[0] == "problem" and "python failed: no" in problem[1]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.rank=four", "adapter.rank=four"),
        ("trainer.precision=fp8", "trainer.precision=fp8"),
        ("model.path=no.safetensors", "model.path=no.safetensors"),
    ],
)
def test_wrong_value_is_refused_in_one_line(examined: Examined, override: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as error:
        examined(DEMO, override)
    assert "\n" not in str(error.value)


def test_missing_weights_of_the_default_config_say_what_to_download(examined: Examined) -> None:
    problems = examined.problems()
    assert set(problems) == {"model.path", "captions.wd.model", "captions.kosmos.model"}
    for problem in problems.values():
        repo_id = problem.text.partition(":")[0]
        assert f"hf download {repo_id}" in problem.remedy
        assert "HF_HUB_OFFLINE is set" in problem.text


def test_what_the_hub_can_give_is_no_problem(
    examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_probes, "_answer", lambda url: 200)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = examined()
    assert found["model.path"].level == "warning"
    assert "will be downloaded" in found["model.path"].text
    assert "in reach" in found["hub"].text


def test_model_in_the_hub_cache_is_found(examined: Examined, tmp_path: Path) -> None:
    diffusers_folder(cached_snapshot(tmp_path / "hub", "some/model"))
    finding = examined(DEMO, "model.path=some/model")["model.path"]
    assert finding == Finding("model.path", "some/model: in the hub cache")


def test_half_downloaded_model_says_what_it_lacks(examined: Examined, tmp_path: Path) -> None:
    snapshot = diffusers_folder(cached_snapshot(tmp_path / "hub", "some/model"))
    (snapshot / "unet" / "model.safetensors").rename(snapshot / "unet" / "model.fp16.safetensors")
    problem = examined.problems(DEMO, "model.path=some/model")["model.path"]
    assert "no unet in the hub's cache" in problem.text


def test_single_file_needs_its_config_too(examined: Examined, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(save({}))
    overrides = (DEMO, f"model.path={tmp_path / 'model.safetensors'}", "model.config=nobody/none")
    assert "nobody/none: not in the hub's cache" in examined.problems(*overrides)["model.path"].text
    folder = diffusers_folder(tmp_path / "config")
    for part in ("text_encoder", "unet", "vae"):
        (folder / part / "config.json").touch()
    assert not examined.problems(*overrides[:2], f"model.config={folder}")


def test_tagger_without_its_labels_is_a_problem(examined: Examined, tmp_path: Path) -> None:
    (tmp_path / "tagger").mkdir()
    (tmp_path / "tagger" / "model.onnx").touch()
    overrides = ("model=embedded", "captions=wd14", f"captions.wd.model={tmp_path / 'tagger'}")
    assert "no selected_tags.csv" in examined.problems(*overrides)["captions.wd.model"].text
    (tmp_path / "tagger" / "selected_tags.csv").touch()
    assert not examined.problems(*overrides)


def test_tagger_in_a_subfolder_of_a_cached_repository_is_found(
    examined: Examined, tmp_path: Path
) -> None:
    folder = cached_snapshot(tmp_path / "hub", "some/taggers") / "small"
    folder.mkdir()
    for name in ("model.onnx", "selected_tags.csv"):
        (folder / name).touch()
    overrides = ("model=embedded", "captions=wd14", "captions.wd.model=some/taggers/small")
    assert not examined.problems(*overrides)


def test_optimizer_of_a_package_that_is_missing_is_a_problem(examined: Examined) -> None:
    problem = examined.problems(DEMO, "optimizer.type=no_such_package.Lion")["optimizer"]
    assert "install what has it" in problem.remedy


def test_the_checks_of_train_are_lines_of_the_table(examined: Examined, tmp_path: Path) -> None:
    found = examined(DEMO, "adapter.rank=4", "adapter.alpha=8")
    assert found["adapter"].level == "warning"
    assert found["adapter"].remedy.endswith("adapter.alpha=2")
    overrides = ("adapter.targets=unet-only", "optimizer.unet_lr=0")
    assert "whose learning rate is 0" in examined.problems(DEMO, *overrides)["adapter"].text
    assert "sampling" in examined.problems(DEMO, "sampling.scheduler=Euler")
    unread = ("sampling.every_n_epochs=0", "sampling.seed=4")
    assert examined.problems(DEMO, *unread)["sampling"].remedy == "set that or leave it out"


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("dataset.resolution=63", "dataset"),
        ("model.clip_skip=100", "model"),
        ("cache_dir=/dev/null", "cache_dir"),
        ("model.path=.", "model"),
    ],
)
def test_what_train_refuses_before_any_work_is_a_problem(
    examined: Examined, override: str, check: str
) -> None:
    assert check in examined.problems(DEMO, override)


def test_a_resolution_is_refused_before_its_model_is_here(examined: Examined) -> None:
    """Captions may take hours, and the model is downloaded after them."""
    found = examined.problems("model=sd15", "dataset.resolution=[500,516]")
    assert "multiples of 8" in found["dataset"].text
    assert "[496, 512]" in found["dataset"].text + found["dataset"].remedy
    assert "dataset" not in examined.problems("model=sd15", "dataset.resolution=[504,512]")


def test_output_root_that_cannot_be_written_is_a_problem(
    examined: Examined, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    problems = examined.problems(DEMO, f"output_root={tmp_path / 'file' / 'outputs'}")
    assert set(problems) == {"output_root", "tracking.uri"}


def test_damaged_tracking_store_is_a_problem(examined: Examined, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    uri = f"tracking.uri='sqlite:///{tmp_path / 'mlflow.db'}'"
    assert "not a database" in examined.problems(DEMO, uri)["tracking.uri"].text


def test_tracking_store_is_not_changed_by_the_write_test(
    examined: Examined, tmp_path: Path
) -> None:
    database = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE runs (name TEXT)")
    before = database.read_bytes()
    found = examined(DEMO, f"tracking.uri='sqlite:///{database}'")["tracking.uri"]
    assert found.text.endswith("can be written")
    assert database.read_bytes() == before


def test_a_deleted_experiment_is_a_problem(examined: Examined, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    override = f"tracking.uri='{uri}'"
    client.delete_experiment(create_store(uri, "gone", tmp_path))
    problem = examined.problems(DEMO, override, "tracking.experiment=gone")["tracking.experiment"]
    assert "was deleted in MLflow" in problem.text
    assert "restore" in problem.remedy
    assert "tracking.experiment" not in examined.problems(DEMO, override)


def test_mlflows_own_variables_that_are_not_read_are_told(
    examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"MLFLOW_TRACKING_URI": "https://m:secret@x", "MLFLOW_EXPERIMENT_NAME": "mine"}
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    assert "tracking" not in examined(DEMO)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
        finding = examined(DEMO)["tracking"]
        assert f"is not read from {name}, which is set" in finding.text
        assert f"='${{oc.env:{name}}}'" in finding.remedy
        assert "secret" not in finding.text + finding.remedy
    assert "MLFLOW_TRACKING_URI" in examined(DEMO, "tracking.experiment=other")["tracking"].text
    assert "tracking" not in examined(DEMO, "tracking.experiment=mine", "tracking.uri=null")


def test_tracking_server_that_is_down_is_a_problem(examined: Examined) -> None:
    problem = examined.problems(DEMO, f"tracking.uri='{NOWHERE}'")["tracking.uri"]
    assert "start the server" in problem.remedy


def test_tracking_server_that_answers_is_ok_and_its_password_is_not_shown(
    examined: Examined,
) -> None:
    with HTTPServer(("127.0.0.1", 0), _Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://me:secret@127.0.0.1:{server.server_port}"
        finding = examined(DEMO, f"tracking.uri='{uri}'")["tracking.uri"]
        server.shutdown()
    assert finding.level == "OK"
    assert "secret" not in finding.text


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass
