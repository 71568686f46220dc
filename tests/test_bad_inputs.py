"""Bad input ends in one clear line or a documented repair: never a traceback, never half an output.

Each row is met by the command that a person would give, in a folder of its own. `says` is in the one
line. docs/promises.md has the repairs.
"""

# ruff: noqa: E501  (a row of the table is a line)

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from bad_files import (
    BASE,
    JPEG,
    KEY,
    PNG,
    Maker,
    base,
    both,
    closed,
    directory,
    edited,
    encoded,
    fifo,
    file,
    header_of,
    link,
    lora,
    lora_tensors,
    photos,
    picture,
    png_of,
    replaced,
    safetensors,
    socket_at,
    text_bomb,
    without,
)
from lorasweep.cli import main
from lorasweep.data import kohya_folders
from lorasweep.data.kohya_folders import FoldersError
from lorasweep.runs import session

PICKLE = b"\x80\x04cposix\nsystem\n(S'touch PWNED'\ntR."
"""A pickle that makes a file when it is loaded."""


GOOD = photos()


@dataclass(frozen=True)
class Case:
    """What a person gives, and a part of the line that answers it."""

    name: str
    command: str
    says: str
    make: Maker = GOOD


def ids(cases: list[Case]) -> list[str]:
    names = [case.name for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"two rows of one name: {twice}"
    return names


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the case's own; Hydra's loggers and arguments are put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lorasweep"])
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield tmp_path
    root.handlers, root.level = handlers, level


def refused(case: Case, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the command and check all that is promised of a refusal."""
    case.make(here)
    before, had_folders = outputs(here), (here / "outputs").exists()
    with pytest.raises(SystemExit) as exit_:
        main.main(shlex.split(case.command.replace("BASE", str(BASE))))
    told = capsys.readouterr().err
    first, *more = told.rstrip("\n").split("\n")
    assert exit_.value.code == 2, told
    assert first.startswith("lorasweep: "), told
    assert case.says in told
    assert all(line.startswith("  ") for line in more), told  # a list of files, indented
    assert "Traceback" not in told and told.replace("\n", "").isprintable()
    assert outputs(here) == before, "something was left that looks like an output"
    assert had_folders or not list(here.glob("outputs/*/2*")), "a folder was left"
    assert not (here / "PWNED").exists()


def outputs(folder: Path) -> set[str]:
    """Files that a person would take for a result; whole data folders stand and are no part."""
    kept = {"lorasweep.log", "multirun.yaml", "mlflow.db", "lock"}
    found = set()
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") for part in parts)
        if path.is_file() and not is_hidden and path.name not in kept and "datasets" not in parts:
            found.add("/".join(parts))
    whole = [path.parent for path in folder.rglob("manifest.json")]
    for tree in folder.glob("*/datasets/*"):
        assert tree.name.startswith(".") or tree in whole, f"{tree} has no manifest"
    return found


# Images, captions and folders: met by `lorasweep caption`

CAPTION = "caption photos model=embedded dataset.min_size=32 output_root=out cache_dir=cache"
EMPTY, SIDECAR = f"{CAPTION} captions=[empty]", f"{CAPTION} captions=[sidecar]"
JSONL = (
    f"{SIDECAR} captions.sidecar.suffix=null captions.sidecar.jsonl=c.jsonl"
    " captions.sidecar.text_key=t"
)
WD, KOSMOS = f"{CAPTION} captions=[wd14]", f"{CAPTION} captions=[kosmos2]"


def image(name: str, says: str, *makers: Maker) -> Case:
    """A bad image among good ones."""
    return Case(name, EMPTY, says, both(photos(captions=None), *makers))


def caption(name: str, says: str, *makers: Maker) -> Case:
    """A bad caption beside a good image."""
    return Case(name, SIDECAR, says, both(photos(), *makers))


def jsonl(name: str, says: str, content: str | bytes) -> Case:
    return Case(name, JSONL, says, both(photos(captions=None), file("c.jsonl", content)))


IMAGES = [
    image("image of zero bytes", "a.png: is not a readable", file("photos/a.png")),
    image("half a PNG", "a.png: cannot be decoded", file("photos/a.png", PNG[: len(PNG) // 2])),
    image("half a JPEG", "a.jpg: cannot be decoded", file("photos/a.jpg", JPEG[: len(JPEG) // 2])),
    image(
        "half a GIF", "a.gif: is not", file("photos/a.gif", encoded(picture(), "GIF")[:200])
    ),
    image(
        "half a WebP", "a.webp: cannot", file("photos/a.webp", encoded(picture(), "WEBP")[:100])
    ),
    image("a damaged TIFF", "a.tif: is not", file("photos/a.tif", b"II*\0" + b"\xff" * 20)),
    image("zeros", "a.png: is not a readable", file("photos/a.png", bytes(500))),
    image("a web page named PNG", "a.png: is not", file("photos/a.png", "<html>404</html>")),
    image("PostScript named PNG", "a.png: is not", file("photos/a.png", "%!PS-Adobe-3.0 EPSF\n")),
    image("an SVG named PNG", "a.png: is not", file("photos/a.png", "<svg/>")),
    image("pixels of 32 bits", "32-bit", file("photos/a.tif", encoded(Image.new("F", (64, 64)), "TIFF"))),
    image("1 x 10000", "below dataset.min_size=32", file("photos/a.png", encoded(picture(size=(1, 10000))))),
    image("0 x 0", "a.png: is not", file("photos/a.png", png_of(0, 0))),
    image("a bomb of 3.6 gigapixels", "a.png: cannot", file("photos/a.png", png_of(60000, 60000))),
    image("a bomb of 2**62 pixels", "a.png: cannot", file("photos/a.png", png_of(2**31 - 1, 2**31 - 1))),
    image("more pixels than allowed", "dataset.max_pixels", file("photos/a.png", png_of(12000, 12000))),
    image("fewer pixels than claimed", "truncated", file("photos/a.png", png_of(64, 64, b"\0" * 10))),
    image("80 MB of text in a PNG", "too large", file("photos/a.png", text_bomb())),
    image("a pipe named PNG", "a.png: is not a file", fifo("photos/a.png")),
    image("a link to itself", "a.png: is not a file", link("photos/a.png", "a.png")),
    image("a link to nowhere", "a.png: is not a file", link("photos/a.png", "gone.png")),
    image("a line end in a name", "a?b.png: is not", file("photos/a\nb.png")),
    image("a terminal's code in a name", "?[31mred.png: is not", file("photos/\x1b[31mred.png")),
    image("a name that is not UTF-8", "??.png: is not", file(b"photos/\xff\xfe.png")),
    image("HTML as a name", "<b>.png: is not", file("photos/<b>.png")),
    Case("only links out of the folder", EMPTY, "no images in it", both(file("a.png", PNG), directory("photos"), link("photos/a.png", "../a.png"))),
    Case("no folder of images", EMPTY, "photos: there is no such folder", lambda _: None),
    Case("a file for a folder of images", EMPTY, "photos: is not a folder", file("photos", "x")),
    Case("an empty folder of images", EMPTY, "photos: no images in it", directory("photos")),
    Case("a folder without images", EMPTY, "photos: no images in it", file("photos/a.txt", "x")),
    Case("no word for a folder", "caption '' captions=[empty]", "an empty word"),
    Case("two folders of images", f"{EMPTY} dataset.image_dir=other", "give one folder"),
]  # fmt: skip

CAPTIONS = [
    caption("no caption", "no caption for 0.png", without("photos/0.txt")),
    caption("UTF-16", "0.txt is not UTF-8", file("photos/0.txt", "a cat".encode("utf-16"))),
    caption("Latin-1", "0.txt is not UTF-8", file("photos/0.txt", "caf\xe9s".encode("latin-1"))),
    caption("a folder named as a caption", "no caption for 0.png", without("photos/0.txt"), directory("photos/0.txt")),
    caption("a pipe named as a caption", "no caption for 0.png", without("photos/0.txt"), fifo("photos/0.txt")),
    caption("a caption that links to itself", "no caption for 0.png", without("photos/0.txt"), link("photos/0.txt", "0.txt")),
    caption("a caption that links to a secret", "leads out of the image folder", file("secret", "TOP"), without("photos/0.txt"), link("photos/0.txt", "../secret")),
    caption("a caption of 2 MB", "has 2000000 bytes", file("photos/0.txt", b"a" * 2_000_000)),
    jsonl("an empty JSONL", "no line for 0.png, 1.png, 2.png", ""),
    jsonl("JSONL that is none", "line 1 is not JSON", "{"),
    jsonl("JSONL nested without end", "line 1 is not JSON", "[" * 100_000),
    jsonl("a number of 6,000 digits", "line 1 is not JSON", '{"file":' + "1" * 6000 + "}"),
    jsonl("JSONL of lists", "line 1 must have texts", "[1]\n"),
    jsonl("a number for a caption", "line 1 must have texts", '{"file":"0.png","t":5}'),
    jsonl("JSONL that is not UTF-8", "is not UTF-8", b'{"file":"\xff"}'),
    jsonl("JSONL that names ../0.png", "no line for 0.png", '{"file":"../0.png","t":"x"}\n'),
    jsonl("two captions for one image", "line 2 gives 0.png a second", '{"file":"0.png","t":"x"}\n{"file":"0.png","t":"y"}\n'),
    Case("no JSONL", JSONL, "cannot read c.jsonl", photos()),
    Case("a folder for a JSONL", JSONL, "cannot read c.jsonl", both(photos(), directory("c.jsonl"))),
    Case("a pipe for a JSONL", JSONL, "c.jsonl is a device or a pipe", both(photos(), fifo("c.jsonl"))),
    Case("a suffix out of the folder", f"{SIDECAR} captions.sidecar.suffix=../x", "the end of a file name"),
    Case("no arm", f"{CAPTION} captions=[]", "captions is empty"),
    Case("an arm that isn't there", f"{CAPTION} captions=[nope]", "captions=nope: there is no such option; choose one of"),
    Case("no repeats", f"{EMPTY} captions.empty.repeats=0", "captions.empty.repeats=0: must be"),
    Case("repeats without end", f"{EMPTY} captions.empty.repeats=1000000000", "must be less than or equal to 10000"),
    Case("a number for an arm", f"{EMPTY} captions.empty=3", "captions.empty=3"),
    Case("a tagger not at hand, offline", WD, "HF_HUB_OFFLINE is set: nothing is downloaded"),
    Case("Kosmos-2 not at hand, offline", KOSMOS, "HF_HUB_OFFLINE is set: nothing is downloaded"),
    Case("a tagger of a folder without one", f"{WD} captions.wd.model=photos", "none in that folder"),
    Case("a tagger at ../x", f"{WD} captions.wd.model=../x", "captions.wd.model=../x: no weights found"),
    Case("an empty tagger", f"{WD} captions.wd.model=wd", "onnxruntime cannot load model.onnx", both(photos(), file("wd/model.onnx"), file("wd/selected_tags.csv", "tag_id,name,category\n1,a,0\n"))),
    Case("a tagger's labels of another kind", f"{WD} captions.wd.model=wd", "is not a tagger's label file", both(photos(), file("wd/model.onnx", "x"), file("wd/tag_mapping.json", "[1]"))),
    Case("a pipe for a tagger", f"{WD} captions.wd.model=wd", "model.onnx is not a file", both(photos(), directory("wd"), fifo("wd/model.onnx"))),
    Case("a tagger's labels nested without end", f"{WD} captions.wd.model=wd", "is not a tagger's label file", both(photos(), file("wd/model.onnx", "x"), file("wd/tag_mapping.json", "[" * 100_000))),
    Case("a tagger's label of 1 MB", f"{WD} captions.wd.model=wd", "is not a tagger's label file", both(photos(), file("wd/model.onnx", "x"), file("wd/selected_tags.csv", "name,category\n" + "x" * 1_000_000))),
    Case("Kosmos-2 with a pipe", f"{KOSMOS} captions.kosmos.model=k", "is not a file", both(photos(), file("k/model.safetensors", "x"), fifo("k/config.json"))),
    Case("Kosmos-2 as a pickle alone", f"{KOSMOS} captions.kosmos.model=k", "no .safetensors file there", both(photos(), file("k/pytorch_model.bin", PICKLE), file("k/config.json", "{}"))),
    Case("Kosmos-2 without its files", f"{KOSMOS} captions.kosmos.model=k", "can't be loaded as Kosmos-2's", both(photos(), file("k/model.safetensors", "x"), file("k/config.json", "{"))),
]  # fmt: skip

PLACES = [
    Case("output_root is a file", EMPTY, "out is no folder", both(photos(), file("out", "x"))),
    Case("a file in the way below output_root", EMPTY, "a file is where a folder is needed", both(photos(), file("out/datasets", "x"))),
    Case("cache_dir is a file", f"{WD} captions.wd.model=wd cache_dir=c", "c is no folder; give a folder that you can write to", both(photos(), file("c", "x"), file("wd/model.onnx", "x"), file("wd/selected_tags.csv", "tag_id,name,category\n"))),
    Case("output_root where nothing can be", f"{EMPTY} output_root=/proc/nope", "output_root=/proc/nope: /proc can't be written"),
    Case("output_root of 300 letters", f"{EMPTY} output_root={'x' * 300}", "File name too long"),
    Case("output_root inside the images", f"{EMPTY} output_root=photos/out", "lies inside dataset.image_dir"),
    Case("no output_root", f"{EMPTY} output_root=", "output_root=: give a folder"),
    Case("a null output_root", f"{EMPTY} output_root=null", "output_root=None: give a folder"),
    Case("a list for cache_dir", f"{EMPTY} cache_dir=[1]", "cache_dir=[1]: give a folder"),
    Case("the config dir isn't there", f"{EMPTY} --config-dir nope", "--config-dir nope: there is no such folder"),
    Case("the config dir is a file", f"{EMPTY} --config-dir photos/0.png", "there is no such folder"),
]  # fmt: skip

# Settings: met by `train`, before any work

TRAIN = "train experiment=demo name=x output_root=out cache_dir=cache"


def setting(override: str, says: str, name: str | None = None) -> Case:
    return Case(name or override, f"{TRAIN} {override}", says, directory("photos"))


def option(name: str, says: str, yaml: str | bytes) -> Case:
    """An adapter of one's own, in --config-dir."""
    return Case(
        name, f"{TRAIN} --config-dir d adapter=mine", says, file("d/adapter/mine.yaml", yaml)
    )


SETTINGS = [
    setting("--nope", "unrecognized arguments: --nope"),
    setting("--cfg nope", "invalid choice: 'nope'"),
    setting("--config-dir nope", "--config-dir nope: there is no such folder"),
    setting("adapter.rank=0", "adapter.rank=0: must be greater than 0"),
    setting("adapter.rank=1000000000", "must be less than or equal to 4096"),
    setting("adapter.rank=true", "adapter.rank=true: must be a number"),
    setting("adapter.rank=null", "adapter.rank=None: must be a valid integer"),
    setting("adapter.rank=[1", "adapter.rank=[1: can't be read"),
    setting("adapter.rank=${nope}", "Interpolation key 'nope' not found"),
    setting("adapter.rank=4,8", "several values make a sweep"),
    setting("adapter.alpha=inf", "adapter.alpha=inf: must be a finite number"),
    setting("adapter.targets=[nothing.*]", "nothing.* begins with no part of the model"),
    setting("adapter=[lora,locon]", "adapter=[lora,locon]: choose one option"),
    setting("adapter=nope", "adapter=nope: there is no such option; choose one of dora"),
    setting("model=null", "a group takes the name of an option"),
    setting("model.path=", "model.path is empty"),
    setting("model._target_=builtins.eval", "model._target_=builtins.eval: is no class of settings"),
    setting("+nope=1", "nope: there is no such setting; there are adapter"),
    setting("optimizer.unet_lr=nan", "optimizer.unet_lr=nan: must be"),
    setting("optimizer.unet_lr=1e400", "optimizer.unet_lr=inf: must be a finite number"),
    setting("optimizer.type=os.system", "optimizer.type=os.system: os has no class system"),
    setting("optimizer.type=builtins.int", "optimizer.type=builtins.int: builtins has no class int"),
    setting("trainer.batch_size=-1", "trainer.batch_size=-1: must be greater than 0"),
    setting("trainer.max_train_epochs=1.5", "trainer.max_train_epochs=1.5: must be a valid integer"),
    setting("seed=true", "seed=True: must be a whole number"),
    setting("dataset.resolution=100000", "at most 8192 a side"),
    setting("dataset.resolution=63", "this model needs multiples of 4 of at least 32 pixels"),
    setting("dataset.resolution=8", "this model needs multiples of 4 of at least 32 pixels"),
    setting("dataset.enable_bucket=true dataset.bucket_reso_steps=7 dataset.min_bucket_reso=32", "dataset.bucket_reso_steps=7: this model needs multiples of 4"),
    setting("dataset.enable_bucket=true dataset.max_bucket_reso=1000000000", "must be less than or equal to 8192"),
    setting("model.clip_skip=100", "model.clip_skip=100: the text encoder has 2 layers"),
    setting("trainer.max_train_epochs=1000000000", "must be less than or equal to 10000"),
    setting("trainer.gradient_accumulation_steps=1000000000", "must be less than or equal to 10000"),
    setting("metrics.validation.num_timesteps=1000000000", "must be less than or equal to 1000"),
    setting("metrics.validation.num_bootstrap=1000000000", "must be less than or equal to 10000"),
    setting("cache_dir=/dev/null", "cache_dir=/dev/null: /dev/null is no folder"),
    setting("cache_dir=/dev/null/deeper", "/dev/null is no folder"),
    setting("cache_dir=/proc/none/cache", "cache_dir=/proc/none/cache: /proc can't be written"),
    setting("model.path=/dev/zero", "model.path=/dev/zero: /dev/zero is a device or a pipe"),
    setting("model.path=photos", "can't be loaded: model_index.json", "a folder of anything for a model"),
    setting("tracking.uri=ftp://x/y", "MLflow keeps nothing by ftp"),
    setting("tracking.uri=http://", "tracking.uri=http://: names no place"),
    setting("tracking.uri=http://127.0.0.1:999999", "is no address"),
    setting("tracking.uri=http://me:secret@x:1:2", "tracking.uri=http://***@x:1:2: is no address"),
    setting("tracking.uri=sqlite:////dev/null/x.db", "/dev/null is no folder"),
    setting(f"tracking.experiment={'x' * 1000}", "use at most 500 letters", "an experiment of 1,000 letters"),
    setting(f"tracking.registered_model={'x' * 1000}", "use at most 256 letters", "a registered model of 1,000 letters"),
    setting("tracking.registered_model=a/b", "use no / and no : in it"),
    setting("dataset.num_holdout=-1", "dataset.num_holdout=-1: must be"),
    setting("sampling.prompts=['a --w 100000000']", "is more than 8192 pixels"),
    setting("sampling.prompts=['a --w x']", "wants a number", "a word for a width"),
    setting("sampling.scheduler=KarrasVeScheduler", "diffusers has no such scheduler"),
    setting("metrics=[nope]", "metrics=nope: there is no such option"),
    setting("tracking.uri=file:///x", "MLflow no longer keeps runs in plain files"),
    setting("pick.by=nope", "pick.by=nope: no metric gives such a score; there are"),
    setting("name=..", "name=..: use letters"),
    setting("name=-rf", "name=-rf: begin with a letter"),
    setting("--config-dir /nonexistent", "--config-dir /nonexistent: there is no such folder"),
    setting("--config-path /etc", "unrecognized arguments: --config-path"),
    setting("name=../../x", "name=../../x: use letters"),
    setting("'name=\"a/b\"'", "name=a/b: use letters", "a slash in a run's name"),
    setting("'name=a\nb'", "name=a?b: can't be read", "a line end in a run's name"),
    setting(f"name={'x' * 300}", "use at most 100 bytes", "a name of 300 letters"),
    option("YAML that is none", "is not YAML of plain values", "rank: [\n"),
    option("YAML of a list", "Cannot merge DictConfig with ListConfig", "[1,2]"),
    option("YAML that is not UTF-8", "is not UTF-8 text", b"\xff\xfe\x00"),
    option("YAML that would run a command", "is not YAML of plain values", "!!python/object/apply:os.system ['touch PWNED']\n"),
    option("YAML that names a class of Python's", "is no class of settings", "_target_: subprocess.Popen\nargs: [touch, PWNED]\n"),
    option("YAML with half of the settings", "is missing: give it as", "_target_: lorasweep.adapters.lora.LoRA\nrank: 4\n"),
    option("YAML with a key twice", "duplicate key rank", "rank: 4\nrank: 5\n"),
]  # fmt: skip

SWEEPS = [
    Case("no sweep of that name", "sweep nope", "sweeps=nope: there is no such option; choose one of", lambda _: None),
    Case("a sweep at ../x", "sweep ../x", "../x: a sweep's name comes first", lambda _: None),
    Case("a sweep's name left out", "sweep a=b", "a=b: a sweep's name comes first", lambda _: None),
    Case("an empty range", f"{TRAIN.replace('train', 'sweep rank_lr')} adapter.rank=range(4,2)", "the range is empty", lambda _: None),
    Case("an empty range of a multirun", f"{TRAIN.replace('train', 'train -m')} adapter.rank=range(0,0)", "adapter.rank=range(0,0): the range is empty", lambda _: None),
    Case("a study out of the folder", f"{TRAIN.replace('train', 'sweep rank_lr')} study.name=../../x", "study.name=../../x: use letters", lambda _: None),
    Case("a setting no study has", f"{TRAIN.replace('train', 'sweep rank_lr')} study.nope=1", "study.nope: there is no such setting", lambda _: None),
    Case("a damaged journal", "ui --optuna x-s", "is damaged, or no journal of a study", file("outputs/x/s/study.journal", "{}\n")),
    Case("a pipe for a study", f"{TRAIN.replace('train', 'sweep rank_lr')} study.storage=p captions=[empty]", "p is not a file", fifo("p")),
    Case("a journal that is not UTF-8", "ui --optuna x-s", "is damaged, or no journal", file("outputs/x/s/study.journal", b"\xff\xfe\n")),
    Case("a journal of the future", "ui --optuna x-s", "is damaged, or no journal", file("outputs/x/s/study.journal", '{"op_code":99,"worker_id":"a"}\n')),
    Case("a multirun for a dead server", f"{TRAIN.replace('train', 'train -m')} adapter.rank=4,8 tracking.uri=http://127.0.0.1:9", "can't be opened: connection refused", lambda _: None),
    Case("a sweep for a dead server", f"{TRAIN.replace('train', 'sweep rank_lr')} tracking.uri=http://127.0.0.1:9", "can't be opened: connection refused", lambda _: None),
    Case("one bad value of a grid", f"{TRAIN.replace('train', 'train -m')} adapter.rank=4,nope", "adapter.rank=nope: must be a valid integer", lambda _: None),
    Case("one bad option of a grid", f"{TRAIN.replace('train', 'train -m')} adapter=lora,nope", "adapter=nope: there is no such option", lambda _: None),
    Case("one folder of two isn't there", f"{TRAIN.replace('train', 'train -m')} dataset.image_dir=BASE,nope", "dataset.image_dir=", lambda _: None),
    Case("a grid in a name out of the folder", f"{TRAIN.replace('train', 'train -m')} name=../x adapter.rank=2,4", "name=../x: use letters", lambda _: None),
]  # fmt: skip

# Commands and the store

COMMANDS = [
    Case("no command", "", "required: COMMAND; see lorasweep --help", lambda _: None),
    Case("a command that isn't there", "nope", "nope: there is no such command", lambda _: None),
    Case("a flag that isn't there", "doctor --nope", "unrecognized arguments: --nope", lambda _: None),
    Case("a word too many", "doctor x", "x: not understood", lambda _: None),
    Case("the doctor of a wrong value", "doctor adapter.rank=0", "adapter.rank=0: must be", lambda _: None),
    Case("no port", "ui --port x", "argument --port", lambda _: None),
    Case("a port that can't be", "ui --port 70000", "give a port from 1024 to 65535", lambda _: None),
    Case("a port of the system's", "ui --port 22", "give a port from 1024 to 65535", lambda _: None),
    Case("no study to show", "ui --optuna ../x", "there is no such sweep with a study", lambda _: None),
    Case("nothing to pick from", "pick", "nothing is tracked yet", lambda _: None),
    Case("pick --epoch x", "pick --epoch x", "argument --epoch", lambda _: None),
    Case("pick --limit -1", "pick --limit -1", "give a number of at least 1", lambda _: None),
    Case("a store that is junk", "pick", "can't be opened", file("outputs/mlflow.db", "junk" * 1000)),
    Case("a folder for a store", "pick", "is not a file; give another output_root", directory("outputs/mlflow.db")),
    Case("a store of an unknown kind", "pick tracking.uri=nope", "tracking.uri=nope", lambda _: None),
]  # fmt: skip

# LoRA files

DOWN, UP, ALPHA = (f"{KEY}.{name}" for name in ("lora_down.weight", "lora_up.weight", "alpha"))
SHAPES = {DOWN: ([2, 3], 0, 24), UP: ([4, 2], 24, 56)}
NAN, WHOLE = float("nan"), save(lora_tensors())
OTHER = lora_tensors(key="lora_unet_down_blocks_9_attentions_0_proj_in")


def bad_lora(name: str, says: str, make: Maker, command: str = "info a.safetensors") -> Case:
    return Case(name, command, says, make)


def raw(head: bytes, data: bytes = bytes(56), length: int | None = None) -> Maker:
    return file("a.safetensors", safetensors(head, data, length))


LORAS = [
    bad_lora("no LoRA file", "no such file", lambda _: None),
    bad_lora("a LoRA of zero bytes", "it has 0 bytes", file("a.safetensors")),
    bad_lora("a cut LoRA", "its header claims", file("a.safetensors", WHOLE[:300])),
    bad_lora("a LoRA without its last bytes", "bytes of data, the file has", file("a.safetensors", WHOLE[:-4])),
    bad_lora("a header of 2**62 bytes", "header claims", raw(b"{}", b"", 2**62)),
    bad_lora("a header that is not JSON", "header is not JSON", raw(b"{not json")),
    bad_lora("a header nested without end", "header is not JSON", raw(b"[" * 200_000)),
    bad_lora("offsets that overlap", "overlaps", raw(header_of({**SHAPES, UP: ([4, 2], 20, 52)}))),
    bad_lora("a shape of 2**80 values", "data_offsets", raw(header_of({**SHAPES, UP: ([2**40, 2**40], 24, 56)}))),
    bad_lora("weights of whole numbers", "which no weights are", raw(header_of(SHAPES, "I32"))),
    bad_lora("NaN in a LoRA", "not finite", lora(lora_tensors(**{"lora_up.weight": torch.full((32, 2, 1, 1), NAN)}))),
    bad_lora("an infinite alpha", "not finite", lora(lora_tensors(alpha=torch.tensor(float("inf"))))),
    bad_lora("factors that don't fit", "don't fit each other", lora(lora_tensors(**{"lora_up.weight": torch.ones(32, 3, 1, 1)}))),
    bad_lora("a file without tensors", "holds no tensors", file("a.safetensors", save({}))),
    bad_lora("names of nothing", "no names of a LoRA", lora({"a.b": torch.zeros(2)})),
    bad_lora("a terminal's code as a name", "?[31m", lora({"\x1b[31m.b": torch.zeros(2)})),
    bad_lora("a whole model for a LoRA", "no names of a LoRA", file("a.safetensors", save({"conv_in.weight": torch.zeros(2)}))),
    bad_lora("a pickle named safetensors", "is not a whole safetensors file", file("a.safetensors", PICKLE)),
    bad_lora("a zip named safetensors", "is not a whole safetensors file", file("a.safetensors", b"PK\x03\x04" + bytes(60))),
    bad_lora("a .ckpt", "only .safetensors files are read", file("a.ckpt", PICKLE), "info a.ckpt"),
    bad_lora("a .pt", "only .safetensors files are read", file("a.pt", PICKLE), "info a.pt"),
    bad_lora("a folder for a LoRA", "is a folder", directory("a.safetensors")),
    bad_lora("a pipe for a LoRA", "is a device or a pipe", fifo("a.safetensors")),
    bad_lora("a LoRA that links to itself", "symbolic links", link("a.safetensors", "a.safetensors")),
    bad_lora("PEFT's config nested without end", "is not JSON", both(lora({f"unet.x.lora_{n}.weight": torch.zeros(2, 2) for n in "AB"}, "adapter_model.safetensors"), file("adapter_config.json", "[" * 100_000)), "info adapter_model.safetensors"),
    bad_lora("resize without a rank", "say to what", lora(), "resize a.safetensors"),
    bad_lora("resize to rank 0", "--rank 0: give 1 to", lora(), "resize a.safetensors --rank 0"),
    bad_lora("resize to NaN", "--energy nan", lora(), "resize a.safetensors --energy nan"),
    bad_lora("resize over itself", "exists already", lora(), "resize a.safetensors --rank 1 --out a.safetensors"),
    bad_lora("resize to a pickle", "ends in .safetensors", lora(), "resize a.safetensors --rank 1 --out r.ckpt"),
    bad_lora("resize below a file", "a file is where a folder is needed", both(lora(), file("f", "x")), "resize a.safetensors --rank 1 --out f/r.safetensors"),
    bad_lora("resize with no base", "HF_HUB_OFFLINE is set: nothing is downloaded", lora(), "resize a.safetensors --rank 1 --model nobody/nothing"),
    bad_lora("resize with a LoRA for a base", "is a LoRA, not a whole model", lora(), "resize a.safetensors --rank 1 --model a.safetensors"),
    bad_lora("export of a base unknown", "which base model is it for?", lora(), "export a.safetensors --to merged"),
    bad_lora("export of no run", "nothing is tracked yet", lora(), "export ../x --to merged"),
    bad_lora("export to what isn't there", "--to: nope: there is no such form or program", lora(), "export a.safetensors --to nope"),
    bad_lora("export at NaN", "--strength nan", lora(), "export a.safetensors --to merged model=embedded --strength nan"),
    bad_lora("export with NaN of another", "--with a.safetensors=nan: give a number", lora(), "export a.safetensors --to merged model=embedded --with a.safetensors=nan"),
    bad_lora("export of a pickle", "only .safetensors files are read", file("a.ckpt", PICKLE), "export a.ckpt --to diffusers-lora model=embedded"),
    bad_lora("a LoRA of another base, merged", "a.safetensors: lora_unet_down_blocks_0", lora(lora_tensors(size=320)), "export a.safetensors --to merged model=embedded --out e"),
    bad_lora("a LoRA of which half fits", "the base model has no such module", lora(lora_tensors() | OTHER), "export a.safetensors --to diffusers-lora model=embedded --out e.safetensors"),
    bad_lora("a header of 75 MB", "header of 75 MB is longer than any model's", raw(b" " * 75_000_000)),
    bad_lora("30,000 tensors", "it claims 30000 tensors", raw(header_of({f"x{n}": ([1], 4 * n, 4 * n + 4) for n in range(30_000)}), bytes(120_000))),
    bad_lora("a socket for a LoRA", "is a device or a pipe", socket_at("a.safetensors")),
    bad_lora("a device for a LoRA", "is a device or a pipe", link("a.safetensors", "/dev/zero")),
    *(
        bad_lora(f"a pipe: {command}", "is a device or a pipe", both(lora(), fifo("p.safetensors")), command)
        for command in (
            "resize p.safetensors --rank 1",
            "resize a.safetensors --rank 1 --model p.safetensors --out r.safetensors",
            "export p.safetensors --to merged model=embedded --out e",
            "extract p.safetensors BASE --rank 2 --out x.safetensors",
            "reproduce p.safetensors",
        )
    ),
    bad_lora("a pipe among merged LoRAs", "is a device or a pipe", both(lora(), fifo("p.safetensors")), "export a.safetensors --to merged model=embedded --out e --with p.safetensors=1"),
    bad_lora("a pipe of any name to export", "only .safetensors files are read", fifo("p"), "export p --to merged"),
    bad_lora("a pipe of any name to extract", "p is a device or a pipe", fifo("p"), "extract BASE p --rank 2 --out x.safetensors"),
    bad_lora("a folder to extract from", "model_index.json: No such file", directory("d"), "extract d BASE --rank 2 --out x.safetensors"),
    bad_lora("PEFT's config of a number of 6,000 digits", "is not JSON", both(lora({f"unet.x.lora_{n}.weight": torch.zeros(2, 2) for n in "AB"}, "adapter_model.safetensors"), file("adapter_config.json", '{"r":' + "1" * 6000 + "}")), "info adapter_model.safetensors"),
    bad_lora("extract to rank 0", "--rank 0: give 1 to", lora(), "extract BASE BASE --rank 0 --out x.safetensors"),
    bad_lora("extract from a LoRA", "is a LoRA, not a whole model", lora(), "extract a.safetensors BASE --rank 2 --out x.safetensors"),
    bad_lora("extract from a pickle", "is a pickled checkpoint", file("a.ckpt", PICKLE), "extract a.ckpt BASE --rank 2 --out x.safetensors"),
    bad_lora("extract from equals", "the same weights in all targets", lora(), "extract BASE BASE --rank 2 --out x.safetensors"),
]  # fmt: skip

# Base models: folders and single files, met by `convert`, which reads and draws with them

UNET, TEXT, VAE = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"  # fmt: skip


def damaged(
    name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Maker:
    """Change a weight file's tensors."""

    def make(folder: Path) -> None:
        content = save(change(load_file(folder / name)), {"format": "pt"})
        replaced(name, content)(folder)

    return make


def with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = min(tensors)
    broken = tensors[name].clone()
    broken.view(-1)[-1] = NAN
    return {**tensors, name: broken}


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensors[name] for name in sorted(tensors)[::2]}


def model(name: str, says: str, *changes: Maker) -> Case:
    makers = {str(number): change for number, change in enumerate(changes)}
    return Case(name, "convert model m.safetensors", says, base(**makers))


def pickled(folder: Path) -> None:
    """The weights as pickles alone, as old repositories have them."""
    for name in (UNET, TEXT, VAE):
        (folder / name).unlink()
        (folder / name).with_suffix(".bin").write_bytes(PICKLE)


MODELS = [
    model("an empty folder for a model", "no model_index.json", without("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")),
    model("an index that is not JSON", "model_index.json is not JSON", file("model_index.json", "{")),
    model("an index nested without end", "model_index.json is not JSON", file("model_index.json", "[" * 100_000)),
    model("an index of a list", "should hold a dict, but is a list", file("model_index.json", "[]")),
    model("an SDXL folder", "SDXL comes later", edited("model_index.json", _class_name="StableDiffusionXLPipeline")),
    model("a Flux folder", "is a FluxPipeline", edited("model_index.json", _class_name="FluxPipeline")),
    model("a terminal's code as a class", "is a ?[31mX", edited("model_index.json", _class_name="\x1b[31mX\n")),
    model("a UNet of SD2's width", "the configs say (32, 1024)", edited("unet/config.json", cross_attention_dim=1024)),
    model("a UNet for inpainting", "the configs say (32, 9, 3, 3)", edited("unet/config.json", in_channels=9)),
    model("a UNet's config of a list", "should hold a dict, but is a list", file("unet/config.json", "[1]")),
    model("a UNet's config of wrong types", "can't be loaded: Must provide", edited("unet/config.json", block_out_channels="x")),
    model("a VAE's scale that is no number", "scaling_factor is no number", edited("vae/config.json", scaling_factor="x")),
    model("a schedule that isn't there", "nope is not implemented", edited("scheduler/scheduler_config.json", beta_schedule="nope")),
    model("a schedule without steps", "can't be loaded", edited("scheduler/scheduler_config.json", num_train_timesteps=0)),
    model("a prediction nobody trains", "prediction_type sample is not known", edited("scheduler/scheduler_config.json", prediction_type="sample")),
    model("no UNet", "unet/config.json: No such file", without("unet")),
    model("no tokenizer", "has no tokenizer", without("tokenizer")),
    model("a tokenizer without words", "no tokenizer in it", without("tokenizer/tokenizer.json", "tokenizer/vocab.json")),
    model("a tokenizer of junk", "can't be loaded", file("tokenizer/tokenizer.json", "x"), file("tokenizer/vocab.json", "x")),
    model("no weights of the UNet", "is missing; only safetensors", without(UNET)),
    model("a folder for weights", "is missing; only safetensors", without(UNET), directory(UNET)),
    model("weights that link to themselves", "is missing; only safetensors", without(UNET), link(UNET, Path(UNET).name)),
    model("weights as pickles alone", "not pickles", pickled),
    model("weights of zero bytes", "is not a whole safetensors file", replaced(UNET, b"")),
    model("cut weights", "is not a whole safetensors file", replaced(TEXT, (BASE / TEXT).read_bytes()[:10_000])),
    model("weights with a header of 2**62 bytes", "is not a whole safetensors file", replaced(VAE, safetensors(b"{}", b"", 2**62))),
    model("a LoRA for a UNet", "444 of the unet's 444 tensors are missing", replaced(UNET, WHOLE)),
    model("half a text encoder", "18 of the text_encoder's 36 tensors are missing", damaged(TEXT, half)),
    model("NaN in the VAE", "the vae's decoder.conv_in.bias holds values that are not finite", damaged(VAE, with_nan)),
    Case("a hub id, offline", "convert nobody/nothing m.safetensors", "HF_HUB_OFFLINE is set, so nothing is downloaded", lambda _: None),
    model("a pipe in a tokenizer", "tokenizer/merges.txt is a device or a pipe", without("tokenizer/merges.txt"), fifo("tokenizer/merges.txt")),
    model("a pipe for a config", "unet/config.json is a device or a pipe", without("unet/config.json"), fifo("unet/config.json")),
    model("a device for a vocabulary", "tokenizer/vocab.json is a device or a pipe", without("tokenizer/vocab.json"), link("tokenizer/vocab.json", "/dev/zero")),
    model("a pipe for weights", "is a device or a pipe", without(UNET), fifo(UNET)),
    model("a vocabulary nested without end", "tokenizer/vocab.json is not JSON", file("tokenizer/vocab.json", "[" * 100_000)),
    model("a text encoder of a billion layers", "no model has num_hidden_layers of 1000000000", edited("text_encoder/config.json", num_hidden_layers=10**9)),
    model("a UNet of a billion layers", "no model has layers_per_block of 1000000000", edited("unet/config.json", layers_per_block=[2, 10**9])),
    model("weights with a header of 75 MB", "header of 75 MB is longer than any model's", replaced(UNET, safetensors(b" " * 75_000_000))),
    Case("a secret of this machine in a tokenizer", "export a.safetensors --to merged model.path=model --out e", "lies outside model: it is not read", both(lora(), base(), file("secret.json", "{}"), link("model/tokenizer/more.json", "../../secret.json"))),
    Case("a pipe for a model", "convert p m.safetensors", "SOURCE=p: p is a device or a pipe", fifo("p")),
    Case("a pipe for a single file", "convert p.safetensors out --config BASE", "p.safetensors is a device or a pipe", fifo("p.safetensors")),
    Case("a device for a model", "convert /dev/zero m.safetensors", "/dev/zero is a device or a pipe", lambda _: None),
    Case("a pipe for the configs", "convert s.safetensors out --config p", "--config=p: p is a device or a pipe", both(file("s.safetensors", save({"model.diffusion_model.x": torch.zeros(2)})), fifo("p"))),
    Case("a single file with a header of 75 MB", "convert s.safetensors out --config BASE", "header of 75 MB is longer than any model's", file("s.safetensors", safetensors(b" " * 75_000_000))),
    Case("a single file that isn't there", "convert s.safetensors out --config BASE", "SOURCE=s.safetensors: no such file", lambda _: None),
    Case("a single file of zero bytes", "convert s.safetensors out --config BASE", "is not a whole safetensors file", file("s.safetensors")),
    Case("a single file that is a LoRA", "convert s.safetensors out --config BASE", "is a LoRA, not a whole model", lora(name="s.safetensors")),
    Case("a single file of SDXL", "convert s.safetensors out --config BASE", "is an SDXL checkpoint", file("s.safetensors", save({"conditioner.embedders.0.x": torch.zeros(2)}))),
    Case("a single file of SD2", "convert s.safetensors out --config BASE", "is a Stable Diffusion 2 checkpoint", file("s.safetensors", save({"cond_stage_model.model.x": torch.zeros(2)}))),
    Case("a single file of Flux", "convert s.safetensors out --config BASE", "is a Flux checkpoint", file("s.safetensors", save({"double_blocks.0.x": torch.zeros(2)}))),
    Case("a single file without configs", "convert s.safetensors out --config nope", "--config=nope: no such file or folder", file("s.safetensors", save({"model.diffusion_model.x": torch.zeros(2)}))),
    Case("a .ckpt for a base", "convert s.ckpt out --config BASE", "others can run any code", file("s.ckpt", PICKLE)),
    Case("convert to where something is", "convert BASE m.safetensors", "exists already", file("m.safetensors", "mine")),
    Case("convert below a file", "convert BASE f/m.safetensors", "a file is where a folder is needed", file("f", "x")),
    Case("convert to its own kind", "convert BASE out", "are both a folder", lambda _: None),
    Case("convert to a type that isn't there", "convert BASE m.safetensors --dtype int8", "invalid choice: 'int8'", lambda _: None),
]  # fmt: skip

CASES = [*IMAGES, *CAPTIONS, *PLACES, *SWEEPS, *COMMANDS, *LORAS, *MODELS]


def test_the_table_is_as_long_as_promised():
    assert len(CASES) + len(SETTINGS) >= 200


@pytest.mark.parametrize("case", SETTINGS, ids=ids(SETTINGS))
def test_a_setting_is_refused_before_any_work_and_leaves_no_folder(case, here, capsys, monkeypatch):
    monkeypatch.setattr(session, "run_pack", lambda *_: pytest.fail("work was begun"))
    refused(case, here, capsys)
    assert not (here / "out").exists() and not (here / "cache").exists()


@pytest.mark.parametrize("case", [one for one in SWEEPS if "dead server" in one.name])
def test_a_server_that_is_away_is_told_before_a_sweep_leaves_a_folder(case, here, capsys):
    refused(case, here, capsys)
    assert not (here / "out").exists() and not (here / "outputs").exists()


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_bad_input_ends_in_one_line(case, here, capsys):
    refused(case, here, capsys)


# Repairs: what is taken all the same, and what becomes of it (docs/promises.md lists them)


@dataclass(frozen=True)
class Repair:
    """What a person gives, what is said of it, and what the written folders hold then."""

    name: str
    make: Maker
    captions: set[str]
    says: str = ""
    command: str = SIDECAR


def repaired_caption(name: str, content: str | bytes, becomes: str) -> Repair:
    return Repair(name, both(photos(1), file("photos/0.txt", content)), {becomes})


def repaired_image(name: str, *makers: Maker, says: str = "", count: int = 4) -> Repair:
    good = photos(3, captions=None)
    return Repair(name, both(good, *makers), {f"{count} images"}, says, EMPTY)


TAGS = ", ".join(f"tag {number}" for number in range(10_000))
TURNED = Image.Exif()
TURNED[0x0112] = 6
REPAIRS = [
    repaired_caption("a caption with a BOM", "\ufeffa cat\n", "a cat"),
    repaired_caption("a caption with CRLF", "a cat\r\n", "a cat"),
    Repair("a caption of several lines", both(photos(1), file("photos/0.txt", "a cat\nand a dog\n")), {"a cat"}, "only the first line is read"),
    repaired_caption("a caption with NUL and a bell", "a\0 c\x07at", "a cat"),
    repaired_caption("a caption with a terminal's code", "a \x1b[31mcat", "a [31mcat"),
    repaired_caption("a caption of zero bytes", b"", ""),
    repaired_caption("HTML in a caption", "<script>alert(1)</script>", "<script>alert(1)</script>"),
    repaired_caption("10,000 tags", TAGS, TAGS),
    Repair("half of a pair of UTF-16 in a JSONL", both(photos(1, None), file("c.jsonl", '{"file":"0.png","t":"a\\ud800 cat"}')), {"a cat"}, command=JSONL),
    Repair("one caption for a.png and a.jpg", both(file("photos/a.png", PNG), file("photos/a.jpg", JPEG), file("photos/a.txt", "a cat")), {"a cat"}),
    repaired_image("an image with a wrong extension", file("photos/a.jpg", PNG)),
    repaired_image("an animation", file("photos/a.gif", encoded(picture(), "GIF", save_all=True, append_images=[picture(3)]))),
    repaired_image("grey of 16 bits", file("photos/a.png", encoded(Image.fromarray(np.full((64, 64), 32896, np.uint16))))),
    repaired_image("CMYK", file("photos/a.jpg", encoded(picture(mode="CMYK"), "JPEG"))),
    repaired_image("a palette with transparency", file("photos/a.png", encoded(picture(mode="P"), transparency=1))),
    repaired_image("turned by EXIF", file("photos/a.jpg", encoded(picture(), "JPEG", exif=TURNED))),
    repaired_image("a name of 255 bytes", file("photos/" + "x" * 251 + ".png", PNG)),
    repaired_image("a good image whose name is not UTF-8", file(b"photos/\xff\xfe.png", PNG)),
    repaired_image("a good image whose name is HTML", file("photos/<img src=x onerror=alert(1)>.png", PNG)),
    repaired_image("a good image whose name has a line end", file("photos/a\nb.png", PNG)),
    repaired_image("a link out of the folder", file("secret.png", PNG), link("photos/a.png", "../secret.png"), says="ignored 1 links that lead out", count=3),
    repaired_image("a linked folder outside", file("s/s.png", PNG), link("photos/s", "../s"), says="ignored 1 links that lead out", count=3),
    repaired_image("a folder that holds itself", link("photos/sub", "."), count=3),
    repaired_image("a device for an image", link("photos/a.png", "/dev/zero"), says="ignored 1 links that lead out", count=3),
    repaired_image("a folder named as an image", directory("photos/a.png"), count=3),
    repaired_image("the same image twice", file("photos/0-again.png", encoded(picture(100))), says="1 duplicates are counted once", count=3),
    Repair("bad images left out on demand", both(photos(3, None), file("photos/a.png")), {"3 images"}, "left out 1 bad images", f"{EMPTY} dataset.skip_bad=true"),
]  # fmt: skip


@pytest.mark.parametrize("case", REPAIRS, ids=[case.name for case in REPAIRS])
def test_what_is_repaired_is_written_whole_and_said(case, here, capsys, caplog):
    case.make(here)
    with pytest.raises(SystemExit) as exit_:
        main.main(shlex.split(f"{case.command} dataset.num_holdout=0"))
    assert exit_.value.code == 0, capsys.readouterr().err
    assert case.says in caplog.text
    assert caplog.text.replace("\n", "").isprintable()
    (tree,) = (here / "out" / "datasets").glob("[!.]*")
    (arm,) = kohya_folders.read(tree / "train")
    found = {item.caption for item in arm.items}
    assert case.captions in (found, {f"{len(arm.items)} images"})
    for item in arm.items:
        assert item.path.name.isprintable()
        with Image.open(item.path) as opened:
            assert (opened.mode, opened.size) == ("RGB", (64, 64))


@pytest.mark.parametrize("folder", ["a=b", "a b, {x} [y]", "it's ${y}", "back\\slash", "ünï"])
def test_a_folder_of_images_may_have_any_name(folder, here):
    photos(captions=None)(here)
    (here / "photos").rename(here / folder)
    with pytest.raises(SystemExit) as exit_:
        main.main(["caption", folder, *EMPTY.split()[2:]])
    assert exit_.value.code == 0


# kohya's folders, edited by hand


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (file("train/10_wd/a.txt"), "is empty; kohya wants one newline"),
        (file("train/10_wd/a.txt", b"\xff\xfe"), "is not UTF-8 text"),
        (both(file("train/99999_x/a.png", PNG), file("train/99999_x/a.txt", "x\n")), "repeats are at most"),
        (both(file("train/9999999999999999999999_x/a.png", PNG)), "repeats are at most"),
    ],
)  # fmt: skip
def test_a_folder_that_was_edited_badly_is_one_line(make, says, tmp_path):
    both(file("train/10_wd/a.png", PNG), make)(tmp_path)
    with pytest.raises(FoldersError, match=says) as error:
        kohya_folders.read(tmp_path / "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "says", "count"),
    [
        (file("train/ten_wd/b.png", PNG), "it is not named like 10_name", 1),
        (file("train/0_wd/b.png", PNG), "it is not named like 10_name", 1),
        (directory("train/10_none"), "there are no images in it", 1),
        (file("train/10_wd/b.png", PNG), "no .txt file for b.png; their caption is", 2),
        (file("train/10_wd/a.txt", "one\ntwo\n"), "only the first line is read", 1),
        (file("train/10_wd/notes.md", "x"), "", 1),
    ],
)
def test_a_folder_that_was_edited_oddly_is_read_and_said(make, says, count, tmp_path, caplog):
    both(file("train/10_wd/a.png", PNG), file("train/10_wd/a.txt", "x\n"), make)(tmp_path)
    arms = kohya_folders.read(tmp_path / "train")
    assert sum(len(arm.items) for arm in arms) == count
    assert says in caplog.text


