"""Sample images: kohya's prompt lines, fixed seeds, and pictures from files on the clean base."""

from dataclasses import replace

import numpy as np
import pytest

from adapter_packs import trained
from lorasweep.core.clock import Clock
from lorasweep.core.settings import SettingsError
from lorasweep.judging import sampling
from lorasweep.judging.judge import Judge, load_pack
from lorasweep.judging.metrics.metric import Images
from lorasweep.lora_files import checkpoint
from lorasweep.lora_files.kohya_form import with_kohya_names
from lorasweep.models.noise_schedule import NoiseSchedule


@pytest.fixture
def settings(make_run):
    return make_run("sampling.num_inference_steps=3").sampling


def difference(a, b):
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max())


def test_options_of_a_prompt_line_override_the_settings(make_run):
    line = "a cat --n a dog --w 96 --h 70 --d 7 --l 3.5 --s 4000"
    settings = make_run(f"sampling.prompts=['{line}',plain]").sampling
    first, second = settings.resolve((64, 64), 32)
    assert first == sampling.Prompt("a cat", "a dog", 96, 64, 7, 3.5, 1000)
    assert (second.text, second.width, second.seed) == ("plain", 64, 1)


def test_one_prompt_needs_no_list(make_run):
    (prompt,) = make_run("sampling.prompts=a fox").sampling.resolve((64, 64), 32)
    assert prompt.text == "a fox"


def test_a_comma_that_splits_an_option_is_said(make_run, caplog):
    split = make_run("sampling.prompts=[a fox, black ink --n bad, ugly]")
    assert split.sampling.prompts == ("a fox", "black ink --n bad", "ugly")
    assert "the comma after --n bad begins a new prompt, 'ugly'" in caplog.text
    caplog.clear()
    make_run("sampling.prompts=['a fox, black ink --n bad, ugly', b --n c --d 7, d]")
    assert "begins a new prompt" not in caplog.text


def test_a_prompt_may_hold_dashes_that_are_no_option(make_run):
    (prompt,) = make_run("sampling.prompts=['black-and-white -- drawing']").sampling.resolve(
        (64, 64), 32
    )
    assert prompt.text == "black-and-white -- drawing"


@pytest.mark.parametrize("line", ["cat", "a fox --n cat"])
def test_a_prompt_that_is_cut_is_warned_of(line, base, make_run, caplog):
    lines = [line.replace("cat", " ".join(["cat"] * 100)), "a fox"]
    settings = replace(make_run().sampling, prompts=lines)
    Judge(base, Images(train=[], holdout=[]), [], settings, (64, 64), Clock())
    (said,) = [one for one in caplog.messages if "longer than" in one]
    assert said.startswith(f"sampling.prompts: {'cat ' * 15}… is longer than the {base.max_tokens}")


@pytest.mark.parametrize("line", ["a --x 3", "a --w wide"])
def test_an_unknown_or_wrong_option_is_refused(line, make_run):
    with pytest.raises(SettingsError, match=r"sampling\.prompts: --"):
        make_run(f"sampling.prompts=['{line}']")


def test_pictures_are_the_same_whatever_is_drawn_beside_them(base, settings, make_run):
    prompts = settings.resolve((64, 64), 32)
    wide = [*prompts, sampling.Prompt("a cat", "", 96, 64, 5, 1.0, 2)]
    pack = trained(base, (make_run("adapter.rank=4").adapter, 0), (make_run().adapter, 1))
    together = sampling.render(base, pack, wide, settings)
    for index in range(2):
        alone = sampling.render(base, pack.select([index]), prompts, settings)[0]
        # rounding to 8 bits may fall on either side
        assert difference(together[index][0], alone[0]) <= 1
    assert together[0][1].size == (96, 64)


def test_seed_and_adapter_change_the_picture(base, settings, make_run):
    prompts = settings.resolve((64, 64), 32)
    other = [sampling.Prompt(**{**prompts[0].__dict__, "seed": 9})]
    bare = sampling.render(base, None, prompts, settings)[0][0]
    again = sampling.render(base, None, prompts, settings)[0][0]
    assert difference(bare, again) == 0
    assert difference(bare, sampling.render(base, None, other, settings)[0][0]) > 10
    pack = trained(base, (make_run("adapter.rank=4").adapter, 0))
    assert difference(bare, sampling.render(base, pack, prompts, settings)[0][0]) > 10


