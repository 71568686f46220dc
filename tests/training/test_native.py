"""The native trainer: a run in a pack is the same run alone, whatever its neighbours do."""

import logging
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from conftest import FAMILIES, FEW
from lorasweep.core import rng
from lorasweep.core.settings import SettingsError
from lorasweep.lora_files import checkpoint
from lorasweep.training.native_trainer import NativeTraining
from lorasweep.training.pack_loss import PackLoss
from lorasweep.training.training_batches import epoch_batches
from lorasweep.training.training_captions import caption_of, warn_of_cut_captions
from lorasweep.training.training_run import TrainerError, TrainingData
from small_training import Losses, half_of, load, relative_difference, tensors, train


@pytest.fixture
def make_run(make_run):
    return partial(make_run, FEW)


@pytest.fixture
def data(make_run, base):
    return load(make_run(), base)


@pytest.fixture
def half(data):
    """Half of the images: two steps an epoch."""
    return half_of(data)


MIXED = [
    ("adapter.rank=4", "optimizer.unet_lr=1e-3", "seed=1"),
    ("adapter.rank=16", "optimizer.unet_lr=3e-4", "lr_scheduler=cosine", "seed=2"),
    ("adapter.rank=8", "optimizer.unet_lr=2e-3", "trainer.noise_offset=0.1", "seed=3"),
]


@pytest.mark.parametrize(
    ("base", "steps"), [("embedded_base", "null"), ("sdxl", 1)], indirect=["base"]
)
def test_a_run_in_a_pack_is_the_run_alone(steps, make_run, base, half):
    limit = f"trainer.max_train_steps={steps}"
    runs = [make_run(*overrides, limit, number=number) for number, overrides in enumerate(MIXED)]
    losses, last, _ = train(base, half, *runs)
    for run in runs:
        alone_losses, alone_last, _ = train(base, half, run)
        assert losses[run.name] == pytest.approx(alone_losses[run.name], rel=1e-5)
        difference = relative_difference(tensors(last[run.name]), tensors(alone_last[run.name]))
        assert difference < 1e-5


def test_a_neighbour_that_turns_nan_is_stopped_alone(make_run, base, data, monkeypatch):
    healthy = make_run("adapter.rank=4", number=0)
    doomed = make_run("adapter.rank=8", "seed=9", number=1)
    noise = PackLoss._draw

    def poisoned(self, state, latents):
        drawn = noise(self, state, latents)
        if state.run.name == doomed.name and state.num_micro_steps == 5:  # in its second epoch
            return replace(drawn, target=drawn.target * float("nan"))
        return drawn

    monkeypatch.setattr(PackLoss, "_draw", poisoned)
    losses, last, failures = train(base, data, doomed, healthy)
    assert list(failures) == [doomed.name]
    assert (last[doomed.name].epoch, last[healthy.name].epoch) == (1, 2)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(last[doomed.name]).values())
    assert "in epoch 2, step 6" in failures[doomed.name]
    assert any(item.path.name in failures[doomed.name] for item in data.items)
    alone_losses, alone_last, _ = train(base, data, healthy)
    assert losses[healthy.name] == pytest.approx(alone_losses[healthy.name], rel=1e-5)
    difference = relative_difference(tensors(last[healthy.name]), tensors(alone_last[healthy.name]))
    assert difference < 1e-5


@pytest.mark.parametrize(
    "overrides", [("optimizer.unet_lr=1e39",), ("optimizer.unet_lr=1e5", "trainer.save_dtype=fp16")]
)
def test_weights_that_no_file_can_hold_stop_their_run_alone(overrides, make_run, base, data):
    """The last step of an epoch overflows: nothing but the weights shows it."""
    settings = ("trainer.max_train_epochs=1", "trainer.batch_size=12", *overrides[1:])
    doomed = make_run(*settings, overrides[0], number=1)
    healthy = make_run(*settings, number=0)
    _, last, failures = train(base, data, doomed, healthy)
    assert list(failures) == [doomed.name]
    assert list(last) == [healthy.name]


