"""No pickle and no download unasked, servers on this machine only, no HTML in Markdown."""

from __future__ import annotations

import ast
import socket
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import pytest

import lorasweep
from bad_files import BASE, base, both, without
from lorasweep.config.compose import compose
from lorasweep.core import local_pages
from lorasweep.core.settings import build
from lorasweep.core.text import markdown
from lorasweep.runs.picked_readme import readme
from lorasweep.tracking import Candidate, ui_server

SOURCES = sorted(Path(lorasweep.__file__).parent.rglob("*.py"))
PICKLE = b"\x80\x04cposix\nsystem\n(S'touch PWNED'\ntR."


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {one.arg: one.value for one in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_unpickles_and_weights_are_asked_for_as_safetensors(path):
    for name, keywords in calls(path):
        assert not name.endswith(("pickle.load", "pickle.loads", "joblib.load"))
        if name.endswith("torch.load"):  # behind export's --allow-pickle, and even then restricted
            assert path.name == "pickled_lora.py"
            assert ast.unparse(keywords["weights_only"]) == "True"
        assert name != "yaml.load" or ast.unparse(keywords["Loader"]) == "_LOADER"  # a safe one
        assert not name.endswith("yaml.unsafe_load")
        reads_weights = name.endswith(("Model.from_pretrained", "Generation.from_pretrained"))
        if reads_weights or name.endswith(".load_lora_weights"):
            spread = None in keywords  # **weights, which the next test tries
            assert spread or ast.unparse(keywords["use_safetensors"]) == "True", name


def test_a_folder_of_pickles_is_not_loaded_unless_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unet, text = "unet/diffusion_pytorch_model", "text_encoder/model"
    both(base(), without(f"model/{unet}.safetensors", f"model/{text}.safetensors"))(tmp_path)
    for name in (f"{unet}.bin", "text_encoder/pytorch_model.bin"):
        (tmp_path / "model" / name).write_bytes(PICKLE)
    cfg = compose(["experiment=demo", "model.path=model"])
    with pytest.raises(ValueError, match=r"as a pickle alone .* trust it by model\.allow_pickle"):
        build(cfg.model, "model").load()
    assert not (tmp_path / "PWNED").exists()


def test_beside_safetensors_a_pickle_is_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base()(tmp_path)
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"):
        (tmp_path / "model" / name).write_bytes(PICKLE)
    cfg = compose(["experiment=demo", "model.path=model"])
    build(cfg.model, "model").load()
    assert not (tmp_path / "PWNED").exists()


def test_with_hf_hub_offline_nothing_on_the_network_is_asked(tmp_path, monkeypatch):
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    node = compose(["experiment=demo", "model.path=nobody/nothing"]).model
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set: nothing is downloaded"):
        build(node, "model").load()
    assert asked == []


@pytest.fixture
def mlflows_command(monkeypatch, tmp_path):
    """What `lorasweep ui` would become, and with which variables."""
    started = []
    monkeypatch.setattr(ui_server.os, "execve", lambda *arguments: started.append(arguments))
    ui_server._become_server("sqlite:///x.db", tmp_path, 5001)
    ((_, command, environment),) = started
    return command, environment


def test_mlflows_pages_are_served_to_this_machine_only(mlflows_command):
    command, environment = mlflows_command
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "x.db" not in " ".join(command)  # a URI may hold a password
    assert environment["MLFLOW_BACKEND_STORE_URI"] == "sqlite:///x.db"


OTHER_HOSTS = (
    *("10.evil.example", "192.168.evil.example", "evil.example", "127.0.0.1.evil.example:5001"),
    *("10.0.0.1:5001", "localhost:5002", "localhost", "127.0.0.1", "[::1]:5001", "", "*"),
)
"""Names under which a website that its user visits might reach a server on this machine."""
OWN_HOSTS = ("127.0.0.1:5001", "localhost:5001")


def test_mlflow_answers_no_request_under_another_name(mlflows_command, monkeypatch):
    """MLflow's own middleware, told what its command line is told, answers real requests."""
    from flask import Flask
    from mlflow.server.security import init_security_middleware

    command, _ = mlflows_command
    allowed = command[command.index("--allowed-hosts") + 1]
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", allowed)  # as its command line does
    app = Flask("mlflow")
    app.add_url_rule("/picture", view_func=lambda: "a picture")
    init_security_middleware(app)
    client = app.test_client()
    for host in OTHER_HOSTS:
        answer = client.get("/picture", headers={"Host": host})
        assert (answer.status_code, b"picture" in answer.data) == (403, False), host
    for host in OWN_HOSTS:
        assert client.get("/picture", headers={"Host": host}).data == b"a picture"


def test_the_dashboard_is_served_to_this_machine_only(monkeypatch, tmp_path):
    served = []
    monkeypatch.setattr(local_pages, "make_server", lambda *where: served.append(where) or Closed())
    show_dashboard(tmp_path)
    assert [where[:2] for where in served] == [("127.0.0.1", 5001)]


def test_the_dashboard_answers_no_request_under_another_name_or_from_another_page(
    monkeypatch, tmp_path
):
    served = []
    monkeypatch.setattr(local_pages, "make_server", lambda *where: served.append(where) or Closed())
    show_dashboard(tmp_path)
    ((_, _, app),) = served

    def status(**headers):
        said = []
        environ = {"PATH_INFO": "/api/studies", **headers}
        setup_testing_defaults(environ)
        body = b"".join(app(environ, lambda status, *_: said.append(status)))
        assert (b"study_summaries" in body) == (said == ["200 OK"])
        return said[0][:3]

    assert {status(HTTP_HOST=host) for host in OTHER_HOSTS} == {"403"}
    assert {status(HTTP_HOST=host) for host in OWN_HOSTS} == {"200"}
    own = {"HTTP_HOST": "localhost:5001"}
    for origin in ("http://evil.example", "null", "http://localhost:3000", "file://"):
        assert status(**own, HTTP_ORIGIN=origin) == "403"
    assert status(**own, HTTP_ORIGIN="http://localhost:5001") == "200"


class Closed:
    """A server that ends at once."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def serve_forever(self):
        raise KeyboardInterrupt


def show_dashboard(folder):
    from lorasweep.sweeps.study import study_storage

    (folder / "x" / "s").mkdir(parents=True)
    (folder / "x" / "s" / "study.journal").touch()
    study_storage.show("x-s", None, folder, 5001)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_binds_to_other_machines(path):
    assert "0.0.0.0" not in path.read_text()


def test_what_mlflow_shows_as_markdown_holds_no_html_and_no_links():
    note = markdown("<img src=x onerror=alert(1)>.png [a](javascript:b) `c`")
    for mark in "<>[]`":
        assert note.count(mark) == note.count(f"\\{mark}")


def test_a_prompt_can_not_leave_the_readmes_code():
    prompt = 'a "quoted" cat"); import os; os.system("x") <script> $(y) `z`'
    candidate = Candidate(
        name="a-e001", run="a", sweep="s", epoch=1, path=BASE, scores={}, terms={},
        run_id="", model_id="", experiment_id="", created=0,
    )  # fmt: skip
    text = readme(candidate, {"sampling": {"prompts": [prompt]}}, "val/loss", "rule")
    code = text.partition("```python\n")[2].partition("```")[0]
    assert [name for name, _ in calls_of(code)].count("os.system") == 0
    assert f"--prompt '{prompt}'" in text  # quoted for the shell
    assert '- a "quoted" cat"); import os; os.system("x") \\<script\\>' in text


def calls_of(code: str):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node
