"""Captioners on models made here, and the cache that lets no image be captioned twice."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from PIL import Image

from lorasweep.core.settings import SettingsError, build
from lorasweep.data.captions.caption_cache import CaptionCache
from lorasweep.data.captions.caption_images import are_tags, caption_images
from lorasweep.data.captions.empty import Empty
from lorasweep.data.captions.kosmos2 import Kosmos2
from lorasweep.data.captions.sidecar import Sidecar
from lorasweep.data.captions.wd14 import WD14
from lorasweep.data.dataset import ImageFile

CONF = Path(__file__).parents[2] / "conf" / "captions"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def option(name: str, arm: str, **changes: Any) -> Any:
    """The captioner that conf/captions/{name}.yaml gives for an arm, with some values changed."""
    arms = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    return build(arms[arm] | changes, f"captions.{arm}")


def image_file(path: Path, image: Image.Image) -> ImageFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ImageFile(path, path.name, digest, *image.size)


def colours(folder: Path, **colours_by_name: tuple[int, int, int]) -> list[ImageFile]:
    return [
        image_file(folder / f"{name}.png", Image.new("RGB", (16, 16), colour))
        for name, colour in colours_by_name.items()
    ]


def numbered(folder: Path, count: int) -> list[ImageFile]:
    return colours(folder, **{f"image{index}": (index, 0, 0) for index in range(count)})


@dataclass(frozen=True)
class Recorder:
    """Captions an image by its name and adds a line to `log` for each, one image a batch."""

    cached: ClassVar[bool] = True
    repeats: ClassVar[int] = 1

    log: Path
    name: str = "recorder"
    start: Any = None
    """A barrier at which processes wait for each other before they look into the cache."""
    kill_after: int | None = None

    def identity(self) -> str:
        if self.start is not None:
            self.start.wait(timeout=60)
        return self.name

    def caption(self, images: Sequence[ImageFile]) -> Iterator[list[str]]:
        for count, image in enumerate(images):
            if count == self.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            with self.log.open("a") as log:
                log.write(f"{image.name}\n")
            yield [f"about {image.name}"]

    def made(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def run(captioner: Any, images: Sequence[ImageFile], tmp_path: Path, arm: str = "wd") -> list[str]:
    return caption_images(captioner, images, tmp_path / "cache", arm=arm)


def test_every_option_defines_arms_with_repeats():
    arms = {}
    for path in sorted(CONF.glob("*.yaml")):
        assert path.read_text(encoding="utf-8").startswith("# @package captions\n")
        arms[path.stem] = yaml.safe_load(path.read_text(encoding="utf-8"))
    repeats = {
        name: {arm: values["repeats"] for arm, values in group.items()}
        for name, group in arms.items()
    }
    assert repeats == {
        "demo": {"empty": 1, "wd": 1, "kosmos": 1},
        "empty": {"empty": 10},
        "kosmos2": {"kosmos": 10},
        "sidecar": {"sidecar": 10},
        "wd14": {"wd": 10},
    }


def test_tags_are_tags_and_sentences_are_not():
    """By default; shuffling tore sentences apart."""
    asked = {("wd14", "wd"): True, ("kosmos2", "kosmos"): False, ("empty", "empty"): False}
    asked |= {("demo", "wd"): True, ("demo", "kosmos"): False, ("sidecar", "sidecar"): True}
    assert {which: are_tags(option(*which)) for which in asked} == asked


@pytest.mark.parametrize(
    ("name", "arm", "changes", "message"),
    [
        ("empty", "empty", {"repeats": 0}, "captions.empty.repeats=0"),
        ("wd14", "wd", {"general_threshold": 1.5}, "captions.wd.general_threshold=1.5"),
        ("wd14", "wd", {"device": "gpu"}, "captions.wd.device=gpu"),
        ("kosmos2", "kosmos", {"dtype": "fp8"}, "captions.kosmos.dtype=fp8"),
        ("kosmos2", "kosmos", {"promt": "x"}, "did you mean captions.kosmos.prompt?"),
        ("sidecar", "sidecar", {"suffix": None}, "give either suffix or jsonl"),
        ("sidecar", "sidecar", {"jsonl": "x.jsonl", "text_key": "a"}, "give either suffix or"),
        ("sidecar", "sidecar", {"text_key": "a"}, "it goes with jsonl"),
        ("sidecar", "sidecar", {"suffix": "/../x.txt"}, "must be the end of a file name"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(name, arm, changes, message):
    with pytest.raises(SettingsError) as error:
        option(name, arm, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_empty_gives_an_empty_caption_for_each_image_and_caches_nothing(tmp_path):
    images = numbered(tmp_path, 3)
    assert run(Empty(repeats=10), images, tmp_path) == ["", "", ""]
    assert not (tmp_path / "cache").exists()


# The cache


def test_no_image_is_captioned_twice(tmp_path):
    images = numbered(tmp_path, 4)
    recorder = Recorder(tmp_path / "log")
    first = run(recorder, images[:2], tmp_path)
    assert first == ["about image0.png", "about image1.png"]
    assert run(recorder, images[::-1], tmp_path, arm="other") == [
        f"about image{index}.png" for index in (3, 2, 1, 0)
    ]
    assert sorted(recorder.made()) == [image.name for image in images]


def test_the_cache_knows_an_image_by_its_content(tmp_path):
    (image,) = numbered(tmp_path, 1)
    recorder = Recorder(tmp_path / "log")
    run(recorder, [image], tmp_path)
    renamed = image_file(tmp_path / "renamed.png", Image.new("RGB", (16, 16), (0, 0, 0)))
    changed = image_file(tmp_path / "image0.png", Image.new("RGB", (16, 16), RED))
    assert run(recorder, [renamed, changed, renamed], tmp_path) == ["about image0.png"] * 3
    assert recorder.made() == ["image0.png", "image0.png"]


def test_another_identity_captions_anew(tmp_path):
    images = numbered(tmp_path, 1)
    for name in ["one", "two"]:
        run(Recorder(tmp_path / "log", name), images, tmp_path)
    assert len(Recorder(tmp_path / "log").made()) == 2


@pytest.mark.parametrize(
    "tear",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\xfe\0"),
        lambda path: path.write_text("[1]"),
        lambda path: path.write_text(path.read_text().replace("about", "above")),
        lambda path: path.with_suffix(".tmp").write_text("{"),
    ],
)
def test_a_torn_entry_is_made_again(tmp_path, tear):
    images = numbered(tmp_path, 1)
    recorder = Recorder(tmp_path / "log")
    run(recorder, images, tmp_path)
    (entry,) = (tmp_path / "cache").rglob("*.json")
    tear(entry)
    assert run(recorder, images, tmp_path) == ["about image0.png"]
    assert run(recorder, images, tmp_path) == ["about image0.png"]
    assert len(recorder.made()) == (1 if entry.with_suffix(".tmp").exists() else 2)


def in_a_process(captioner: Any, images: Sequence[ImageFile], tmp_path: Path) -> Any:
    context = multiprocessing.get_context("fork")  # with its libraries loaded
    process = context.Process(target=run, args=(captioner, images, tmp_path))
    process.start()
    return process


def test_two_processes_at_once_share_the_work(tmp_path):
    images = numbered(tmp_path, 20)
    barrier = multiprocessing.get_context("fork").Barrier(2)
    recorder = Recorder(tmp_path / "log", start=barrier)
    # overlapping, not equal: each has images of its own too
    processes = [in_a_process(recorder, part, tmp_path) for part in (images[:15], images[5:])]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(recorder.made()) == sorted(image.name for image in images)


def test_after_kill_9_the_next_process_goes_on_where_the_last_one_was(tmp_path):
    images = numbered(tmp_path, 5)
    process = in_a_process(Recorder(tmp_path / "log", kill_after=3), images, tmp_path)
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    recorder = Recorder(tmp_path / "log")
    assert run(recorder, images, tmp_path) == [f"about {image.name}" for image in images]
    assert sorted(recorder.made()) == [image.name for image in images]


def test_waiting_for_another_process_is_said(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    cache = CaptionCache(tmp_path, "one")
    context = multiprocessing.get_context("fork")  # with its libraries loaded
    held, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(cache, held, done))
    process.start()
    assert held.wait(timeout=60)
    with CaptionCache(tmp_path, "two").lock("captions.other"):
        assert "waiting" not in caplog.text  # other identities don't wait
    monkeypatch.setattr(caplog.handler, "emit", lambda record: done.set())
    with cache.lock("captions.wd"):
        assert done.is_set()  # by the message, before the other process let go
    process.join(timeout=60)


def hold(cache: CaptionCache, held: Any, done: Any) -> None:
    with cache.lock("captions.wd"):
        held.set()
        done.wait(timeout=60)


def test_a_bar_is_drawn_on_a_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, that is a terminal
    run(Recorder(tmp_path / "log"), numbered(tmp_path, 3), tmp_path)
    assert "captions wd" in capfd.readouterr().err


def test_nothing_is_drawn_where_there_is_no_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    run(Recorder(tmp_path / "log"), numbered(tmp_path, 3), tmp_path)
    assert capfd.readouterr() == ("", "")


# Sidecar


def test_captions_are_read_from_files_beside_the_images(tmp_path):
    images = numbered(tmp_path, 2)
    for index, image in enumerate(images):
        image.path.with_name(f"{image.path.stem}_wd.txt").write_text(f"tag {index}, ü")
    captioner = option("sidecar", "sidecar", suffix="_wd.txt")
    assert run(captioner, images, tmp_path) == ["tag 0, ü", "tag 1, ü"]
    assert captioner.identity() == "sidecar suffix=_wd.txt"


def test_of_several_lines_the_first_is_the_caption_and_one_warning_says_so(tmp_path, caplog):
    """As kohya reads them: `lines[0].strip()`."""
    images = numbered(tmp_path, 4)
    texts = ["a fox\n\n", "a fox\nin snow\n", "\r\na fox", "a fox\r\nin snow"]
    for image, text in zip(images, texts, strict=True):
        image.path.with_suffix(".txt").write_bytes(text.encode())
    captions = run(option("sidecar", "sidecar"), images, tmp_path)
    assert [text.strip() for text in captions] == ["a fox", "a fox", "", "a fox"]
    (said,) = caplog.messages
    assert "only the first line is read of 3 files" in said


def jsonl_captioner(path: Path, lines: Sequence[str], text_key: str = "wd") -> Sidecar:
    path.write_text("\n".join(lines), encoding="utf-8")
    return Sidecar(repeats=1, suffix=None, jsonl=path, text_key=text_key)


def test_captions_are_read_from_a_jsonl_by_relative_path(tmp_path):
    top, nested = numbered(tmp_path, 2)
    nested = ImageFile(nested.path, "sub/ü.png", nested.sha256, 16, 16)
    lines = [
        json.dumps({"file": "./image0.png", "wd": "tags", "kosmos": "words"}),
        "",
        json.dumps({"file": "sub\\u\N{COMBINING DIAERESIS}.png", "wd": "", "kosmos": "more"}),
        json.dumps({"file": "not drawn.png", "wd": "x", "kosmos": "y"}),
    ]
    tags = jsonl_captioner(tmp_path / "c.jsonl", lines)
    words = jsonl_captioner(tmp_path / "c.jsonl", lines, "kosmos")
    assert run(tags, [nested, top], tmp_path) == ["", "tags"]
    assert run(words, [top, nested], tmp_path) == ["words", "more"]
    assert tags.identity() != words.identity()
    before = tags.identity()
    jsonl_captioner(tmp_path / "c.jsonl", lines[:1])
    assert tags.identity() != before


def test_the_demo_has_two_captions_for_each_of_its_images():
    folder = Path(__file__).parents[2] / "src/lorasweep/embedded/demo_images"
    images = [ImageFile(path, path.name, "", 64, 64) for path in sorted(folder.glob("*.png"))]
    for arm in ["wd", "kosmos"]:
        captioner = option("demo", arm, jsonl=folder / "captions.jsonl")
        captions = caption_images(captioner, images, Path("unused"), arm=arm)
        assert len(captions) == len(images) >= 38
        assert all(captions)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no line for image0.png; add one"),
        (['{"file": "image0.png", "wd": "a"', "{}"], "line 1 is not JSON"),
        (['{"file": "image0.png", "tags": "a"}'], "it has file, tags; mend it or set text_key"),
        (['{"file": "image0.png", "wd": 1}'], "must have texts"),
        (["[]"], "it has no keys"),
        (
            ['{"file": "image0.png", "wd": "a"}', '{"file": "image0.png", "wd": "b"}'],
            "line 2 gives image0.png a second caption",
        ),
    ],
)
def test_a_jsonl_that_cannot_be_used_is_one_line_with_the_remedy(tmp_path, lines, message):
    captioner = jsonl_captioner(tmp_path / "c.jsonl", lines)
    with pytest.raises(SettingsError, match=r"^captions\.wd\.jsonl=") as error:
        run(captioner, numbered(tmp_path, 1), tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_captions_are_listed_with_the_remedy(tmp_path):
    images = numbered(tmp_path, 3)
    images[1].path.with_suffix(".txt").write_text("here")
    with pytest.raises(SettingsError, match=r"no caption for image0\.png, image2\.png; put NAME"):
        run(option("sidecar", "sidecar"), images, tmp_path)
    with pytest.raises(SettingsError, match=r"captions\.wd\.jsonl: cannot read"):
        run(Sidecar(repeats=1, suffix=None, jsonl=tmp_path / "no", text_key="a"), images, tmp_path)


# WD14, on a model whose outputs are the mean colour: blue, green, red as it sees the channels

TAGS = [
    *((name, "9") for name in ["general", "sensitive", "questionable", "explicit"]),
    ("blue_sky", "0"),
    ("grass", "0"),
    ("red_coat", "0"),
    ("^_^", "0"),
    ("some_artist", "1"),
    ("robin_(bird)", "4"),
]
_, BLUE_SKY, GRASS, RED_COAT = range(3, 7)


def write_onnx(path: Path, shape: Sequence[Any], axes: Sequence[int], gain: float) -> None:
    """outputs = mean over `axes` of the pixels, times a matrix from colour to tag."""
    from onnx import TensorProto, helper, numpy_helper, save

    matrix = np.zeros((3, len(TAGS)), np.float32)
    matrix[0, 4] = matrix[1, 5] = matrix[2, 6] = gain  # blue, green, red
    matrix[2, 7] = matrix[2, 8] = gain  # red smiles, and has an artist
    matrix[2, 9] = gain / 2  # and may be a robin
    matrix[:, :4] = gain
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
            helper.make_node("MatMul", ["mean", "matrix"], ["tags"]),
        ],
        "tagger",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("tags", TensorProto.FLOAT, [shape[0], len(TAGS)])],
        [
            numpy_helper.from_array(np.array(axes, np.int64), "axes"),
            numpy_helper.from_array(matrix, "matrix"),
        ],
    )
    opset = helper.make_opsetid("", 18)
    save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


def write_tagger(folder: Path, batch: int | str = "batch", tags: Sequence[Any] = TAGS) -> Path:
    """A stand-in for SmilingWolf's models: NHWC pixels from 0 to 255, probabilities out."""
    folder.mkdir()
    write_onnx(folder / "model.onnx", [batch, 8, 8, 3], axes=[1, 2], gain=1 / 255)
    with (folder / "selected_tags.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tag_id", "name", "category", "count"])
        writer.writerows([index, *tag, 9] for index, tag in enumerate(tags))
    return folder


