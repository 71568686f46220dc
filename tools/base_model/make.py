"""Make the embedded base model from nothing: icons, VAE, UNet, evaluation, demo data, card.

python tools/base_model/make.py --out DIR --device cpu

A stage that is done is skipped; a killed one resumes from its last state.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

STAGES = ("icons", "vae", "unet", "compare", "evaluate", "demo", "card")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages up to the one asked for."""
    args = parser().parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import of the libraries
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: find tools
    from tools.base_model import stages
    from tools.base_model.presets import PRESETS

    preset = PRESETS[args.preset or args.device]
    if args.unet_samples:
        preset = replace(preset, unet=replace(preset.unet, samples=args.unet_samples))
    job = stages.Job(preset, args.seed, args.device, args.out.resolve(), args.compare)
    if args.stage == "preview":
        job.run_preview()
        return
    for name in STAGES[: STAGES.index(args.stage) + 1]:
        print(f"== {name}", flush=True)
        getattr(job, f"run_{name}")()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    p.add_argument("--out", type=Path, required=True, help="folder of all work and results")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--preset", choices=("cpu", "cuda"), help="sizes; the device's own if left out")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--unet-samples", type=int, help="train longer or shorter than the preset")
    p.add_argument("--compare", type=Path, help="another model folder, to score beside ours")
    p.add_argument(
        "--stage",
        choices=(*STAGES, "preview"),
        default=STAGES[-1],
        help="the last stage to run; preview: a model folder of the newest checkpoint",
    )
    return p


if __name__ == "__main__":
    main()