def test_a_run_of_so_many_steps_ends_within_an_epoch_and_its_schedule_with_it(
    make_run, base, data, caplog
):
    """4 steps an epoch: 6 end in the second one, beside a run that goes on to its third."""
    epochs = ("trainer.max_train_epochs=3", "lr_scheduler=linear")
    short = make_run("trainer.max_train_steps=6", *epochs, number=0)
    long = make_run("trainer.max_train_steps=100", *epochs, number=1)
    steps = []
    training = NativeTraining(
        short.trainer, base, [short, long], data, on_step=lambda *one: steps.append(one)
    )
    assert "trainer.max_train_steps=100 has no effect on demo-1" in caplog.text
    epochs = list(training)
    files = [[(one.run, one.epoch, one.step) for one in epoch.checkpoints] for epoch in epochs]
    assert files == [
        [("demo-0", 1, 4), ("demo-1", 1, 4)],
        [("demo-0", 2, 6), ("demo-1", 2, 8)],
        [("demo-1", 3, 12)],
    ]
    rates = [values["train/lr_unet"] for run, _, values in steps if run == "demo-0"]
    whole = short.optimizer.unet_lr
    assert rates == pytest.approx([whole * (1 - step / 6) for step in range(6)])
    last = epochs[1].checkpoints[0]
    metadata = checkpoint.read_metadata(last.path)
    assert (metadata["ss_steps"], metadata["ss_max_train_steps"]) == ("6", "6")
    assert metadata["ss_num_epochs"] == "2"
    in_pack = tensors(last)
    _, alone, _ = train(base, data, short)
    assert relative_difference(tensors(alone["demo-0"]), in_pack) < 1e-5


