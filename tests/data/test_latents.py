"""Images as a trainer sees them: buckets as kohya sorts them, latents cached by content."""

import json
import os
from dataclasses import replace
from pathlib import Path

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


KOHYA = json.loads((Path(__file__).parents[1] / "recorded" / "kohya_buckets.json").read_text())
"""What sd-scripts' own BucketManager answers for 200 sizes under each of six settings."""


@pytest.mark.parametrize("recorded", KOHYA["answers"], ids=lambda one: str(one["settings"]))
def test_images_go_to_the_buckets_that_kohya_gives_them(recorded, settings):
    """And what kohya scales before it crops is scaled here."""
    ours = replace(settings, enable_bucket=True, **recorded["settings"])
    if recorded["buckets"] is not None:
        assert buckets.buckets(ours) == [tuple(size) for size in recorded["buckets"]]
    for width, height, *answer in recorded["images"]:
        bucket = buckets.bucket_of((width, height), ours)
        assert bucket == tuple(answer[:2]), (width, height)
        if not buckets.is_scaled((width, height), ours):
            assert answer[2:] == [width, height]
        else:  # to cover the bucket
            scale = max(bucket[0] / width, bucket[1] / height)
            assert answer[2:] == [int(width * scale + 0.5), int(height * scale + 0.5)]


def test_an_image_without_a_bucket_is_refused(settings):
    small = bucketed(settings, bucket_no_upscale=True)
    for size in [(300, 50), (50_000, 60)]:
        with pytest.raises(ValueError, match=r"too small for dataset\.bucket_reso_steps=64"):
            buckets.bucket_of(size, small)
    with pytest.raises(ValueError, match=r"dataset\.min_bucket_reso=32: must be at least"):
        bucketed(settings, min_bucket_reso=32)


def test_without_upscaling_small_images_are_cropped_pixel_by_pixel(settings):
    image = Image.effect_noise((301, 203), 80).convert("RGB")
    small = bucketed(settings, bucket_no_upscale=True)
    fitted = buckets.fit(image, (256, 192), scale=buckets.is_scaled(image.size, small))
    assert fitted.tobytes() == image.crop((22, 5, 278, 197)).tobytes()


def test_without_buckets_every_image_has_the_resolution(settings):
    assert buckets.bucket_of((300, 200), settings) == (64, 64)


@pytest.mark.parametrize(
    ("original", "bucket", "left", "top", "mirrored_left"),
    [  # of sd-scripts' BucketManager.get_crop_ltrb, and of what it makes of it when flipped
        ((1200, 800), (1216, 832), 0, 10, 0),
        ((800, 1200), (832, 1216), 10, 0, 11),
        ((1000, 1000), (1024, 1024), 0, 0, 0),
        ((640, 480), (1152, 896), 0, 16, 0),
        ((100, 77), (64, 48), 0, 0, 1),
    ],
)
def test_sdxl_is_told_of_sizes_and_crops_as_by_kohya(original, bucket, left, top, mirrored_left):
    told = [buckets.size_and_crop(original, bucket, flipped=flipped) for flipped in (False, True)]
    assert [one.crop for one in told] == [(left, top), (mirrored_left, top)]
    assert all((one.original, one.size) == (original, bucket) for one in told)


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
    with pytest.raises(
        ValueError, match=r"dataset.resolution=\[66, 64\].*multiples of 4.*nearest is"
    ):
        latents.encode(base, [arm(path)], replace(settings, resolution=(66, 64)), tmp_path)


def test_with_buckets_the_resolution_is_an_area_and_the_buckets_are_computed(
    base, settings, tmp_path
):
    """As with kohya, who takes 512x650."""
    path = picture(tmp_path / "a.png")
    area = bucketed(settings, resolution=(66, 63), min_bucket_reso=32, bucket_reso_steps=4)
    (item,) = latents.encode(base, [arm(path)], area, tmp_path)
    assert item.bucket == (64, 64)