# Disks


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (both(photos(captions=None), closed("photos/0.png")), "0.png: cannot be decoded: Permission denied"),
        (both(photos(captions=None), closed("photos")), "Permission denied"),
        (both(photos(captions=None), directory("out"), closed("out")), "Permission denied"),
    ],
)  # fmt: skip
def test_what_may_not_be_read_or_written_is_one_line(make, says, here, capsys):
    make(here)
    shut = [path for path in here.rglob("*") if not path.stat().st_mode & 0o777]
    if os.access(shut[0], os.R_OK):
        pytest.skip("root's rights: everything may be read and written")
    with pytest.raises(SystemExit):
        main.main(shlex.split(EMPTY))
    told = capsys.readouterr().err
    assert told.startswith("lorasweep: ") and says in told
    for path in (here / "out", here / "photos", *(here / "photos").glob("*")):
        if path.exists():
            path.chmod(0o755)


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        (EMPTY, 2_000),
        ("resize a.safetensors --rank 1", 200),
        ("convert BASE m.safetensors", 100_000),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(command, limit, here, capsys):
    """A limit on the size of files stands for the disk: the write fails in its middle."""
    import resource

    both(photos(captions=None), lora())(here)
    before = outputs(here)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(SystemExit) as exit_:
            main.main(shlex.split(command.replace("BASE", str(BASE))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capsys.readouterr().err
    assert exit_.value.code == 2
    assert told.startswith("lorasweep: ") and "File too large" in told
    assert len(told.splitlines()) == 1
    assert outputs(here) == before
    assert not list(here.glob(".m.safetensors*")) and not list(here.glob(".a-resized*"))
