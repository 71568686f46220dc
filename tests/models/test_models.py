"""The base model: from a folder or one file, with the same predictions; pickles refused."""

import shutil

import pytest
import torch

import tiny_sdxl
from adapter_packs import predict
from lorasweep.config.compose import compose
from lorasweep.core.settings import SettingsError
from lorasweep.export import whole_model
from lorasweep.models.devices import resolve_device
from lorasweep.models.model_files import ModelError
from lorasweep.models.noise_schedule import NoiseSchedule


def test_a_single_file_gives_the_same_predictions_as_the_folder(base, make_run, tmp_path):
    file = tmp_path / "model.safetensors"
    whole_model.read(base.settings.path).write(file)
    model = make_run(f"model.path={file}", f"model.config={base.settings.path}").model
    loaded = model.load()
    assert torch.equal(predict(loaded, None), predict(base, None))
    assert loaded.noise_schedule.prediction_type == base.noise_schedule.prediction_type
    hashes = loaded.file_hashes
    assert len(hashes["ss_new_sd_model_hash"]) == 64
    assert len(hashes["ss_sd_model_hash"]) == 8


def test_a_single_file_without_configs_says_what_it_needs(base, make_run, tmp_path):
    file = tmp_path / "model.safetensors"
    whole_model.read(base.settings.path).write(file)
    with pytest.raises(ModelError, match=r"model\.config is null"):
        make_run(f"model.path={file}", "model.config=null").model.load()


def test_a_pickled_checkpoint_is_refused_unless_allowed(make_run, tmp_path):
    file = tmp_path / "model.ckpt"
    torch.save({}, file)
    with pytest.raises(SettingsError, match=r"model\.allow_pickle=true"):
        make_run(f"model.path={file}")
    assert make_run(f"model.path={file}", "model.allow_pickle=true").model.is_single_file


def test_a_folder_that_holds_no_model_is_one_line(make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="can't be loaded") as caught:
        make_run(f"model.path={tmp_path / 'empty'}").model.load()
    assert "\n" not in str(caught.value)


def test_a_hub_id_that_cannot_be_reached_is_one_line(make_run):
    with pytest.raises(ModelError, match="nobody/nothing can't be loaded") as caught:
        make_run("model.path=nobody/nothing").model.load()
    assert "\n" not in str(caught.value)


def test_another_architecture_is_refused(make_run, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ModelError, match="FluxPipeline"):
        make_run(f"model.path={tmp_path}").model.load()


def test_clip_skip_takes_an_earlier_layer_through_the_final_norm(base, make_run):
    skipping = make_run("model.clip_skip=2").model.load()
    with torch.no_grad():
        embeds = skipping.encode_prompt(["a cat"]).embeds
        states = base.text_encoder(base.tokenize(["a cat"]), output_hidden_states=True)
        inner = getattr(base.text_encoder, "text_model", base.text_encoder)
        expected = inner.final_layer_norm(states.hidden_states[-2])
    assert torch.equal(embeds, expected)
    assert not torch.equal(embeds, base.encode_prompt(["a cat"]).embeds)


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_sdxl_reads_prompts_as_diffusers_does(base):
    prompts = ["a cat", "", "a very long prompt of a rocket " * 20]
    told = base.encode_prompt(prompts)
    pipeline = base.pipeline()
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert torch.equal(told.embeds, embeds)
    assert torch.equal(told.pooled, pooled)
    assert base.too_long(prompts) == prompts[2:]


def test_a_single_file_of_sdxl_is_the_folder_and_says_what_it_predicts(
    sdxl, sdxl_folder, make_run, tmp_path
):
    """Of the names that Illustrious, Pony and NoobAI are shared under; read by diffusers."""
    from safetensors.torch import load_file, save_file

    file = tmp_path / "noob.safetensors"
    tiny_sdxl.write_single_file(sdxl, file, told=("v_pred", "ztsnr"))
    given = (f"model.path={file}", f"model.config={sdxl_folder}")
    loaded = make_run(*given).model.load()
    assert torch.equal(predict(loaded, None), predict(sdxl, None))
    schedule = loaded.noise_schedule
    assert (schedule.prediction_type, schedule.is_zero_terminal_snr) == ("v_prediction", True)
    assert float(schedule.scheduler.alphas_cumprod[-1]) == 0
    told = make_run(*given, "model.prediction_type=epsilon").model.load().noise_schedule
    assert told.prediction_type == "epsilon"
    with pytest.raises(ModelError, match=r"another kind of model.*as model=sdxl does"):
        make_run(f"model.path={file}", f"model.config={make_run().model.path}").model.load()
    tensors = load_file(file)
    for lost in (
        "conditioner.embedders.1.model.text_projection",
        "model.diffusion_model.out.2.bias",
    ):
        save_file({name: t for name, t in tensors.items() if name != lost}, file)
        with pytest.raises(ModelError, match=r"not a whole SDXL checkpoint|weights are missing"):
            make_run(*given).model.load()


