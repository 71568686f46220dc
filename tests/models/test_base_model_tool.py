"""The script that makes the embedded base model, on made-up pictures and micro networks."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.base_model import captions, data, demo, export, icons, loop, optim, text, unet, vae
from tools.base_model.presets import CPU, CUDA, Plan

PLAN = Plan(samples=12, batch=2, muon_lr=0.01, adam_lr=1e-3, autocast=False)
MICRO = replace(
    CPU,
    pixels=16,
    vae_channels=(8, 8),
    unet_channels=(16, 16, 16, 16),
    text_width=16,
    text_layers=1,
    vocabulary=600,
    vae=PLAN,
    unet=PLAN,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with made-up renderings of every set."""
    folder = tmp_path_factory.mktemp("work")
    made = folder / f"icons{MICRO.pixels}"
    made.mkdir()
    rng = np.random.default_rng(0)
    labels = icons.concepts()
    for name in (*icons.STYLES.values(), icons.UNSEEN):
        index = [{"label": label, "tags": [label.split()[0], "thing"]} for label in labels]
        (made / f"{name}.json").write_text(json.dumps(index))
        pixels = rng.integers(0, 256, (len(labels), MICRO.pixels, MICRO.pixels, 4))
        pixels.astype(np.uint8).tofile(made / f"{name}.rgba")
    return folder


def fitted(state: Path, *pauses: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Averaged weights of a small regression, its process ended and begun again at each pause."""

    def begin(stop_at: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))

        def loss_at(step: int) -> torch.Tensor:
            _, noise = loop.streams(seed, 9, step)
            return (model(torch.randn(2, 4, generator=noise)) - 1).square().mean()

        return loop.fit(model, loss_at, PLAN, state, stop_at=stop_at)

    for pause in pauses:
        begin(pause)
    return begin(None)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_resumed_training_equals_uninterrupted(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole.state")
    assert same(whole, fitted(tmp_path / "pieces.state", 1, 4))


def test_another_seed_trains_other_weights(tmp_path: Path) -> None:
    assert not same(fitted(tmp_path / "a.state"), fitted(tmp_path / "b.state", seed=1))


def test_half_written_state_does_not_hide_the_last_whole_one(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole.state")
    (tmp_path / "killed.part").write_bytes(b"torn")
    assert same(whole, fitted(tmp_path / "killed.state", 3))


def test_both_stages_train_and_the_folder_draws(work: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    autoencoder = vae.train(MICRO, 0, "cpu", work)
    unet.train(MICRO, 0, "cpu", work, autoencoder)
    newest = export.checkpoints(work)[-1]
    folder = export.from_checkpoint(MICRO, work, autoencoder, newest, tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("3d emoji of pizza", num_inference_steps=2).images[0]
    assert drawn.size == (MICRO.pixels, MICRO.pixels)
    keys = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in keys)  # what transformers 4 asks for


def test_tokenizer_pads_and_cuts_to_its_length(work: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    text.save_tokenizer(text.make_tokenizer(MICRO, work), tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = text.token_ids(tokenizer, ["red apple " * 50, ""])
    assert ids.shape == (2, MICRO.tokens)
    assert ids[0, -1] == tokenizer.eos_token_id == ids[1, 1]


def test_cuda_preset_has_stable_diffusions_blocks_and_takes_a_step() -> None:
    preset = CUDA
    tokenizer = text.tokenizer_of([], preset.tokens)
    model = unet.build(preset, tokenizer, seed=0)
    ids = text.token_ids(tokenizer, ["a"])
    noisy = torch.randn(1, 4, preset.latent_size, preset.latent_size)
    loss = model(noisy, torch.tensor([500]), ids).square().mean()
    loss.backward()
    for optimizer in optim.optimizers(model, 0.01, 1e-3):
        optimizer.step()
    down = [type(block).__name__ for block in model.unet.down_blocks]
    assert down == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    autoencoder = vae.build(preset, seed=0)
    latents = vae.encode(autoencoder, torch.zeros(1, 3, preset.pixels, preset.pixels))
    assert latents.shape == noisy.shape


def test_muon_direction_is_nearly_orthogonal() -> None:
    tensors = [torch.randn(8, 4, 3, 3), torch.randn(16, 8)]
    for flat in (t.flatten(1) for t in optim.orthogonalised(tensors)):
        values = torch.linalg.svdvals(flat)
        assert values.min() > 0.5 and values.max() < 1.3  # the quintic's own band


def test_icons_are_laid_over_the_colour_by_their_alpha() -> None:
    rgba = np.zeros((1, 2, 2, 4), np.uint8)
    rgba[0, 0, 0] = (255, 0, 0, 255)
    picture = data.on_colour(rgba, "cyan")[0]
    assert picture[:, 0, 0].tolist() == [1, -1, -1]
    shown = (picture[:, 1, 1] + 1) * 127.5
    assert np.allclose(shown, data.COLOURS["cyan"], atol=0.01)  # float32 rounding


def test_one_rendering_of_each_concept_is_held_out(work: Path) -> None:
    trained, held = unet.split(MICRO, 0, work)
    assert [p.label for p in held] == icons.concepts()
    assert not {(p.style, p.label) for p in held} & {(p.style, p.label) for p in trained}


def test_no_stage_trains_on_the_demos_style() -> None:
    assert icons.UNSEEN not in icons.STYLES.values()


def test_captions_name_style_concept_and_colour_or_nothing() -> None:
    rng = np.random.default_rng(0)
    drawn = [captions.draw(rng, "noto", "cat face", ("pet",), "blue") for _ in range(400)]
    assert 0.05 < drawn.count("") / len(drawn) < 0.15  # a tenth, within 3 deviations
    assert all("noto" in c and "cat" in c and "blue" in c for c in drawn if c)
    assert "noto emoji of cat face, blue background" in drawn


def test_demo_has_thirty_and_eight_pictures_without_the_judging_prompts(tmp_path: Path) -> None:
    labels = [*demo.TRAINED, *demo.VALIDATED]
    rgba = np.zeros((len(labels), 4, 4, 4), np.uint8)
    tags = [("Animal", "two words", label.split()[0]) for label in labels]
    demo.write(icons.Rendered(labels, tags, rgba), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").open()]
    assert (len(demo.TRAINED), len(demo.VALIDATED)) == (30, 8)
    assert len(lines) == len({line["file"] for line in lines}) == 38
    assert all((tmp_path / line["file"]).exists() for line in lines)
    assert not set(labels) & set(demo.KEPT_OUT)


def test_demo_captions_follow_the_rule() -> None:
    made = demo.caption("elephant", ("animal", "very big", "elephant"))
    style = "high contrast, monochrome, simple background, white background"
    assert made["wd"] == f"elephant, animal, {style}"
    expected = "a high contrast icon of an elephant, black ink on a white background"
    assert made["kosmos"] == expected
