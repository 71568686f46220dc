"""A base model of SD1.5's shape, a tenth as wide, and kohya's sd-scripts made to take it.

The embedded model has another shape and another VAE scale than sd-scripts can train.
"""

import json
import shutil
from pathlib import Path

import lorasweep

_WIDTHS = (32, 32, 64, 64)
_SCRIPT = """# sd-scripts with the widths of a narrow model, and its tokenizer in place of the hub's
import runpy, sys
sys.path.insert(0, {checkout!r})
from library import original_unet, strategy_sd
original_unet.BLOCK_OUT_CHANNELS = {widths!r}
original_unet.TIMESTEP_INPUT_DIM, original_unet.TIME_EMBED_DIM = {widths[0]}, 4 * {widths[0]}
strategy_sd.TOKENIZER_ID = {tokenizer!r}
{run}
"""
_RUN = 'runpy.run_path({checkout!r} + "/train_network.py", run_name="__main__")'
_RECORD = """
import atexit, torch, train_network
from library import train_util
numbers, draw = {{"steps": []}}, train_util.get_noise_noisy_latents_and_timesteps
atexit.register(lambda: torch.save(numbers, {path!r}))
def begin(self, args, accelerator, network, text_encoders, unet, batch, *rest, **more):
    weights = accelerator.unwrap_model(network).state_dict()
    numbers.setdefault("initial", {{key: value.clone() for key, value in weights.items()}})
    numbers["steps"].append({{"captions": list(batch["captions"])}})
def drawn(args, scheduler, latents):
    found = draw(args, scheduler, latents)
    kept = zip(("latents", "noise", "timesteps"), (latents, found[0], found[2]))
    numbers["steps"][-1].update((name, value.clone()) for name, value in kept)
    return found
train_network.NetworkTrainer.on_step_start = begin
train_util.get_noise_noisy_latents_and_timesteps = drawn
parser = train_network.setup_parser()
settings = train_util.read_config_from_file(parser.parse_args(), parser)
train_network.NetworkTrainer().train(settings)
"""


def write_model(folder: Path) -> None:
    """Text encoder and VAE of the embedded model, with SD1.5's VAE scale, schedule and blocks."""
    import torch
    from diffusers import UNet2DConditionModel

    embedded = Path(lorasweep.__file__).parent / "embedded" / "base_model"
    shutil.copytree(embedded, folder, ignore=shutil.ignore_patterns("unet"))
    _edit(folder / "vae" / "config.json", scaling_factor=0.18215)
    schedule = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    _edit(folder / "scheduler" / "scheduler_config.json", **schedule)
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=_WIDTHS, cross_attention_dim=128, attention_head_dim=8
    )
    torch.set_rng_state(generator_state)
    unet.save_pretrained(folder / "unet")


def write_checkout(folder: Path, checkout: Path, model: Path, numbers: Path | None = None) -> None:
    """A train_network.py that runs that of a checkout for the narrow model.

    To the file `numbers` it writes at its end the initial weights and, by step, what was drawn.
    """
    folder.mkdir()
    tokenizer = str(model / "tokenizer")
    run = _RUN if numbers is None else _RECORD
    text = run.format(checkout=str(checkout), path=str(numbers))
    script = _SCRIPT.format(checkout=str(checkout), widths=_WIDTHS, tokenizer=tokenizer, run=text)
    (folder / "train_network.py").write_text(script)


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