def test_an_sdxl_whose_parts_are_of_different_models_is_refused(sdxl_folder, make_run, tmp_path):
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('input_dim": 96', 'input_dim": 80'))
    with pytest.raises(ModelError, match="whole prompt's embedding of width 48 and six sizes"):
        make_run(f"model.path={folder}").model.load()
    with pytest.raises(SettingsError, match="clip_skip=2 has no effect on SDXL"):
        make_run(f"model.path={sdxl_folder}", "model.clip_skip=2")


def test_sdxl_alone_brings_its_size_and_the_unet_alone():
    cfg = compose(["model=sdxl", "dataset.image_dir=photos"])
    assert (cfg.optimizer.text_encoder_lr, list(cfg.dataset.resolution)) == (0, [1024, 1024])
    cfg = compose(["model=sdxl", "dataset.image_dir=photos", "optimizer.text_encoder_lr=1e-5"])
    assert cfg.optimizer.text_encoder_lr == 1e-5
    assert compose(["dataset.image_dir=photos"]).optimizer.text_encoder_lr == 5e-5


def test_training_target_is_what_the_model_predicts(base, make_run):
    latents, noise = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16)
    timesteps = torch.tensor([500])
    epsilon = make_run("model.prediction_type=epsilon").model.load()
    assert torch.equal(epsilon.noise_schedule.training_target(latents, noise, timesteps), noise)
    alpha = base.noise_schedule.scheduler.alphas_cumprod[500]
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents  # arXiv 2202.00512
    assert torch.allclose(
        base.noise_schedule.training_target(latents, noise, timesteps), velocity, atol=1e-5
    )


def test_min_snr_weights_follow_the_paper(base, make_run):
    timesteps = torch.tensor([10, 500, 900])
    alphas = base.noise_schedule.scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    assert torch.allclose(
        base.noise_schedule.min_snr_weight(timesteps, 5), snr.clamp(max=5) / (snr + 1)
    )
    epsilon = make_run("model.prediction_type=epsilon").model.load()
    assert torch.allclose(
        epsilon.noise_schedule.min_snr_weight(timesteps, 5), snr.clamp(max=5) / snr
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_min_snr_weights_are_sd_scripts_and_finite_at_every_timestep(prediction_type, zero_snr):
    """sd-scripts' apply_snr_weight; at an SNR of 0, where theirs is 0/0, the limit of it."""
    config = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": prediction_type,
        "rescale_betas_zero_snr": zero_snr,
    }
    schedule, gamma = NoiseSchedule(config), 5.0
    alphas = schedule.scheduler.alphas_cumprod
    snr = (alphas.sqrt() / (1 - alphas).sqrt()) ** 2
    least = torch.minimum(snr, torch.full_like(snr, gamma))
    theirs = least / (snr + 1) if prediction_type == "v_prediction" else least / snr
    ours = schedule.min_snr_weight(torch.arange(1000), gamma)
    assert bool(ours.isfinite().all())
    assert bool((snr[-1] == 0) == zero_snr)
    torch.testing.assert_close(ours[:-1], theirs[:-1])
    if zero_snr:
        assert float(ours[-1]) == (0 if prediction_type == "v_prediction" else 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_one_line():
    assert resolve_device("auto") == "cpu"
    with pytest.raises(SettingsError, match="no CUDA device was found"):
        resolve_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_cuda_predicts_what_the_cpu_does(precision, base, make_run):
    moved = make_run().model.load("cuda", precision)
    with torch.no_grad(), moved.autocast():
        embeds = moved.encode_prompt(["a cat"])
        latents = torch.ones(1, 4, 16, 16, device="cuda")
        ours = moved.predict(latents, torch.tensor([500], device="cuda"), embeds)
        cpu = base.predict(latents.cpu(), torch.tensor([500]), base.encode_prompt(["a cat"]))
    tolerance = 1e-3 if precision == "fp32" else 0.1
    assert torch.allclose(ours.float().cpu(), cpu, atol=tolerance)