def test_a_neighbour_that_leaves_early_changes_nothing(make_run, base, half):
    short = make_run("trainer.max_train_epochs=1", "adapter.rank=16", number=0)
    dropped = make_run("trainer.max_train_epochs=3", "adapter.rank=2", number=1)
    long = make_run("trainer.max_train_epochs=3", "adapter.rank=4", number=2)
    seen, losses = [], Losses()
    training = NativeTraining(long.trainer, base, [short, dropped, long], half, on_step=losses.note)
    for epoch in training:
        seen.append([one.run for one in epoch.checkpoints])
        if len(seen) == 2:
            training.drop(dropped.name)
    assert [len(names) for names in seen] == [3, 2, 1]
    alone, _, _ = train(base, half, long)
    assert losses[long.name] == pytest.approx(alone[long.name], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_out_of_memory_splits_the_pack_and_loses_nothing(
    precision, make_run, base, half, monkeypatch, caplog
):
    if precision == "fp16":  # GradScaler must forget the step that broke off
        base = make_run().model.load(precision="fp16")
    options = ("adapter.rank=4", f"trainer.precision={precision}")
    runs = [make_run(f"seed={n}", *options, number=n) for n in range(3)]
    expected, files = {}, {}
    for run in runs:
        losses, last, _ = train(base, half, run)
        expected[run.name], files[run.name] = losses[run.name], tensors(last[run.name])
    calls = {"count": 0}
    forward = type(base.unet).forward

    def limited(self, sample, *args, **kwargs):
        calls["count"] += 1
        if sample.shape[0] > 6 and calls["count"] > 3:  # two runs of batch 3 fit
            raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(type(base.unet), "forward", limited)
    with caplog.at_level(logging.WARNING):
        losses, last, _ = train(base, half, *runs)
    assert "out of memory with 3 runs: they go on as two packs" in caplog.text
    tolerance = 1e-5 if precision == "fp32" else 0.02  # fp16 has 11 bits of mantissa
    for run in runs:
        assert losses[run.name] == pytest.approx(expected[run.name], rel=tolerance)
        assert (last[run.name].epoch, last[run.name].step) == (2, 4)
        assert relative_difference(tensors(last[run.name]), files[run.name]) < tolerance


def test_a_run_for_which_there_is_no_room_waits_until_others_have_ended(make_run, base, half):
    short = "trainer.max_train_epochs=1"
    first, second, late = (make_run(f"seed={n}", f"name=r{n}", short) for n in range(3))
    training = NativeTraining(first.trainer, base, [first, second], half)
    training.max_runs = 2  # as if three had been too many
    training.join(late)
    assert [[one.run for one in epoch.checkpoints] for epoch in training] == [["r0", "r1"], ["r2"]]


def test_out_of_memory_alone_says_what_to_try(make_run, base, data, monkeypatch):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")

    monkeypatch.setattr(type(base.unet), "forward", fails)
    with pytest.raises(TrainerError, match=r"trainer\.gradient_checkpointing=true"):
        train(base, data, make_run())


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_each_epoch_leaves_a_file_with_kohyas_name_and_metadata(name, dtype, make_run, base, data):
    run = make_run("adapter.rank=4", f"trainer.save_dtype={name}")
    _, last, _ = train(base, data, run)
    files = sorted(path.name for path in run.output_dir.glob("*.safetensors"))
    assert files == [f"{run.name}-000001.safetensors", f"{run.name}-000002.safetensors"]
    weights, metadata = checkpoint.read(last[run.name].path)
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert metadata["ss_epoch"] == "2"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "2.0"
    # 4 images in 3 arms, batch 3, 2 epochs
    assert metadata["ss_steps"] == metadata["ss_max_train_steps"] == "8"
    assert metadata["sshs_model_hash"] == checkpoint.data_hash(last[run.name].path)


@FAMILIES
def test_text_encoder_lr_zero_leaves_the_text_encoder_alone(make_run, base, data, monkeypatch):
    encoded, rested = [], []
    encode = type(base).encode_prompt
    monkeypatch.setattr(
        type(base), "encode_prompt", lambda self, p: encoded.append(len(p)) or encode(self, p)
    )
    captions = {item.caption for item in data.items}
    monkeypatch.setattr(
        type(base), "rest_text_encoders", lambda self: rested.append(sum(encoded) == len(captions))
    )
    run = make_run("optimizer.text_encoder_lr=0", "trainer.max_train_epochs=1")
    _, last, _ = train(base, data, run)
    (weights,) = [tensors(one) for one in last.values()]
    assert all(name.startswith("lora_unet") for name in weights)
    assert sum(encoded) == len(captions)  # each caption once
    assert rested and all(rested)  # and not before


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_each_text_encoder_of_sdxl_has_its_rate(make_run, base, data):
    model = f"model.path={base.settings.path}"
    targets = "adapter.targets=[unet.*.attn2.to_k,text_encoder*.q_proj]"
    run = make_run(
        model, targets, "optimizer.text_encoder_lr=[0,1e-3]", "trainer.max_train_steps=1"
    )
    seen = {}
    training = NativeTraining(
        run.trainer, base, [run], data, on_step=lambda *one: seen.update(one[2])
    )
    (epoch,) = training
    parts = {name.partition("_text_model")[0] for name in tensors(epoch.checkpoints[0])}
    assert {part for part in parts if part.startswith("lora_te")} == {"lora_te2"}
    assert (seen["train/lr_text_encoder"], seen["train/lr_text_encoder_2"]) == (0, 1e-3)
    (metadata,) = [checkpoint.read(one.path)[1] for one in epoch.checkpoints]
    assert metadata["ss_text_encoder_lr"] == "[0.0, 0.001]"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    with pytest.raises(SettingsError, match="only SDXL has two text encoders; give one number"):
        make_run("optimizer.text_encoder_lr=[0,1e-3]")


@pytest.mark.parametrize("base", ["sd2"], indirect=True)
def test_stable_diffusion_2_is_said_in_the_metadata(make_run, base, data):
    run = make_run("trainer.max_train_steps=1", "adapter.targets=[unet.*.proj_in]")
    (epoch,) = NativeTraining(run.trainer, base, [run], data)
    weights, metadata = checkpoint.read(epoch.checkpoints[0].path)
    assert metadata["ss_base_model_version"] == "sd_v2_v"
    assert metadata["ss_v2"] == "True"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert metadata["modelspec.prediction_type"] == "v"
    assert all(t.dim() < 3 for t in weights.values())  # Linear, where 1.x has 1x1 convolutions


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_the_loss_of_sdxl_is_what_diffusers_computes(make_run, base):
    """An oracle: the training step written out from its pipeline's public calls."""
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline

    run = make_run("trainer.batch_size=2", "dataset.flip_aug=true", "seed=1", "captions=[demo]")
    data = load(run, base)
    items = [
        replace(data.items[0], original_size=(48, 32), caption="a cat"),
        replace(data.items[1], original_size=(100, 90), caption="a rocket, " * 20),
    ]
    data = replace(data, items=items)
    pack = NativeTraining(run.trainer, base, [run], data).pack
    (loss,) = PackLoss(base, data).backward(pack.adapters, pack.states, [[0, 1]], 1)

    pipeline = StableDiffusionXLPipeline.from_pretrained(base.settings.path, add_watermarker=False)
    captions = [item.caption for item in items]
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    draw = rng.generator(1, "noise", 0)
    noise = torch.randn(2, *items[0].latents.shape, generator=draw)
    timesteps = torch.randint(1000, (2,), generator=rng.generator(1, "timesteps", 0))
    flip = rng.python_random(1, "flip", 0)
    flips = [flip.random() < 0.5 for _ in items]
    assert sum(flips) == 1
    latents = [item.flipped if f else item.latents for item, f in zip(items, flips, strict=True)]
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    noisy = schedule.add_noise(torch.stack(latents), noise, timesteps)
    # 48x32 in a square of 32: 32 wide and 21.3 high, so 5 from the top, as sd-scripts has it
    time_ids = torch.tensor([[32.0, 48, 5, 0, 32, 32], [90, 100, 1, 0, 32, 32]])
    conditions = {"text_embeds": pooled, "time_ids": time_ids}
    with torch.no_grad():
        predicted = pipeline.unet(noisy, timesteps, embeds, added_cond_kwargs=conditions).sample
    assert loss == pytest.approx(float((predicted - noise).square().mean()), rel=1e-5)
    wrong = {**conditions, "time_ids": time_ids[[1, 0]]}
    with torch.no_grad():
        other = pipeline.unet(noisy, timesteps, embeds, added_cond_kwargs=wrong).sample
    assert loss != pytest.approx(float((other - noise).square().mean()), rel=1e-5)


def test_accumulated_gradients_are_averaged(make_run, base, data):
    """With a tiny learning rate two plain steps move twice as far as one of two micro steps."""
    overrides = (
        "adapter.rank=4",
        "optimizer=sgd",
        "optimizer.args.momentum=0",
        "optimizer.unet_lr=1e-6",
        "optimizer.text_encoder_lr=1e-6",
        "optimizer.max_grad_norm=0",
        "trainer.batch_size=1",
        "trainer.max_train_epochs=1",
    )
    two_steps = make_run(*overrides, number=0)
    one_step = make_run(*overrides, "trainer.gradient_accumulation_steps=2", number=1)
    twice = replace(data, items=[replace(data.items[0], repeats=2)])
    (far,) = train(base, twice, two_steps)[1].values()
    losses, near, _ = train(base, twice, one_step)
    assert len(losses[one_step.name]) == 1
    assert (near[one_step.name].step, far.step) == (1, 2)
    ups = {name: tensor for name, tensor in tensors(far).items() if "lora_up" in name}
    doubled = {name: 2 * tensors(near[one_step.name])[name] for name in ups}
    assert relative_difference(doubled, ups) < 1e-3


def test_a_short_last_group_is_the_mean_of_its_own_batches(make_run, base, data):
    """3 batches make the same step as the whole of a group of 3 and as the rest of one of 4."""
    settings = (
        "trainer.batch_size=1",
        "trainer.max_train_epochs=1",
        "optimizer=sgd",
        "optimizer.max_grad_norm=0",
    )
    three = replace(data, items=[replace(data.items[0], repeats=3)])
    whole, rest = (
        make_run(*settings, f"trainer.gradient_accumulation_steps={size}", number=size)
        for size in (3, 4)
    )
    ups = [
        {name: tensor for name, tensor in tensors(one).items() if "lora_up" in name}
        for run in (whole, rest)
        for one in train(base, three, run)[1].values()
    ]
    assert relative_difference(*ups) < 1e-6


def test_gradient_checkpointing_changes_memory_not_results(make_run, base, half):
    options = ("adapter.rank=4", "adapter.rank_dropout=0.3", "trainer.max_train_epochs=1")
    plain, _, _ = train(base, half, make_run(*options))
    fresh = make_run().model.load()
    seen = []
    inner = fresh.unet.up_blocks[-1].resnets[0]
    inner.register_forward_pre_hook(lambda *_: seen.append(1))
    run = make_run(*options, "trainer.gradient_checkpointing=true")
    saved, _, _ = train(fresh, half, run)
    assert saved[run.name] == pytest.approx(plain[run.name], rel=1e-5)
    assert len(seen) == 2 * 2  # 2 steps, each computed forward twice


def test_bf16_trains_close_to_fp32_with_fp32_adapters(make_run, base, half):
    exact, _, _ = train(base, half, make_run("adapter.rank=4"))
    run = make_run("adapter.rank=4", "trainer.precision=bf16")
    rough, last, _ = train(run.model.load(precision="bf16"), half, run)
    assert rough[run.name] == pytest.approx(exact[run.name], rel=0.05)  # 8 bits of mantissa
    assert {tensor.dtype for tensor in tensors(last[run.name]).values()} == {torch.float32}


def test_bf16_packs_of_mixed_scales_train_as_alone(make_run, base, half):
    low = make_run().model.load(precision="bf16")
    options = ("trainer.precision=bf16", "trainer.max_train_epochs=1")
    runs = [
        make_run(*options, "adapter.rank=6", "adapter.alpha=1.7", number=0),
        make_run(*options, "adapter.rank=4", "adapter.alpha=3", number=1),
    ]
    losses, _, _ = train(low, half, *runs)
    for run in runs:
        alone, _, _ = train(low, half, run)
        assert losses[run.name] == pytest.approx(alone[run.name], rel=0.01)


@pytest.fixture(scope="module")
def plain():
    """What the small demo's weights are after an epoch; filled by the first who trains it."""
    return {}


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.min_snr_gamma=5",),
        ("dataset.shuffle_caption=true", "dataset.keep_tokens=1"),
        ("dataset.flip_aug=true",),
        ("dataset.caption_dropout_rate=0.5",),
        ("adapter.scale_weight_norms=0.01",),
        ("model.clip_skip=2",),
        ("optimizer=sgd",),
        ("lr_scheduler=polynomial", "lr_scheduler.warmup=0.5"),
    ],
)
def test_options_train_and_change_the_result(overrides, make_run, base, data, plain):
    short = "trainer.max_train_epochs=1"
    if not plain:
        (trained,) = train(base, data, make_run(short))[1].values()
        plain.update(tensors(trained))
    run = make_run(*overrides, short, number=1)
    own_base = run.model.load() if run.model != base.settings else base
    losses, last, _ = train(own_base, load(run, own_base), run)
    assert all(math.isfinite(loss) for loss in losses[run.name])
    assert relative_difference(tensors(last[run.name]), plain) > 1e-4


