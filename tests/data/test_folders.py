"""kohya's folders: what is written, what a second writing does, and how they are read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorasweep.data import kohya_folders
from lorasweep.data.dataset import ImageFile, ImageSet
from lorasweep.data.image_files import open_image
from lorasweep.data.kohya_folders import ArmCaptions, FoldersError


def image_file(root: Path, name: str, seed: int = 0, mode: str = "RGB", **options) -> ImageFile:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    width, height = open_image(path).size
    return ImageFile(path, name, hashlib.sha256(path.read_bytes()).hexdigest(), width, height)


@pytest.fixture
def image_set(tmp_path) -> ImageSet:
    source = tmp_path / "source"
    return ImageSet(
        train=(image_file(source, "a.png", 1), image_file(source, "b.jpg", 2)),
        holdout=(image_file(source, "c.png", 3),),
    )


def two_arms(*texts: str) -> dict[str, ArmCaptions]:
    return {
        "empty": ArmCaptions(10, ("",) * len(texts), "empty"),
        "wd": ArmCaptions(2, texts, "wd14 somewhere"),
    }


def tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_each_arm_gets_a_folder_in_both_splits(tmp_path, image_set):
    root = kohya_folders.write(image_set, two_arms("red, one", "blue", "green"), tmp_path / "out")
    assert set(tree(root)) == {
        "manifest.json",
        *(f"images/{name}" for name in ["a.png", "b.jpg", "c.png"]),
        *(f"train/{arm}/{n}" for arm in ["10_empty", "2_wd"] for n in ["a.png", "b.jpg"]),
        *(f"train/{arm}/{n}" for arm in ["10_empty", "2_wd"] for n in ["a.txt", "b.txt"]),
        *(f"holdout/{arm}/{n}" for arm in ["10_empty", "2_wd"] for n in ["c.png", "c.txt"]),
    }
    assert (root / "train/2_wd/a.txt").read_bytes() == b"red, one\n"


def test_an_empty_caption_is_a_file_of_one_newline(tmp_path, image_set):
    root = kohya_folders.write(image_set, two_arms("x", "y", "z"), tmp_path / "out")
    assert (root / "train/10_empty/a.txt").read_bytes() == b"\n"


def test_images_of_the_arms_are_hard_links(tmp_path, image_set):
    root = kohya_folders.write(image_set, two_arms("x", "y", "z"), tmp_path / "out")
    assert (root / "images/a.png").samefile(root / "train/2_wd/a.png")
    assert not (root / "images/a.png").samefile(image_set.train[0].path)


def test_images_are_copied_where_links_are_impossible(tmp_path, image_set, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    root = kohya_folders.write(image_set, two_arms("x", "y", "z"), tmp_path / "out")
    copy = root / "train/2_wd/a.png"
    assert copy.read_bytes() == (root / "images/a.png").read_bytes()
    assert copy.stat().st_nlink == 1


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
def test_a_plain_image_is_copied_byte_by_byte(tmp_path, name):
    image = image_file(tmp_path / "source", name)
    root = kohya_folders.write(ImageSet((image,), ()), two_arms("x"), tmp_path / "out")
    assert (root / "images" / name).read_bytes() == image.path.read_bytes()


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tif", "RGB"), ("a.png", "RGBA"), ("a.jpg", "CMYK"), ("a.gif", "P")]
)
def test_any_other_image_becomes_a_png_of_the_same_pixels(tmp_path, name, mode):
    image = image_file(tmp_path / "source", name, mode=mode)
    root = kohya_folders.write(ImageSet((image,), ()), two_arms("x"), tmp_path / "out")
    with Image.open(root / "images/a.png") as copy:
        assert copy.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(copy), np.asarray(open_image(image.path)))


def test_a_turned_image_is_written_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = image_file(tmp_path / "source", "a.jpg", exif=exif)
    root = kohya_folders.write(ImageSet((image,), ()), two_arms("x"), tmp_path / "out")
    assert (image.width, image.height) == (16, 24)
    with Image.open(root / "images/a.png") as copy:
        assert copy.size == (16, 24)


def test_a_wrong_suffix_is_mended_in_the_copy(tmp_path):
    png = image_file(tmp_path / "source", "a.png")
    image = ImageFile(png.path.rename(tmp_path / "a.jpg"), "a.jpg", png.sha256, 24, 16)
    root = kohya_folders.write(ImageSet((image,), ()), two_arms("x"), tmp_path / "out")
    assert (root / "images/a.png").is_file()


def test_images_of_one_stem_do_not_collide(tmp_path):
    names = ["a.png", "a.jpg", "sub/a.png", "sub_a.png", "A.webp", "other/a.bmp", "sub/a b.png"]
    images = tuple(image_file(tmp_path / "in", name, seed) for seed, name in enumerate(names))
    captions = {"wd": ArmCaptions(1, tuple(names), "test")}
    root = kohya_folders.write(ImageSet(images, ()), captions, tmp_path / "out")
    (arm,) = kohya_folders.read(root / "train")
    assert sorted(item.caption for item in arm.items) == sorted(names)
    assert len({item.path.stem.casefold() for item in arm.items}) == len(names)
    for item in arm.items:
        source = images[names.index(item.caption)]
        assert item.path.read_bytes() == source.path.read_bytes()


@pytest.mark.parametrize(
    "name",
    ["../../out.png", "...png", "-rf.png", "ü/naïve [1] ~$x.png", "x" * 240 + ".png", "\udcff.png"],
)
def test_file_names_are_safe_and_stay_inside(tmp_path, name):
    real = image_file(tmp_path / "source", "real.png")
    image = ImageFile(real.path, name, real.sha256, 24, 16)
    root = kohya_folders.write(ImageSet((image,), ()), two_arms("x"), tmp_path / "out")
    (copy,) = (root / "images").iterdir()
    assert copy.parent == root / "images"
    assert copy.name[0] not in ".-"
    assert not set(copy.name) & set(" [~$")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.parametrize("arm", ["a/b", "..", "", "a b", "x" * 300])
def test_an_arm_that_is_no_folder_name_is_refused(tmp_path, image_set, arm):
    with pytest.raises(FoldersError, match="becomes a folder"):
        kohya_folders.write(image_set, {arm: ArmCaptions(1, ("",) * 3, "empty")}, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("two\nlines\r\n and  a\ttab ", "two lines and a tab"),
        ("bell\x07 and \x00nul", "bell and nul"),
        ("\ufeffmark\u2028and\x85more", "mark and more"),
        ("naïve, 猫, 👩‍👩‍👧", "naïve, 猫, 👩‍👩‍👧"),
        ("half \ud83d a pair", "half  a pair"),
        (" \n ", ""),
    ],
)
def test_a_caption_is_one_clean_line(tmp_path, image_set, text, line):
    root = kohya_folders.write(image_set, two_arms(text, "", ""), tmp_path / "out")
    assert (root / "train/2_wd/a.txt").read_bytes() == f"{line}\n".encode()


def test_the_manifest_says_what_was_written_and_what_from(tmp_path, image_set):
    root = kohya_folders.write(image_set, two_arms("red", "blue", "green"), tmp_path / "out")
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["arms"] == {
        "empty": {"repeats": 10, "captioner": "empty"},
        "wd": {"repeats": 2, "captioner": "wd14 somewhere"},
    }
    assert manifest["digest"] == image_set.digest
    assert [image["split"] for image in manifest["images"]] == ["train", "train", "holdout"]
    assert manifest["images"][0] == {
        "file": "a.png",
        "copy": "images/a.png",
        "sha256": image_set.train[0].sha256,
        "width": 24,
        "height": 16,
        "split": "train",
        "captions": {"empty": "", "wd": "red"},
    }


def test_the_same_input_leaves_the_same_tree(tmp_path, image_set):
    root = kohya_folders.write(image_set, two_arms("x", "y", "z"), tmp_path / "out")
    before, inode = tree(root), (root / "manifest.json").stat().st_ino
    kohya_folders.write(image_set, two_arms("x", "y", "z"), root)
    assert tree(root) == before
    assert (root / "manifest.json").stat().st_ino == inode
    assert (
        tree(kohya_folders.write(image_set, two_arms("x", "y", "z"), tmp_path / "other")) == before
    )


def test_edits_stay_when_the_same_input_is_written_again(tmp_path, image_set):
    root = kohya_folders.write(image_set, two_arms("x", "y", "z"), tmp_path / "out")
    (root / "train/2_wd/a.txt").write_text("better\n")
    kohya_folders.write(image_set, two_arms("x", "y", "z"), root)
    assert (root / "train/2_wd/a.txt").read_text() == "better\n"


def edit(root: Path) -> Path:
    path = root / "train/2_wd/a.txt"
    path.write_text("better\n")
    return path


def add(root: Path) -> Path:
    return (root / "images/a.png").rename(root / "train/2_wd/mine.png")


def remove(root: Path) -> Path:
    (path := root / "holdout/2_wd/c.png").unlink()
    return path


@pytest.mark.parametrize("change", [edit, add, remove])
def test_edits_are_not_overwritten_by_other_input(tmp_path, image_set, change):
    root = kohya_folders.write(image_set, two_arms("x", "y", "z"), tmp_path / "out")
    changed = change(root)
    before = tree(root)
    with pytest.raises(FoldersError, match="was edited since it was written") as error:
        kohya_folders.write(image_set, two_arms("other", "y", "z"), root)
    assert changed.relative_to(root).as_posix() in str(error.value)
    assert tree(root) == before


def test_other_input_replaces_a_tree_that_was_not_edited(tmp_path, image_set):
    root = kohya_folders.write(image_set, two_arms("x", "y", "z"), tmp_path / "out")
    (root / "train/2_wd/a_24x16_sd.npz").write_bytes(b"kohya's latents")
    kohya_folders.write(image_set, {"wd": ArmCaptions(5, ("other", "y", "z"), "test")}, root)
    assert [path.name for path in (root / "train").iterdir()] == ["5_wd"]
    assert (root / "train/5_wd/a.txt").read_text() == "other\n"
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_tree_that_another_process_wrote_meanwhile_is_kept(tmp_path, image_set, monkeypatch):
    captions, root = two_arms("x", "y", "z"), tmp_path / "out"
    inodes = []

    def write_first(*args) -> None:
        monkeypatch.undo()
        kohya_folders.write(image_set, captions, root)
        inodes.append(root.stat().st_ino)

    monkeypatch.setattr(kohya_folders, "_refuse_to_overwrite", write_first)
    kohya_folders.write(image_set, captions, root)
    assert [root.stat().st_ino] == inodes


def test_a_folder_of_others_is_not_touched(tmp_path, image_set):
    root = tmp_path / "out"
    root.mkdir()
    kohya_folders.write(image_set, two_arms("x", "y", "z"), root)  # empty: taken
    other = tmp_path / "other"
    other.mkdir()
    (other / "diary.txt").write_text("mine")
    with pytest.raises(FoldersError, match="was not written by lorasweep"):
        kohya_folders.write(image_set, two_arms("x", "y", "z"), other)
    assert tree(other) == {"diary.txt": b"mine"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda manifest: [1],
        lambda manifest: {**manifest, "images": 3},
        lambda manifest: {**manifest, "images": [{"copy": "a.png"}]},
        lambda manifest: {**manifest, "images": [{**manifest["images"][0], "captions": ["x"]}]},
        lambda manifest: {**manifest, "arms": {}},
        lambda manifest: {"inputs": manifest["inputs"]},
        lambda manifest: "[" * 100_000,
    ],
)
def test_a_manifest_of_another_shape_is_none_of_ours(tmp_path, image_set, damage):
    root = kohya_folders.write(image_set, two_arms("x", "y", "z"), tmp_path / "out")
    file = root / "manifest.json"
    changed = damage(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(FoldersError, match="was not written by lorasweep"):
        kohya_folders.write(image_set, two_arms("x", "y", "z"), root)


def test_an_image_that_changed_meanwhile_stops_the_writing_and_leaves_nothing(tmp_path, image_set):
    image_file(tmp_path / "source", "c.png", seed=9)
    with pytest.raises(FoldersError, match=r"c\.png changed"):
        kohya_folders.write(image_set, two_arms("x", "y", "z"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_written_is_read_back(tmp_path, image_set):
    root = kohya_folders.write(image_set, two_arms("red, one", "blue", "green"), tmp_path / "out")
    empty, wd = kohya_folders.read(root / "train")
    assert (empty.name, empty.repeats, wd.name, wd.repeats) == ("empty", 10, "wd", 2)
    assert [item.caption for item in wd.items] == ["red, one", "blue"]
    assert [item.path.name for item in wd.items] == ["a.png", "b.jpg"]
    (holdout, _) = kohya_folders.read(root / "holdout")
    assert [item.caption for item in holdout.items] == [""]


def test_another_caption_extension_is_written_and_read(tmp_path, image_set):
    root = kohya_folders.write(image_set, two_arms("x", "y", "z"), tmp_path / "out", ".caption")
    assert (root / "train/2_wd/a.caption").read_text() == "x\n"
    _, wd = kohya_folders.read(root / "train", ".caption")
    assert [item.caption for item in wd.items] == ["x", "y"]


def test_no_holdout_is_an_empty_folder(tmp_path, image_set):
    train = ImageSet(image_set.train, ())
    root = kohya_folders.write(train, two_arms("x", "y"), tmp_path / "out")
    assert kohya_folders.read(root / "holdout") == []


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"one, two\n", "one, two"),
        (b"  padded \n", "padded"),
        (b"\n", ""),
        (b"first\nsecond\n", "first"),
        (b"windows\r\n", "windows"),
        (None, "sks shape"),
    ],
)
def test_captions_are_read_as_kohya_reads_them(tmp_path, content, caption):
    image_file(tmp_path / "2_sks shape", "a.png")
    if content is not None:
        (tmp_path / "2_sks shape/a.txt").write_bytes(content)
    (arm,) = kohya_folders.read(tmp_path)
    assert (arm.name, arm.repeats, arm.items[0].caption) == ("sks shape", 2, caption)


def test_what_is_not_read_is_warned_about(tmp_path, caplog):
    for name in ["sub/a.png", "0_none/a.png", "3_good/a.png", "3_good/.hidden.png"]:
        image_file(tmp_path, name)
    (tmp_path / "3_good/a.txt").write_text("first\nsecond\n")
    (tmp_path / "3_good/b.gif").write_text("")
    (tmp_path / "4_empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (arm,) = kohya_folders.read(tmp_path)
    assert [item.path.name for item in arm.items] == ["a.png"]
    for text in ["sub: ignored", "0_none: ignored", "4_empty: ignored", "only the first line"]:
        assert text in caplog.text


def test_missing_captions_are_warned_about(tmp_path, caplog):
    image_file(tmp_path, "3_cat/a.png")
    kohya_folders.read(tmp_path)
    assert "no .txt file for a.png; their caption is the folder's name, 'cat'" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty; kohya wants one newline"), (b"\xff\xfe", "not UTF-8")]
)
def test_a_caption_file_that_kohya_stops_at_is_refused(tmp_path, content, message):
    image_file(tmp_path, "3_cat/a.png")
    (tmp_path / "3_cat/a.txt").write_bytes(content)
    with pytest.raises(FoldersError, match=message):
        kohya_folders.read(tmp_path)


def test_reading_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FoldersError, match="there is no such folder"):
        kohya_folders.read(tmp_path / "train")
