"""`pick` in a store, or an output_root, that others have written: what it must not read or write.

Each test has a sweep of its own in one store.
"""

from __future__ import annotations

import io
import re
import socket
import sqlite3
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric
from PIL import Image
from rich.console import Console

from candidates import BY
from logged import SETTINGS as ANY_STORE
from lorasweep import tracking
from lorasweep.lora_files import checkpoint
from lorasweep.runs import pick_checkpoint, pick_table
from lorasweep.tracking import Tracking
from lorasweep.tracking.store import open_store

CONFIG = "model: {path: some/base-model}\nsampling: {prompts: [a rocket]}\n"
SECRET = "a private key"
ESCAPE = "\x1b]0;owned\x07\x1b[2J"


@dataclass(frozen=True)
class Store:
    """A store, and a folder outside of output_root whose files are nobody's."""

    root: Path
    secret: Path
    settings: Tracking
    client: MlflowClient

    def pick(self, sweep: str) -> pick_checkpoint.Pick:
        chosen = pick_checkpoint.choose(self.settings, self.root, by=BY, sweep=sweep)
        return pick_checkpoint.record(chosen, self.settings, self.root, replaces=False)

    @property
    def uri(self) -> str:
        return self.settings.resolve(self.root)

    def add(self, sweep: str, score: float = 0.1, **tags: str | None) -> str:
        """A checkpoint as a stranger says that it is; None leaves a tag out. The model's id."""
        file = self.root / sweep / f"{sweep}-000001.safetensors"
        if not file.exists():
            write_lora(file)
        run = self.run_of(sweep)
        said = {
            "sweep": sweep,
            "run": sweep,
            "checkpoint": f"{sweep}-e001",
            "epoch": "1",
            "path": str(file),
            "hash": checkpoint.data_hash(file),
            **tags,
        }
        model = self.client.create_logged_model(
            "1",
            name="a",
            source_run_id=run,
            tags={f"lorasweep.{key}": value for key, value in said.items() if value is not None},
        )
        metric = Metric(BY, score, 1, 1, model_id=model.model_id)
        self.client.log_batch(run, metrics=[metric])
        self.client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def run_of(self, sweep: str) -> str:
        """The id of the sweep's one run, with its config."""
        tags = {"lorasweep.sweep": sweep, "lorasweep.run": sweep}
        for run in self.client.search_runs(["1"]):
            if run.data.tags["lorasweep.sweep"] == sweep:
                return str(run.info.run_id)
        run = self.client.create_run("1", tags=tags)
        self.client.log_text(run.info.run_id, CONFIG, "config.yaml")
        return str(run.info.run_id)

    def change(self, statement: str, *values: str) -> None:
        """Write into the store what MLflow's client would not."""
        with closing(sqlite3.connect(self.root / "mlflow.db")) as database, database:
            database.execute(statement, values)

    def copies(self) -> list[Path]:
        """All that was picked or stored with a checkpoint."""
        folders = (self.root / "picked", self.root / "mlartifacts" / "models")
        return [path for folder in folders for path in folder.rglob("*") if path.is_file()]

    def assert_kept(self) -> None:
        """Nothing outside has changed, and nothing of it was copied."""
        assert {path.name for path in self.secret.iterdir()} == {"id_rsa", "private.safetensors"}
        assert (self.secret / "id_rsa").read_text() == SECRET
        private = (self.secret / "private.safetensors").read_bytes()
        for path in self.copies():
            content = path.read_bytes()
            assert SECRET.encode() not in content, path
            assert content != private, path


def write_lora(path: Path, value: float = 1.0) -> None:
    checkpoint.write(path, {"lora_unet_x.alpha": torch.tensor(value)}, {})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Store:
    home = tmp_path_factory.mktemp("stranger")
    root, secret = home / "outputs", home / "home"
    secret.mkdir()
    (secret / "id_rsa").write_text(SECRET)
    write_lora(secret / "private.safetensors", 7.0)
    settings = replace(ANY_STORE, upload="picked", registered_model="style")
    open_store(settings, root)
    return Store(root, secret, settings, MlflowClient(settings.resolve(root)))


@pytest.fixture
def store(shared: Store) -> Store:
    for path in shared.copies():
        path.unlink()
    return shared


def refused(store: Store, sweep: str) -> str:
    """Pick, which ends in one line and leaves nothing; the line."""
    with pytest.raises((ValueError, RuntimeError)) as error:  # the line's own class
        store.pick(sweep)
    assert type(error.value).__module__.startswith("lorasweep")
    assert str(error.value).isprintable()
    assert store.copies() == []
    assert not list((store.root / "picked").glob(f"*{sweep}*"))
    store.assert_kept()
    return str(error.value)