def test_weight_norms_are_kept_below_the_limit(make_run, base, half):
    run = make_run("adapter.rank=4", "adapter.scale_weight_norms=0.01")
    _, last, _ = train(base, half, run)
    from lorasweep.judging.judge import load_pack

    pack = load_pack(base, [last[run.name].path])
    assert max(float(delta.norm()) for _, delta in pack.delta_weights(0)) <= 0.01 * (1 + 1e-5)


def captions_seen(data, caption, count=400, **changes):
    """The captions that many reads of one image give."""
    item = replace(data.items[0], caption=caption, settings=replace(data.settings, **changes))
    return [caption_of(item, seed=0, epoch=2, place=(n, 0)) for n in range(count)]


def test_shuffled_captions_keep_their_first_tags_in_place(data):
    captions = captions_seen(data, "a, b, c, d", shuffle_caption=True, keep_tokens=2)
    assert {caption[:6] for caption in captions} == {"a, b, "}
    assert {caption[6:] for caption in captions} == {"c, d", "d, c"}


def test_sentences_are_neither_shuffled_nor_dropped_in_parts(data):
    sentence = "black ink on a white background, a high contrast icon of a rabbit"
    settings = replace(data.settings, shuffle_caption=True, caption_tag_dropout_rate=0.5)
    item = replace(data.items[0], caption=sentence, settings=settings.of_sentences())
    seen = {caption_of(item, seed=0, epoch=1, place=(n, 0)) for n in range(20)}
    assert seen == {sentence}
    emptied = replace(item, settings=replace(item.settings, caption_dropout_rate=1.0))
    assert caption_of(emptied, seed=0, epoch=1, place=(0, 0)) == ""


