"""Masks: found, laid out with their images, and counted in the loss as sd-scripts counts them."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lorasweep.core.settings import SettingsError
from lorasweep.data.dataset import find
from lorasweep.data.image_files import open_with_alpha
from lorasweep.data.latents import masks_of
from lorasweep.data.masks import mask_latents, open_mask
from lorasweep.models import diffusion_loss
from lorasweep.runs.prepare import encoded_images, write_folders
from lorasweep.training.pack_loss import PackLoss
from lorasweep.training.sd_scripts_config import dataset_config
from lorasweep.training.training_run import TrainingData

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "kohya_masks.json").read_text())
FOLDER = [
    *("captions=[empty]", "dataset.num_images=all", "dataset.num_holdout=1"),
    *("dataset.min_size=8", "dataset.resolution=[32,32]"),
]


def pattern(width=64, height=48):
    values = [[(7 * x + 13 * y) % 256 for x in range(width)] for y in range(height)]
    return np.array(values, dtype=np.uint8)


@pytest.fixture
def photos(tmp_path):
    """Four pictures, and masks of their left halves."""
    for number in range(4):
        for folder, name in (("photos", f"sub/{number}.jpg"), ("photos/masks", f"{number}.png")):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (64, 64), (40 * number, 100, 50) if "sub" in name else 0)
            if "sub" not in name:
                picture.paste((255, 0, 0), (0, 0, 32, 64))
            picture.save(path)
    return tmp_path / "photos"


def masked(make_run, photos, *overrides):
    masks = f"dataset.conditioning_data_dir={photos / 'masks'}"
    return make_run(*FOLDER, f"dataset.image_dir={photos}", masks, *overrides)


@pytest.mark.parametrize("kind", RECORDED["answers"])
def test_a_mask_weighs_errors_as_sd_scripts_does(kind, tmp_path, base, monkeypatch):
    recorded, path = RECORDED["answers"][kind], tmp_path / "m.png"
    grey = Image.fromarray(pattern())
    if kind == "alpha":
        picture = Image.new("RGB", grey.size, (90, 90, 90))
        picture.putalpha(grey)
        picture.save(path)
        mask = open_with_alpha(path)[1]
    else:
        other = Image.new("L", grey.size)
        Image.merge("RGB", (grey, other, other)).save(path)
        mask = open_mask(path)
    at_latents = mask_latents(mask, (6, 8))
    torch.testing.assert_close(at_latents, torch.tensor(recorded["grid"]), atol=1e-5, rtol=0)
    errors = [[(c + 1) * (8 * i + j) / 10 for i in range(6) for j in range(8)] for c in range(4)]
    off = torch.tensor(errors).sqrt().view(1, 4, 6, 8)
    base = SimpleNamespace(
        predict=lambda *_: off,
        noise_schedule=SimpleNamespace(
            add_noise=lambda *_: None, training_target=lambda *_: torch.zeros_like(off)
        ),
    )
    loss = diffusion_loss.squared_errors(base, *(None,) * 4, at_latents[None, None])
    assert float(loss) == pytest.approx(recorded["loss"], rel=1e-5)


def test_masks_are_found_and_written_with_their_images(photos, make_run, base):
    run = masked(make_run, photos)
    assert {path.parent.name for path in find(run.dataset)} == {"sub"}  # no mask is an image
    images = encoded_images(base, run, write_folders(run))
    (held_out,) = images.holdout
    for item in [*images.train, held_out]:
        width = item.latents.shape[-1]
        assert item.mask[:, : width // 2].eq(1).all() and item.mask[:, width // 2 :].eq(0).all()


def test_a_mask_is_mirrored_with_its_image(photos, make_run, base):
    run = masked(make_run, photos, "dataset.flip_aug=true")
    items = encoded_images(base, run, write_folders(run)).train
    state = SimpleNamespace(run=run, num_micro_steps=4)
    loss = PackLoss(base, TrainingData([*items, replace(items[0], mask=None)], run.dataset))
    batch = [0, 1, 2, 3]
    drawn, flips = zip(*loss._images(state, batch), strict=True)
    assert set(flips[:3]) == {True, False}
    found = masks_of(drawn, flips)
    for row, flip in enumerate(flips[:3]):
        expected = items[row].mask.flip(-1) if flip else items[row].mask
        assert torch.equal(found[row, 0], expected)
    assert found[3].eq(1).all()  # what has no mask counts everywhere
    assert masks_of([replace(item, mask=None) for item in items], flips) is None


def test_other_masks_are_another_data_set(photos, make_run):
    run = masked(make_run, photos)
    before = write_folders(run)
    Image.new("RGB", (64, 64), "white").save(photos / "masks" / "2.png")
    assert write_folders(run) != before


def test_alpha_is_a_mask_and_nothing_is_laid_on_white(tmp_path, make_run, base):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        picture = Image.new("RGBA", (64, 64), (200, 40 * number, 10, 255))
        picture.paste((200, 40 * number, 10, 0), (0, 0, 32, 64))
        picture.save(folder / f"{number}.png")
    run = make_run(*FOLDER, f"dataset.image_dir={folder}", "dataset.alpha_mask=true")
    for item in encoded_images(base, run, write_folders(run)).train:
        half = item.latents.shape[-1] // 2
        assert item.mask[:, :half].eq(0).all() and item.mask[:, half:].eq(1).all()
        with Image.open(item.path) as copy:
            assert copy.mode == "RGBA" and copy.getpixel((0, 0))[0] == 200  # under the alpha


def test_sd_scripts_is_told_of_masks(photos, make_run, base):
    run = masked(make_run, photos)
    root = write_folders(run)
    data = TrainingData(encoded_images(base, run, root).train, run.dataset)
    (subset,) = tomllib.loads(dataset_config(data))["datasets"][0]["subsets"]
    assert Path(subset["conditioning_data_dir"]) == root / "masks" / "train"
    # it stops at a mask without an image, and at words that it doesn't take beside masks
    names = {path.stem for path in (root / "masks" / "train").iterdir()}
    assert names == {item.path.stem for item in data.items}
    assert subset.keys() == {"image_dir", "num_repeats", "conditioning_data_dir"}


def test_bad_masks_are_listed(photos, make_run):
    masks = photos / "masks"
    (masks / "0.png").unlink()
    Image.new("L", (32, 64)).save(masks / "1.png")
    (masks / "2.png").write_bytes(b"no picture")
    (masks / "3.png").rename(photos / "../3.png")
    (masks / "3.png").symlink_to(photos / "../3.png")
    with pytest.raises(SettingsError, match="4 images without a good mask") as error:
        write_folders(masked(make_run, photos))
    for part in ("sub/0.jpg: no mask", "has 32x64, not 64x64", "is not a readable", "3.jpg: no"):
        assert part in str(error.value)
    with pytest.raises(SettingsError, match="alpha_mask=true has no effect with"):
        masked(make_run, photos, "dataset.alpha_mask=true")