def write_channels_first_tagger(folder: Path) -> Path:
    """A stand-in for the models in sub-folders: NCHW pixels from -1 to 1, logits out."""
    folder.mkdir()
    write_onnx(folder / "model_optimized.onnx", ["batch", 3, 8, 8], axes=[2, 3], gain=3.0)
    kinds = {"9": "Rating", "0": "General", "4": "Character", "1": "Artist"}
    mapping = {
        str(index): {"tag": tag, "category": kinds[kind]} for index, (tag, kind) in enumerate(TAGS)
    }
    (folder / "tag_mapping.json").write_text(json.dumps(mapping))
    return folder


def wd14(model: Path | str, **changes: Any) -> WD14:
    return option("wd14", "wd", model=str(model), device="cpu", **changes)


@pytest.mark.parametrize(
    ("changes", "red"),
    [
        ({}, "red_coat, ^_^, robin_(bird)"),
        ({"remove_underscore": True}, "red coat, ^_^, robin (bird)"),
        ({"character_threshold": 0.6}, "red_coat, ^_^"),
        ({"undesired_tags": ["red_coat", "robin_(bird)"]}, "^_^"),
        ({"undesired_tags": ["red_coat"], "remove_underscore": True}, "^_^, robin (bird)"),
        ({"undesired_tags": ["red coat"], "remove_underscore": True}, "^_^, robin (bird)"),
        ({"general_threshold": 0.0}, "blue_sky, grass, red_coat, ^_^, robin_(bird)"),
        ({"batch_size": 1}, "red_coat, ^_^, robin_(bird)"),
    ],
)
def test_tags_are_those_that_the_model_finds_probable(tmp_path, changes, red):
    tagger = wd14(write_tagger(tmp_path / "model"), **changes)
    images = colours(tmp_path, red=RED, green=GREEN, blue=BLUE)
    captions = run(tagger, images, tmp_path)
    assert captions[0] == red
    if not changes:
        assert captions[1:] == ["grass", "blue_sky"]