def test_tags_come_one_by_one_with_the_runs_own_steps(make_run, base, data):
    run = make_run("dataset.token_warmup_step=0.5")
    item = replace(data.items[0], caption="a, b, c, d, e", settings=run.dataset)
    loss = PackLoss(base, TrainingData([item], run.dataset))
    counters = [{"num_steps": step, "num_micro_steps": 2 * step} for step in (0, 4, 20)]
    states = [SimpleNamespace(run=run, num_epochs=0, max_train_steps=20, **one) for one in counters]
    captions = loss._captions(states, [[0]] * 3)  # a run that joined later has its own count
    assert captions == ["a", "a, b", "a, b, c, d, e"]


def test_captions_are_dropped_as_often_as_asked(data):
    whole = captions_seen(data, "a, b", caption_dropout_rate=0.25)
    assert 0.15 < whole.count("") / len(whole) < 0.35
    tags = captions_seen(data, "a, b, c", caption_tag_dropout_rate=0.5, keep_tokens=1)
    assert all(caption.startswith("a") for caption in tags)
    assert 0.4 < sum("b" in caption for caption in tags) / len(tags) < 0.6
    assert set(captions_seen(data, "a", caption_dropout_every_n_epochs=2)) == {""}
    assert set(captions_seen(data, "a", caption_dropout_every_n_epochs=3)) == {"a"}