def test_a_sampler_that_adds_noise_repeats_its_picture(base, make_run):
    settings = make_run("sampling.scheduler=EulerAncestralDiscreteScheduler").sampling
    prompts = settings.resolve((64, 64), 4)
    one, two = (sampling.render(base, None, prompts, settings)[0][0] for _ in range(2))
    assert difference(one, two) == 0


def test_due_epochs(make_run):
    settings = make_run("sampling.every_n_epochs=3").sampling
    assert [epoch for epoch in range(8) if settings.due(epoch)] == [0, 3, 6]
    assert not make_run("sampling.every_n_epochs=0").sampling.due(0)


def test_v_prediction_with_zero_terminal_snr_is_drawn_as_by_diffusers(sdxl, make_run):
    """As NoobAI's. A sampler that can't, or one that took it for epsilon, would draw noise."""
    from diffusers import EulerDiscreteScheduler

    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    schedule = NoiseSchedule({**sdxl.noise_schedule.config, **told})
    base = replace(sdxl, noise_schedule=schedule)
    settings = make_run(
        "sampling.scheduler=EulerDiscreteScheduler",
        "sampling.num_inference_steps=2",
        "sampling.prompts=[a fox --n blue]",
    ).sampling
    prompts = settings.resolve((64, 64), 32)
    ((ours,),) = sampling.render(base, None, prompts, settings)
    pipeline = base.pipeline()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(schedule.config)
    pipeline.set_progress_bar_config(disable=True)
    (theirs,) = pipeline(
        "a fox",
        negative_prompt="blue",
        latents=sampling.noise(base, prompts[0])[None],
        num_inference_steps=2,
        guidance_scale=settings.guidance_scale,
        width=64,
        height=64,
    ).images
    assert difference(theirs, ours) <= 2
    ((as_epsilon,),) = sampling.render(sdxl, None, prompts, settings)
    assert difference(as_epsilon, ours) > 10
    assert schedule.is_zero_terminal_snr and schedule.modelspec_word == "v"
    images = Images(train=[], holdout=[])
    with pytest.raises(SettingsError, match=r"PNDMScheduler can't draw .*rescale_betas_zero_snr"):
        Judge(base, images, [], replace(settings, scheduler="PNDMScheduler"), (64, 64), Clock())


@pytest.mark.parametrize("base", ["embedded_base", "sd2", "sdxl"], indirect=True)
def test_diffusers_draws_the_same_picture_from_the_file(base, make_run, tmp_path):
    """The whole way of a user: load_lora_weights on the plain pipeline, same prompt and noise."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    settings = make_run(
        "sampling.num_inference_steps=4",
        "sampling.guidance_scale=3",
        "sampling.negative_prompt=blue",
    ).sampling
    prompts = settings.resolve((64, 64), 32)
    pack = trained(base, (make_run("adapter.rank=4").adapter, 0))
    tensors = with_kohya_names(pack.file_tensors(0), base)
    checkpoint.write(tmp_path / "style.safetensors", tensors, {})
    ours = sampling.render(
        base, load_pack(base, [tmp_path / "style.safetensors"]), prompts, settings
    )

    pipeline = DiffusionPipeline.from_pretrained(
        base.settings.path, use_safetensors=True, dtype=base.unet.dtype
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = sampling.noise(base, prompts[0])[None]
    call = {
        "prompt": prompts[0].text,
        "negative_prompt": "blue",
        "latents": noise,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "width": 64,
        "height": 64,
    }
    bare = pipeline(**call).images[0]
    pipeline.load_lora_weights(tmp_path, weight_name="style.safetensors")
    theirs = pipeline(**call).images[0]
    assert difference(theirs, bare) > 10
    assert difference(theirs, ours[0][0]) <= 2  # fp32 sums in another order, then 8 bits
