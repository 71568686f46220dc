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
runpy.run_path({checkout!r} + "/train_network.py", run_name="__main__")
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


def write_checkout(folder: Path, checkout: Path, model: Path) -> None:
    """A train_network.py that runs that of a checkout for the narrow model."""
    folder.mkdir()
    tokenizer = str(model / "tokenizer")
    script = _SCRIPT.format(checkout=str(checkout), widths=_WIDTHS, tokenizer=tokenizer)
    (folder / "train_network.py").write_text(script)


def _edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