def test_an_epoch_holds_every_image_repeats_times_in_kohyas_number_of_steps(data):
    items = [replace(item, repeats=10) for item in data.items[:10]]
    batches = epoch_batches(items, 3, run_seed=0, data_seed=0, epoch=1)
    assert len(batches) == 34  # kohya: 10 images x 10 repeats, batch 3
    counts = [sum(batch.count(index) for batch in batches) for index in range(10)]
    assert counts == [10] * 10


def test_buckets_meet_in_the_same_order_for_every_run_seed(data):
    items = [replace(item, bucket=(64, 64 + 32 * (n % 2))) for n, item in enumerate(data.items)]

    def shapes(seed):
        batches = epoch_batches(items, 2, run_seed=seed, data_seed=0, epoch=1)
        assert all(len({items[i].bucket for i in batch}) == 1 for batch in batches)
        return [(len(batch), items[batch[0]].bucket) for batch in batches]

    assert shapes(1) == shapes(2)


def test_runs_with_buckets_share_a_pack(make_run, base):
    options = (
        "dataset.enable_bucket=true",
        "dataset.min_bucket_reso=32",
        "dataset.max_bucket_reso=128",
        "dataset.bucket_reso_steps=32",
    )
    runs = [make_run(*options, f"seed={n}", "adapter.rank=4", number=n) for n in range(2)]
    data = load(runs[0], base)
    wide = [
        replace(item, bucket=(64, 32), latents=item.latents[:, :8]) if n % 3 == 0 else item
        for n, item in enumerate(data.items)
    ]
    data = replace(data, items=wide)
    losses, _, _ = train(base, data, *runs)
    alone, _, _ = train(base, data, runs[1])
    assert losses[runs[1].name] == pytest.approx(alone[runs[1].name], rel=1e-5)


def test_buckets_keep_their_order_from_epoch_to_epoch(data):
    """So that a run meets its neighbours' shapes whenever it joined them."""
    items = [replace(item, bucket=(64, 64 + 32 * (n % 3))) for n, item in enumerate(data.items)]
    orders = {
        tuple(items[batch[0]].bucket for batch in batches)
        for epoch in (1, 2, 3)
        for batches in [epoch_batches(items, 2, run_seed=epoch, data_seed=0, epoch=epoch)]
    }
    assert len(orders) == 1


