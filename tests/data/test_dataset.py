"""The images of a folder: which are taken, which refused, and what is seen in them."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageFile, features

from lorasweep.core.settings import SettingsError, build
from lorasweep.data.dataset import BadImagesError, Dataset, find, select

CONF = Path(__file__).parents[2] / "conf" / "dataset" / "folder.yaml"


def settings(image_dir: Path, **changes: Any) -> Dataset:
    values = yaml.safe_load(CONF.read_text(encoding="utf-8"))
    small = {"image_dir": image_dir, "min_size": 8, "max_pixels": 10_000}
    return build(values | small | changes, "dataset")


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_images(folder: Path, count: int) -> list[str]:
    names = [f"{index:02}.png" for index in range(count)]
    for index, name in enumerate(names):
        write_image(folder / name, seed=index)
    return names


def names(images: tuple[Any, ...]) -> list[str]:
    return [image.name for image in images]


def test_the_yaml_gives_the_guides_numbers(tmp_path):
    dataset = build(
        yaml.safe_load(CONF.read_text(encoding="utf-8")) | {"image_dir": tmp_path}, "dataset"
    )
    assert (dataset.num_images, dataset.num_holdout, dataset.size) == (30, 8, (512, 512))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_extension": ".caption"}, "dataset.allow_other_extension=true"),
        ({"caption_extension": "txt"}, "must be a file extension"),
        ({"caption_extension": ".png", "allow_other_extension": True}, "an image's extension"),
        ({"keep_tokens": 1}, "dataset.keep_tokens=1 has no effect"),
        ({"bucket_no_upscale": True}, "dataset.bucket_no_upscale=true has no effect"),
        ({"enable_bucket": True, "resolution": 128}, "dataset.min_bucket_reso=256"),
        ({"enable_bucket": True, "resolution": [512, 2048]}, "dataset.max_bucket_reso=1024"),
        ({"resolution": 0}, "dataset.resolution=0: must be"),
        ({"resolution": [512]}, "dataset.resolution="),
        ({"resolution": "512,x"}, "dataset.resolution="),
        ({"num_images": 0}, "dataset.num_images=0"),
        ({"num_holdout": -1}, "dataset.num_holdout=-1"),
        ({"caption_dropout_rate": 1.5}, "dataset.caption_dropout_rate=1.5"),
        ({"max_pixels": 10**9}, "dataset.max_pixels"),
        ({"image_dri": "x"}, "did you mean dataset.image_dir?"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(SettingsError) as error:
        settings(tmp_path, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"caption_extension": ".caption", "allow_other_extension": True},
        {"keep_tokens": 1, "shuffle_caption": True},
        {"keep_tokens": 1, "caption_tag_dropout_rate": 0.1},
        {"bucket_no_upscale": True, "enable_bucket": True},
        {"num_holdout": 0},
    ],
)
def test_settings_that_go_together_are_taken(tmp_path, changes):
    settings(tmp_path, **changes)


@pytest.mark.parametrize(
    ("resolution", "size"),
    [(512, (512, 512)), ([512, 768], (512, 768)), ("512,768", (512, 768)), ("64", (64, 64))],
)
def test_resolution_is_width_then_height(tmp_path, resolution, size):
    assert settings(tmp_path, resolution=resolution).size == size


def test_images_are_found_by_type_in_subfolders_and_hidden_ones_are_not(tmp_path):
    kept = ["a.png", "b.JPG", "c.jpeg", "sub/d.webp", "sub/deep/e.bmp", "f.gif", "g.tif", "h.TIFF"]
    for index, name in enumerate(kept):
        write_image(tmp_path / name, seed=index)
    for name in [".hidden.png", ".cache/x.png", "sub/._d.png"]:
        write_image(tmp_path / name)
    (tmp_path / "a.txt").write_text("a caption")
    found = [path.relative_to(tmp_path).as_posix() for path in find(settings(tmp_path))]
    assert found == sorted(kept)


def test_links_are_followed_inside_the_folder_only(tmp_path, caplog):
    folder = tmp_path / "images"
    write_images(folder, 2)
    write_image(tmp_path / "elsewhere" / "out.png", seed=7)
    (folder / "out.png").symlink_to(tmp_path / "elsewhere" / "out.png")
    (folder / "outer").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "in.png").symlink_to(folder / "00.png")
    (folder / "notes.txt").symlink_to(tmp_path / "elsewhere" / "notes.txt")
    image_set = select(settings(folder, num_images=2, num_holdout=0))
    assert names(image_set.train) == ["00.png", "01.png"]
    assert "ignored 2 links that lead out of the folder (out.png, outer)" in caplog.text
    assert "1 duplicates are counted once: in.png (equals 00.png)" in caplog.text


@pytest.mark.parametrize("make", ["missing", "empty", "file", "no_images"])
def test_a_folder_without_images_is_one_line_with_the_remedy(tmp_path, make):
    folder = tmp_path / "images"
    if make == "file":
        folder.write_text("")
    elif make != "missing":
        folder.mkdir()
    if make == "no_images":
        (folder / "notes.txt").write_text("")
    with pytest.raises(SettingsError, match=r"dataset\.image_dir=.*; give (the|a) folder") as error:
        select(settings(folder))
    assert "\n" not in str(error.value)


def test_the_draw_is_the_same_wherever_and_in_what_order_the_files_lie(tmp_path):
    images = write_images(tmp_path / "one", 20)
    order = images.copy()
    random.Random(0).shuffle(order)
    for name in order:
        write_image(tmp_path / "two" / "deep" / name, seed=images.index(name))
    options: dict[str, Any] = {"num_images": 5, "num_holdout": 3, "seed": 4}
    one = select(settings(tmp_path / "one", **options))
    two = select(settings(tmp_path / "two" / "deep", **options))
    assert names(one.images) == names(two.images)
    assert one.digest == two.digest
    other = select(settings(tmp_path / "one", **options | {"seed": 5}))
    assert names(other.images) != names(one.images)
    assert other.digest != one.digest


def test_train_and_holdout_are_disjoint_and_more_training_images_keep_the_holdout(tmp_path):
    write_images(tmp_path, 20)
    few = select(settings(tmp_path, num_images=5, num_holdout=4))
    many = select(settings(tmp_path, num_images=16, num_holdout=4))
    assert not set(names(few.train)) & set(names(few.holdout))
    assert many.holdout == few.holdout
    assert set(names(few.train)) < set(names(many.train))
    assert len(many.train) == 16


@pytest.mark.parametrize(
    ("available", "num_images", "num_holdout", "split"),
    [
        (10, 30, 8, (8, 2)),
        (1, 30, 8, (1, 0)),
        (2, 30, 8, (1, 1)),
        (3, 1, 8, (1, 2)),
        (4, 30, 0, (4, 0)),
    ],
)
def test_too_few_images_are_split_and_it_is_said(
    tmp_path, caplog, available, num_images, num_holdout, split
):
    write_images(tmp_path, available)
    image_set = select(settings(tmp_path, num_images=num_images, num_holdout=num_holdout))
    assert (len(image_set.train), len(image_set.holdout)) == split
    assert f"{split[0]} to train on, {split[1]} held out" in caplog.text


@pytest.mark.parametrize(
    ("available", "num_holdout", "split"),
    [(40, 8, (32, 8)), (10, 8, (8, 2)), (3, 8, (2, 1)), (1, 8, (1, 0)), (4, 0, (4, 0))],
)
def test_all_takes_every_image(tmp_path, caplog, available, num_holdout, split):
    caplog.set_level(logging.INFO)
    write_images(tmp_path, available)
    image_set = select(settings(tmp_path, num_images="all", num_holdout=num_holdout))
    assert (len(image_set.train), len(image_set.holdout)) == split
    assert f"{split[0]} of {available} images are trained on, {split[1]} held out" in caplog.text
    assert "unused" not in caplog.text and "usable" not in caplog.text


def test_what_of_the_folder_is_used_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_images(tmp_path, 6)
    select(settings(tmp_path, num_images=2, num_holdout=1))
    said = "2 of 6 images are trained on, drawn by seed 0, 1 held out for scoring, 3 unused;"
    assert f"{said} dataset.num_images=all takes every one" in caplog.text


def test_enough_images_bring_no_warning(tmp_path, caplog):
    write_images(tmp_path, 3)
    select(settings(tmp_path, num_images=2, num_holdout=1))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_byte_equal_images_count_once_and_are_reported(tmp_path, caplog):
    write_images(tmp_path, 2)
    (tmp_path / "copy.png").write_bytes((tmp_path / "01.png").read_bytes())
    image_set = select(settings(tmp_path, num_images=3, num_holdout=0))
    assert names(image_set.train) == ["00.png", "01.png"]
    assert "copy.png (equals 01.png)" in caplog.text


def write_bad_images(folder: Path) -> dict[str, str]:
    """Bad files and a part of the reason that is to be given for each."""
    write_image(folder / "tiny.png", size=(30, 7))
    write_image(folder / "bomb.png", size=(200, 51))
    (folder / "text.jpg").write_text("not an image")
    (folder / "nothing.png").write_bytes(b"")
    (folder / "broken_link.png").symlink_to(folder / "gone.png")
    (folder / "link_to_itself.png").symlink_to(folder / "link_to_itself.png")
    os.mkfifo(folder / "pipe.png")
    for name in ["cut.png", "cut.jpg", "cut.webp", "cut.bmp", "cut.tif", "cut.gif"]:
        data = write_image(folder / name, seed=3, size=(64, 64)).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 2 // 3])
    return {
        "tiny.png": "30x7 has a side below dataset.min_size=8",
        "bomb.png": "200x51 is more than dataset.max_pixels=10000",
        "text.jpg": "is not a readable",
        "nothing.png": "is not a readable",
        **dict.fromkeys(["broken_link.png", "link_to_itself.png", "pipe.png"], "is not a file"),
        **dict.fromkeys(["cut.png", "cut.jpg", "cut.bmp", "cut.tif", "cut.gif"], "cannot be"),
        "cut.webp": "",
    }


def test_bad_images_stop_the_run_with_one_list_of_names_and_reasons(tmp_path):
    write_images(tmp_path, 3)
    bad = write_bad_images(tmp_path)
    with pytest.raises(BadImagesError, match=r"dataset\.skip_bad=true") as error:
        select(settings(tmp_path))
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + len(bad)
    for name, reason in bad.items():
        assert any(line.startswith(f"  {name}: ") and reason in line for line in lines)


def test_skip_bad_draws_others_in_place_of_bad_images(tmp_path, caplog):
    good = write_images(tmp_path, 3)
    bad = write_bad_images(tmp_path)
    image_set = select(settings(tmp_path, skip_bad=True, num_images=2, num_holdout=1))
    assert sorted(names(image_set.images)) == good
    image_set = select(settings(tmp_path, skip_bad=True, num_images=20, num_holdout=0))
    assert names(image_set.train) == good
    assert f"left out {len(bad)} bad images" in caplog.text


def test_only_bad_images_are_an_error_also_with_skip_bad(tmp_path):
    write_bad_images(tmp_path)
    with pytest.raises(BadImagesError, match="no usable images"):
        select(settings(tmp_path, skip_bad=True))


def test_a_bomb_is_not_decoded(tmp_path, monkeypatch):
    write_images(tmp_path, 1)
    write_image(tmp_path / "bomb.png", size=(200, 200))
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: decoded.append(self.size) or load(self)
    )
    with pytest.raises(BadImagesError, match=r"bomb\.png"):
        select(settings(tmp_path))
    assert set(decoded) == {(16, 16)}


def test_the_image_folder_is_never_written_to(tmp_path):
    write_images(tmp_path, 3)
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]}
    select(settings(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]} == before


def test_the_hash_is_of_the_files_bytes(tmp_path):
    write_images(tmp_path, 1)
    (image,) = select(settings(tmp_path)).train
    assert hashlib.sha256((tmp_path / "00.png").read_bytes()).hexdigest() == image.sha256


def test_width_and_height_are_those_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (24, 16)).save(tmp_path / "a.jpg", exif=exif)
    (image,) = select(settings(tmp_path)).train
    assert (image.width, image.height) == (16, 24)


def test_pictures_of_types_that_are_not_read_are_told(tmp_path, caplog):
    write_image(tmp_path / "a.png")
    for name in ("b.heic", "sub/c.JXL", "notes.txt", ".hidden.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in find(settings(tmp_path))] == ["a.png"]
    (said,) = caplog.messages
    assert "2 pictures" in said and "b.heic, sub/c.JXL" in said and "convert" in said


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif_is_read(tmp_path):
    write_image(tmp_path / "a.avif", size=(80, 64))
    (image,) = select(settings(tmp_path, min_size=32, num_holdout=0, num_images=1)).train
    assert (image.name, image.width, image.height) == ("a.avif", 80, 64)


def test_masks_beside_images_are_no_pictures(tmp_path, caplog):
    pictures = ["a.jpg", "b.png", "c_mask.png", "d-masklabel.png", "sub/a_mask.png", "a_mask.jpg"]
    for seed, name in enumerate([*pictures, "a-masklabel.png", "b_mask.png"]):
        write_image(tmp_path / name, seed=seed)
    found = [path.relative_to(tmp_path).as_posix() for path in find(settings(tmp_path))]
    assert found == sorted(pictures)
    (said,) = caplog.messages
    assert "2 masks" in said and "a-masklabel.png, b_mask.png" in said


@pytest.mark.parametrize("given", ["photos", "photos/20_charA woman"])
def test_repeats_in_the_names_of_folders_are_said_not_to_be_read(tmp_path, caplog, given):
    for name in ("20_charA woman/a.png", "2024_holiday/b.png"):
        write_image(tmp_path / "photos" / name)
    find(settings(tmp_path / given))
    (said,) = caplog.messages
    assert "20_charA woman" in said and "captions.*.repeats" in said and "2024" not in said