def test_images_are_padded_to_a_white_square(tmp_path):
    tagger = wd14(write_tagger(tmp_path / "model"), general_threshold=0.45)
    wide = image_file(tmp_path / "wide.png", Image.new("RGB", (32, 16), RED))
    tall = image_file(tmp_path / "tall.png", Image.new("RGB", (16, 24), BLUE))
    # half of the first is white, and so half blue and half green; a third of the other
    assert run(tagger, [wide, tall], tmp_path) == [
        "blue_sky, grass, red_coat, ^_^, robin_(bird)",
        "blue_sky",
    ]


def test_pixels_are_bgr_and_shrunk_by_area_and_enlarged_smoothly(tmp_path):
    from lorasweep.data.captions.wd14 import Layout, preprocess

    layout = Layout("pixels", None, 4, channels_first=False)
    checks = np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((3, 3))).astype(np.uint8) * 255
    shrunk = preprocess(Image.fromarray(checks).convert("RGB"), layout)
    np.testing.assert_array_equal(shrunk[..., 0], np.indices((4, 4)).sum(0) % 2 * 255)
    pixels = preprocess(Image.new("RGB", (2, 2), (1, 2, 3)), layout)
    assert (pixels.dtype, pixels.shape, pixels[0, 0].tolist()) == (np.float32, (4, 4, 3), [3, 2, 1])
    padded = preprocess(Image.new("RGB", (4, 2), (0, 0, 0)), layout)
    assert padded[:, 0, 0].tolist() == [255, 0, 0, 255]
    bars = preprocess(Image.fromarray(np.uint8([[[0] * 3, [255] * 3]] * 2)), layout)
    assert np.unique(bars).size > 2
    first = Layout("pixels", None, 4, channels_first=True)
    np.testing.assert_allclose(
        preprocess(Image.new("RGB", (8, 8), (0, 51, 255)), first)[:, 0, 0], [1, -0.6, -1]
    )