@pytest.mark.parametrize(
    "kind",
    [("adapter.rank=16",), ("optimizer.text_encoder_lr=0",), ("optimizer.unet_lr=0",)],
    ids=["same kind", "unet only", "text encoder only"],
)
def test_a_run_that_joins_later_is_the_run_alone(kind, make_run, base, half):
    first, second = (make_run(f"seed={n}", "adapter.rank=4", number=n) for n in range(2))
    late = make_run("seed=7", *kind, number=2)
    losses, last = Losses(), {}
    training = NativeTraining(first.trainer, base, [first, second], half, on_step=losses.note)
    for number, epoch in enumerate(training):
        last.update({one.run: one for one in epoch.checkpoints})
        if number == 0:
            training.join(late)
    files = {name: tensors(one) for name, one in last.items()}
    assert {one.epoch for one in last.values()} == {2}
    for run in (first, late):
        alone_losses, alone_last, _ = train(base, half, run)
        assert losses[run.name] == pytest.approx(alone_losses[run.name], rel=1e-5)
        assert relative_difference(files[run.name], tensors(alone_last[run.name])) < 1e-5


def test_a_run_that_does_not_fit_alone_leaves_the_others(make_run, base, half, monkeypatch):
    runs = [make_run(f"seed={n}", f"name=r{n}") for n in range(2)]
    backward = PackLoss.backward

    def limited(self, pack, states, batches, num_micro_steps):
        if "r1" in [state.run.name for state in states]:
            raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")
        return backward(self, pack, states, batches, num_micro_steps)

    monkeypatch.setattr(PackLoss, "backward", limited)
    training = NativeTraining(runs[0].trainer, base, runs, half)
    monkeypatch.setattr(training, "pack", training.pack.select([1, 0]))  # it comes first
    training.pack.bind()
    epochs = list(training)
    assert [list(epoch.failures) for epoch in epochs] == [["r1"], [], []]
    assert [one.run for epoch in epochs for one in epoch.checkpoints] == ["r0", "r0"]
    assert training.max_runs == 1


def test_a_run_that_does_not_fit_alone_leaves_those_that_wait_for_the_end_of_its_epoch(
    make_run, base, half, monkeypatch
):
    first, late = (make_run(f"seed={n}", f"name=r{n}") for n in range(2))
    backward = PackLoss.backward

    def limited(self, pack, states, batches, num_micro_steps):
        if first.name in [state.run.name for state in states]:
            raise torch.OutOfMemoryError("CUDA out of memory (made by the test)")
        return backward(self, pack, states, batches, num_micro_steps)

    monkeypatch.setattr(PackLoss, "backward", limited)
    training = NativeTraining(first.trainer, base, [first], half)
    training.pack.states[0].num_batches = 1  # it goes on within its epoch
    training.join(late)
    epochs = list(training)
    assert [list(epoch.failures) for epoch in epochs] == [["r0"], [], []]
    assert [one.run for epoch in epochs for one in epoch.checkpoints] == ["r1", "r1"]


def test_captions_that_are_cut_are_one_warning_an_arm(base, data, caplog):
    """The text encoder reads 75 tokens between the two that frame them: two ends are one input."""
    room = base.tokenizer.model_max_length - 2
    fitting, longer = " ".join(["cat"] * room), " ".join(["cat"] * room + ["dog"])
    assert base.max_tokens == room
    assert torch.equal(base.tokenize([fitting]), base.tokenize([longer]))
    captions = {"wd": [longer, fitting, longer], "empty": ["", "", ""], "own": [fitting, longer]}
    items = [
        replace(
            data.items[0], arm=arm, caption=caption, path=data.items[0].path.with_name(f"{n}.png")
        )
        for arm, of_arm in captions.items()
        for n, caption in enumerate(of_arm)
    ]
    warn_of_cut_captions(base, items)
    assert [one.split(" tokens")[0] for one in caplog.messages] == [
        f"captions.wd: 2 of 3 captions are longer than the {room}",
        f"captions.own: 1 of 2 captions are longer than the {room}",
    ]
    assert "such as that of 0.png" in caplog.messages[0]
    assert "such as that of 1.png" in caplog.messages[1]