def test_a_key_is_no_checkpoint(store: Store) -> None:
    store.add("key", path=str(store.secret / "id_rsa"))
    assert "no checkpoint yet" in refused(store, "key")


@pytest.mark.parametrize(
    "path", ["{secret}/private.safetensors", "{root}/x/../../home/private.safetensors"]
)
def test_a_file_outside_output_root_is_not_copied(store: Store, path: str) -> None:
    """Not even a LoRA whose hash the stranger knows."""
    known = checkpoint.data_hash(store.secret / "private.safetensors")
    sweep = f"out{len(path)}"
    store.add(sweep, path=path.format(secret=store.secret, root=store.root), hash=known)
    assert f"lies outside {store.root}" in refused(store, sweep)


@pytest.mark.parametrize("target", ["id_rsa", "private.safetensors", "."])
def test_a_link_out_of_the_runs_folder_is_not_followed(store: Store, target: str) -> None:
    known = checkpoint.data_hash(store.secret / "private.safetensors")
    sweep = f"link{len(target)}"
    link = store.root / sweep / "a.safetensors"
    link.parent.mkdir()
    link.symlink_to(store.secret / target)
    path = link / "private.safetensors" if target == "." else link
    store.add(sweep, path=str(path), hash=known)
    assert "lies outside" in refused(store, sweep)


@pytest.mark.parametrize("content", [b"not a LoRA", b"", None])
def test_another_file_than_was_logged_is_not_copied(store: Store, content: bytes | None) -> None:
    sweep = f"other{len(content or b'lora')}"
    path = store.root / sweep / "a.safetensors"
    write_lora(path, 3.0)
    known = checkpoint.data_hash(path)
    if content is None:  # whose metadata claim that it is
        tensors = {"lora_unet_x.alpha": torch.tensor(4.0)}
        from safetensors.torch import save_file

        save_file(tensors, path, {"sshs_model_hash": known})
    else:
        path.write_bytes(content)
    store.add(sweep, path=str(path), hash=known)
    assert "is another file by now" in refused(store, sweep)


def test_without_a_logged_hash_nothing_is_copied(store: Store) -> None:
    store.add("nohash", hash=None)
    assert "no hash of it was logged" in refused(store, "nohash")


PLACES = {
    "a-folder": "file://{secret}",
    "a-path": "{secret}",
    "of-another": "file://{secret}/m-00000000000000000000000000000000/artifacts",
    "by-runs": "runs:/00000000000000000000000000000000/{id}/artifacts",
    "a-server": "http://127.0.0.1:{port}/{id}/artifacts",
    "its-files": "mlflow-artifacts://127.0.0.1:{port}/{id}/artifacts",
    "a-bucket": "s3://bucket/{id}/artifacts",
    "another-machines": "file://127.0.0.1/{id}/artifacts",
}


@pytest.mark.parametrize("place", PLACES)
def test_files_are_neither_read_nor_put_where_a_store_says(store: Store, place: str) -> None:
    model = store.add(place)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        server.setblocking(False)
        location = PLACES[place].format(secret=store.secret, port=server.getsockname()[1], id=model)
        store.change(
            "UPDATE logged_models SET artifact_location = ? WHERE model_id = ?", location, model
        )
        assert "they are neither read nor written" in refused(store, place)
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()