def test_models_in_subfolders_are_read_by_their_own_rules(tmp_path):
    tagger = wd14(write_channels_first_tagger(tmp_path / "model"), general_threshold=0.9)
    images = colours(tmp_path, red=RED, green=GREEN, blue=BLUE)
    # sigmoid(3) = 0.95 for a tag's own colour and 0.05 else; sigmoid(1.5) = 0.82 for the robin
    assert run(tagger, images, tmp_path) == ["red_coat, ^_^, robin_(bird)", "grass", "blue_sky"]


def test_a_model_of_fixed_batch_size_is_fed_so(tmp_path):
    tagger = wd14(write_tagger(tmp_path / "model", batch=1), batch_size=3)
    assert run(tagger, colours(tmp_path, green=GREEN, blue=BLUE), tmp_path) == ["grass", "blue_sky"]


def test_the_taggers_identity_is_its_weights_and_what_decides_the_tags(tmp_path):
    model = write_tagger(tmp_path / "model")
    same = wd14(model).identity()
    assert wd14(write_tagger(tmp_path / "copy")).identity() == same
    assert wd14(model, batch_size=7, repeats=1).identity() == same
    others = [
        wd14(model, general_threshold=0.4).identity(),
        wd14(model, undesired_tags=["grass"]).identity(),
        wd14(model, remove_underscore=True).identity(),
        wd14(write_tagger(tmp_path / "other", batch=1)).identity(),
    ]
    assert len({same, *others}) == 5


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "none in that folder"),
        (["model.onnx"], "no selected_tags.csv there"),
        (["selected_tags.csv"], "no model.onnx there"),
    ],
)
def test_weights_that_are_not_there_are_one_line_with_the_remedy(tmp_path, files, message):
    source = write_tagger(tmp_path / "source")
    (tmp_path / "model").mkdir()
    for name in files:
        (source / name).rename(tmp_path / "model" / name)
    with pytest.raises(SettingsError, match=r"^captions\.wd\.model=.*no weights found") as error:
        run(wd14(tmp_path / "model"), numbered(tmp_path, 1), tmp_path)
    for text in [message, "hf download", "captions=sidecar"]:
        assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def offline_hub(tmp_path, monkeypatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("model", ["no/such", "no/such/sub", "nosuch", "./no/such folder"])
def test_a_model_that_is_neither_here_nor_on_the_hub_is_one_line(tmp_path, offline_hub, model):
    with pytest.raises(SettingsError, match=r"^captions\.wd\.model=.*captions=sidecar") as error:
        run(wd14(model), numbered(tmp_path, 1), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("subfolder", ["", "/sub"])
def test_a_model_in_the_hubs_cache_is_found_offline(tmp_path, offline_hub, subfolder):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = offline_hub / "models--some--tagger"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    if subfolder:
        write_channels_first_tagger(snapshot / "sub")
    else:
        snapshot.rmdir()
        write_tagger(snapshot)
    tagger = wd14(f"some/tagger{subfolder}")
    assert run(tagger, colours(tmp_path, blue=BLUE), tmp_path) == ["blue_sky"]
    assert f"some/tagger{subfolder}@{commit}" in tagger.identity()


def test_a_broken_model_or_label_file_is_one_line(tmp_path):
    images = numbered(tmp_path, 1)
    broken = write_tagger(tmp_path / "broken")
    (broken / "model.onnx").write_bytes((broken / "model.onnx").read_bytes()[:99])
    fewer = write_tagger(tmp_path / "fewer", tags=TAGS[:-1])
    other = write_tagger(tmp_path / "other")
    (other / "selected_tags.csv").write_text("a,b\n1,2\n")
    for model, message in [(broken, "cannot load"), (fewer, "9 labels"), (other, "label file")]:
        with pytest.raises(SettingsError, match=rf"^captions\.wd\.model.*{message}") as error:
            run(wd14(model), images, tmp_path)
        assert "\n" not in str(error.value)


def test_cuda_where_there_is_none_is_refused(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has it")
    model = str(write_tagger(tmp_path / "model"))
    with pytest.raises(SettingsError, match=r"^captions\.wd\.device=cuda: .*set device=cpu"):
        run(option("wd14", "wd", model=model, device="cuda"), numbered(tmp_path, 1), tmp_path)


# Kosmos-2, on a random model of 60 thousand parameters


@pytest.fixture(scope="session")
def kosmos_folder(tmp_path_factory) -> Path:
    import torch
    from transformers import (
        CLIPImageProcessorPil,
        Kosmos2Config,
        Kosmos2ForConditionalGeneration,
        Kosmos2Processor,
        XLMRobertaTokenizer,
    )

    words = ["a", "cat", "red", "blue", "green", "dog", "house", "on", "the", "grass", "and", "sky"]
    words += ["Describe", "this", "image"]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *(f"▁<i{index}>" for index in range(8))]
    tokenizer = XLMRobertaTokenizer(
        vocab=[*((piece, 0.0) for piece in pieces), *((f"▁{word}", -3.0) for word in words)]
    )
    images = CLIPImageProcessorPil(
        size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28}
    )
    processor = Kosmos2Processor(images, tokenizer, num_patch_index_tokens=16)
    config = Kosmos2Config(
        text_config={
            "vocab_size": len(tokenizer),
            "embed_dim": 32,
            "layers": 2,
            "ffn_dim": 64,
            "attention_heads": 4,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        latent_query_num=8,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Kosmos2ForConditionalGeneration(config)
    with torch.no_grad():  # as initialised, the picture is too faint to change a word
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
        model.image_to_text_projection.latent_query.normal_(std=0.02)
        words_only = torch.zeros(len(tokenizer), 1)  # marks and ends have score 0, never the best
        words_only[len(pieces) : len(pieces) + len(words)] = 1
        model.text_model.lm_head.weight.copy_(torch.randn(len(tokenizer), 32) * words_only)
    folder = tmp_path_factory.mktemp("kosmos")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def kosmos(model: Path, **changes: Any) -> Kosmos2:
    small = {"prompt": "Describe this image", "max_new_tokens": 8, "device": "cpu"}
    return option("kosmos2", "kosmos", model=str(model), **small | changes)


def noise_images(folder: Path) -> list[ImageFile]:
    rng = np.random.default_rng(0)
    return [
        image_file(
            folder / f"{index}.png",
            Image.fromarray(rng.integers(0, 256, (28 + 9 * index, 40, 3), dtype=np.uint8)),
        )
        for index in range(3)
    ]


def test_kosmos_describes_each_image_alike_alone_and_in_a_batch(tmp_path, kosmos_folder):
    images = noise_images(tmp_path)
    together = run(kosmos(kosmos_folder, batch_size=3), images, tmp_path / "a")
    alone = run(kosmos(kosmos_folder, batch_size=1), images, tmp_path / "b")
    assert together == alone
    assert len(set(together)) == len(images)
    for caption in together:
        assert caption
        assert "Describe this image" not in caption
        assert "<patch_index" not in caption


def test_kosmos_on_a_device_that_is_not_there_is_one_line(tmp_path, kosmos_folder):
    with pytest.raises(SettingsError, match=r"^captions\.kosmos\.device=cuda:99: .*CUDA device"):
        run(kosmos(kosmos_folder, device="cuda:99"), noise_images(tmp_path), tmp_path, "kosmos")


def test_kosmos_identity_is_its_weights_prompt_length_and_dtype(kosmos_folder):
    identities = [
        kosmos(kosmos_folder).identity(),
        kosmos(kosmos_folder, prompt="An image of").identity(),
        kosmos(kosmos_folder, max_new_tokens=9).identity(),
        kosmos(kosmos_folder, dtype="bf16").identity(),
    ]
    assert len(set(identities)) == 4
    assert kosmos(kosmos_folder, batch_size=1, repeats=3).identity() == identities[0]


def test_kosmos_runs_in_half_precision(tmp_path, kosmos_folder):
    images = noise_images(tmp_path)[:1]
    (caption,) = run(kosmos(kosmos_folder, dtype="bf16"), images, tmp_path)
    assert caption


def test_kosmos_takes_safetensors_only(tmp_path, kosmos_folder):
    import torch

    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in kosmos_folder.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(SettingsError, match=r"no \.safetensors file there") as error:
        run(kosmos(folder), noise_images(tmp_path), tmp_path)
    assert "\n" not in str(error.value)


def test_kosmos_with_weights_missing_is_refused(tmp_path, kosmos_folder):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "partial"
    folder.mkdir()
    for path in kosmos_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors["image_to_text_projection.latent_query"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingsError, match=r"1 of Kosmos-2's weights are missing"):
        run(kosmos(folder), noise_images(tmp_path), tmp_path)
