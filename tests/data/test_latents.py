"""Images as a trainer sees them: buckets as kohya sorts them, latents cached by content."""

import os
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lorasweep.data import buckets, latents
from lorasweep.data.kohya_folders import Arm, CaptionedImage


def picture(path, size=(64, 64), colour=(200, 30, 30)):
    image = Image.new("RGB", size, "white")
    image.paste(colour, (0, 0, size[0] // 2, size[1] // 3))
    image.save(path)
    return path


def arm(*paths):
    return Arm("wd", 1, tuple(CaptionedImage(path, "a caption") for path in paths))


@pytest.fixture
def settings(make_run):
    return make_run("dataset.resolution=[64,64]").dataset


def bucketed(settings, **changes):
    values = {
        "enable_bucket": True,
        "resolution": 512,
        "min_bucket_reso": 256,
        "max_bucket_reso": 1024,
        "bucket_reso_steps": 64,
    }
    return replace(settings, **{**values, **changes})


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((512, 512), (512, 512)),
        ((1000, 1000), (512, 512)),
        ((1600, 1000), (640, 384)),
        ((1000, 1600), (384, 640)),
        ((4000, 1000), (1024, 256)),
        ((100, 3000), (256, 1024)),
    ],
)
def test_an_image_goes_to_the_bucket_of_the_nearest_ratio(size, bucket, settings):
    assert buckets.bucket_of(size, bucketed(settings)) == bucket


def test_buckets_fit_the_area_and_the_steps(settings):
    for width, height in buckets.buckets(bucketed(settings)):
        assert width * height <= 512 * 512
        assert width % 64 == height % 64 == 0


def test_without_upscaling_a_bucket_is_the_image_cut_to_the_steps(settings):
    small = bucketed(settings, bucket_no_upscale=True)
    assert buckets.bucket_of((300, 200), small) == (256, 192)
    assert buckets.bucket_of((1024, 512), small)[0] < 1024
    # rounding errors must not cost a step
    assert {buckets.bucket_of((side, side), small) for side in range(513, 1000)} == {(512, 512)}
    with pytest.raises(ValueError, match=r"too small for dataset\.bucket_reso_steps=64"):
        buckets.bucket_of((300, 50), small)


def test_without_buckets_every_image_has_the_resolution(settings):
    assert buckets.bucket_of((300, 200), settings) == (64, 64)


def test_fitting_covers_and_crops_the_centre():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    fitted = buckets.fit(image, (64, 64))
    assert fitted.size == (64, 64)
    assert {fitted.getpixel((x, y)) for x in (1, 32, 62) for y in (1, 62)} == {(0, 0, 255)}


def test_latents_of_a_flipped_image_are_not_the_images(base, settings, tmp_path):
    path = picture(tmp_path / "a.png")
    (item,) = latents.encode(base, [arm(path)], replace(settings, flip_aug=True), tmp_path)
    assert item.latents.shape == (4, 16, 16)
    assert not torch.equal(item.latents, item.flipped)
    (plain,) = latents.encode(base, [arm(path)], settings, tmp_path)
    assert plain.flipped is None


def test_latents_decode_to_the_image(base, settings, tmp_path):
    path = picture(tmp_path / "a.png")
    (item,) = latents.encode(base, [arm(path)], settings, tmp_path / "cache")
    drawn = latents.pixels(base.decode_latents(item.latents[None])[0])
    error = (drawn - latents.pixels(Image.open(path))).square().mean()
    assert error < 0.01  # in -1..1; a VAE of 0.8 M parameters


def test_equal_images_are_encoded_once_and_found_again(base, settings, tmp_path, monkeypatch):
    one, two = picture(tmp_path / "a.png"), tmp_path / "b.png"
    two.write_bytes(one.read_bytes())
    encoded = []
    encode = type(base).encode_images
    monkeypatch.setattr(
        type(base), "encode_images", lambda self, p: encoded.append(1) or encode(self, p)
    )
    first = latents.encode(base, [arm(one, two)], settings, tmp_path / "cache")
    again = latents.encode(base, [arm(two)], settings, tmp_path / "cache")
    assert len(encoded) == 1
    assert torch.equal(first[0].latents, again[0].latents)
    latents.encode(base, [arm(one)], replace(settings, resolution=32), tmp_path / "cache")
    assert len(encoded) == 2


def test_a_torn_cache_file_is_made_again(base, settings, tmp_path, caplog):
    path, cache = picture(tmp_path / "a.png"), tmp_path / "cache"
    (whole,) = latents.encode(base, [arm(path)], settings, cache)
    (file,) = (cache / "latents").iterdir()
    os.truncate(file, file.stat().st_size // 2)
    (again,) = latents.encode(base, [arm(path)], settings, cache)
    assert torch.equal(whole.latents, again.latents)
    assert "torn" in caplog.text


def test_a_resolution_the_model_cannot_take_is_refused(base, settings, tmp_path):
    path = picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"dataset.resolution=\[66, 64\].*multiples of 4"):
        latents.encode(base, [arm(path)], replace(settings, resolution=(66, 64)), tmp_path)