def test_a_settings_file_elsewhere_is_not_the_runs(store: Store) -> None:
    store.add("config")
    run = store.client.get_run(store.run_of("config")).info
    for location in (f"file://{store.secret}", str(store.secret), run.artifact_uri):
        store.change("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", location, run.run_id)
        if location != run.artifact_uri:
            assert "not a folder of their own" in refused(store, "config")
    own = store.root / "mlartifacts" / run.run_id / "artifacts" / "config.yaml"
    for content in ("- a list", "a: &a [*a]", "\0", "model: {path: [", None):
        own.unlink()
        if content is None:
            own.symlink_to(store.secret / "id_rsa")
        else:
            own.write_text(content)
        assert "config.yaml" in refused(store, "config")
    own.unlink()
    assert "config.yaml is not in the tracking store" in refused(store, "config")
    own.write_text(CONFIG)
    store.pick("config")


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"epoch": "x"}, "its epoch is x"),
        ({"epoch": "9" * 5000}, "its epoch is 9999"),
        ({"epoch": None}, "no lorasweep.epoch"),
        ({"terms": "[1"}, r"its terms are \[1"),
        ({"terms": "[1]"}, r"its terms are \[1\]"),
        ({"terms": '{"val/loss_rel": ["a"]}'}, "its terms are"),
        ({"terms": '{"val/loss_rel": 3}'}, "its terms are"),
        ({"terms": '{"val/loss_rel": [NaN]}'}, "its terms are not finite"),
        ({"path": None}, "no lorasweep.path"),
        ({"seed": "1`"}, "its seed is 1`"),
        ({"path": "a.safetensors"}, "its path is a.safetensors"),
        ({"run": None}, "no lorasweep.run"),
        ({"checkpoint": "../../x"}, "its name is not made of"),
        ({"checkpoint": f"x{ESCAPE}"}, "its name is not made of"),
    ],
)
def test_a_broken_entry_is_left_out_by_name_and_the_rest_goes_on(
    store: Store, tags: dict[str, str | None], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = f"broken{len(store.client.search_runs(['1']))}"
    store.add(sweep, score=0.1, **tags)
    store.add(sweep, score=0.2, checkpoint=f"{sweep}-whole")
    assert store.pick(sweep).winner.name == f"{sweep}-whole"
    (line,) = {record.message for record in caplog.records}
    assert re.search(f"left out, .*{why}", line)
    assert line.isprintable()
    store.assert_kept()


def test_names_in_the_table_do_not_steer_the_terminal(store: Store) -> None:
    sweep = f"s{ESCAPE}[red]"
    model = store.add("plain", run=f"r{ESCAPE}[/bold]", checkpoint="fine")
    store.client.set_logged_model_tags(model, {"lorasweep.sweep": sweep})
    store.client.set_tag(store.run_of("plain"), "lorasweep.sweep", sweep)
    result = store.pick(sweep)
    screen = io.StringIO()
    console = Console(file=screen, width=140, force_terminal=True, color_system=None)
    console.print(pick_table.table(replace(result, left_out=[f"x{ESCAPE}[blink]"])))
    said = screen.getvalue()
    assert "\x1b]0" not in said
    assert "\x1b[2J" not in said
    assert "[red]" in said
    assert "[/bold]" in said
    assert "[blink]" in said
    readme = (result.folder / "README.md").read_text()
    assert "\x1b" not in readme


def test_a_contact_sheet_that_is_a_link_or_no_picture_is_left_out(store: Store) -> None:
    sheet = store.root / "sheet" / "contact_sheet.png"
    store.add("sheet")
    sheet.symlink_to(store.secret / "id_rsa")
    assert not (store.pick("sheet").folder / "contact_sheet.png").exists()
    store.assert_kept()
    sheet.unlink()
    sheet.write_text(SECRET)
    assert not (store.pick("sheet").folder / "contact_sheet.png").exists()
    store.assert_kept()
    Image.new("RGB", (4, 4)).save(sheet)
    assert (store.pick("sheet").folder / "contact_sheet.png").read_bytes() == sheet.read_bytes()


def test_nothing_is_written_through_links_of_a_folder(store: Store) -> None:
    store.add("through")
    picked, name = store.root / "picked" / "through", "through-e001"
    picked.parent.mkdir(exist_ok=True)
    picked.symlink_to(store.secret)
    with pytest.raises(ValueError, match=f"{name} lies outside"):
        store.pick("through")
    store.assert_kept()
    picked.unlink()
    picked.mkdir()
    (picked / name).symlink_to(store.secret)
    with pytest.raises(ValueError, match=f"{name} lies outside"):
        store.pick("through")
    store.assert_kept()
    (picked / name).unlink()
    assert store.pick("through").folder == picked / name
    (picked / name / "config.yaml").unlink()
    (picked / name / "config.yaml").symlink_to(store.secret / "id_rsa")
    assert store.pick("through").folder == picked / name
    store.assert_kept()
    model = tracking.candidates(store.uri, "e", "through")[0].model_id
    stored = store.root / "mlartifacts" / "models" / model / "artifacts" / "README.md"
    stored.unlink()
    stored.symlink_to(store.secret / "id_rsa")
    store.pick("through")
    store.assert_kept()
    assert not stored.is_symlink()


def test_a_file_that_is_gone_leaves_no_part_of_a_folder(store: Store) -> None:
    store.add("gone")
    (store.root / "gone" / "gone-000001.safetensors").unlink()
    assert "is gone and MLflow has no copy" in refused(store, "gone")
