"""Numbers that must stay as they are when the code's shape changes.

Four small runs with adapters, optimisers and options of several kinds are trained by the command
line: all in one pack, and each alone. `recorded/golden.json` holds what came out before the code
was moved: the loss of every step, the checkpoints' weights, scores and pictures. On a machine of
the same type (processor and libraries, see `fingerprint`) everything must be equal bit by bit; on
any other it must agree within the tolerances below. Nothing of the package is imported for that:
only the command line, a run's files and MLflow's store are used. Further below the random streams
themselves are pinned by values.

Where numbers are changed on purpose, they are recorded anew; and where bits are to be compared on
another type of machine, it is added, from a commit whose numbers are known to be right:

    python tests/test_golden.py --record
    python tests/test_golden.py --add
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from command_line import done_here
from lorasweep.core import rng

GOLDEN = Path(__file__).parent / "recorded" / "golden.json"

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""How sums are cut into parts, and so how they are rounded, depends on the number of threads."""
LIBRARIES = ("torch", "numpy", "pillow", "diffusers", "transformers")
"""Those that compute."""

RELATIVE = 1e-3
"""Difference of losses, scores and weights that another machine may make; with other instructions
(AVX2, SSE) and two threads it was 1e-4 at most."""
GAP = 1e-4
"""The same of val/gap, a difference of losses; absolute."""
MEAN = 1.0
"""The same of a picture's mean, of 255."""

SHARED = [
    "experiment=demo",
    "launcher.devices=cpu",
    "trainer.device=cpu",
    "trainer.max_train_epochs=2",
    "trainer.batch_size=3",
    # streams of the data: order of images and buckets, flips, captions
    "dataset.num_images=3",
    "dataset.num_holdout=4",
    "dataset.resolution=[48,48]",
    "dataset.min_size=16",
    "dataset.enable_bucket=true",
    "dataset.min_bucket_reso=32",
    "dataset.max_bucket_reso=64",
    "dataset.bucket_reso_steps=16",
    "dataset.flip_aug=true",
    "dataset.shuffle_caption=true",
    "captions.kosmos.tags=true",
    "dataset.keep_tokens=1",
    "dataset.caption_dropout_rate=0.1",
    "dataset.caption_tag_dropout_rate=0.2",
    # this sampler draws noise at every step
    "sampling.scheduler=EulerAncestralDiscreteScheduler",
    "sampling.prompts=[a high contrast icon of a rocket,a fox --d 7 --l 3]",
    "sampling.num_inference_steps=2",
    "sampling.width=32",
    "sampling.height=32",
    "metrics.validation.num_timesteps=4",
    "metrics.validation.max_tuples=12",
    "metrics.validation.num_probe_images=2",
    "metrics.validation.num_bootstrap=50",
    "metrics.validation.num_swaps=0",  # recorded before there were any
    "metrics.prior_drift.num_timesteps=2",
    "metrics.prior_drift.prompts=[flat emoji of cat face,3d emoji of house]",
]
"""What all runs have in common, or they would not train in one pack."""

RUNS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "lora": (
        {"adapter": "lora", "lr_scheduler": "cosine"},
        {
            "seed": 1,
            "adapter": {
                "rank": 4,
                "network_dropout": 0.1,
                "rank_dropout": 0.1,
                "module_dropout": 0.1,
            },
            "optimizer": {"unet_lr": 3e-3, "text_encoder_lr": 2e-3},
            "lr_scheduler": {"warmup": 0.25},
        },
    ),
    "locon": (
        {"adapter": "locon", "optimizer": "sgd"},
        {
            "seed": 2,
            "adapter": {
                "rank": 6,
                "conv_rank": 2,
                "init": "orthogonal",
                "targets": ["unet.mid_block.*", "unet.up_blocks.*.attentions.*"],
            },
            "optimizer": {"unet_lr": 0.5, "text_encoder_lr": 0},
            "trainer": {"noise_offset": 0.1},
        },
    ),
    "loha": (
        {"adapter": "loha", "lr_scheduler": "linear"},
        {
            "seed": 3,
            "adapter": {
                "rank": 2,
                "rank_dropout": 0.1,
                "module_dropout": 0.1,
                "scale_weight_norms": 0.5,
                "targets": ["unet.mid_block.*", "text_encoder.*.q_proj"],
            },
            "optimizer": {"unet_lr": 2e-2, "text_encoder_lr": 1e-2},
            "trainer": {"min_snr_gamma": 5},
        },
    ),
    "dora": (
        {"adapter": "dora", "optimizer": "sgd"},
        {
            "seed": 4,
            "adapter": {"rank": 4, "rslora": True, "targets": ["unet.mid_block.*"]},
            "optimizer": {"type": "RMSprop", "unet_lr": 1e-3, "text_encoder_lr": 0},
        },
    ),
}
"""Options of groups, and values, of each run."""

IMAGES = {
    "fox": (64, 64),
    "bread": (96, 32),
    "snail": (70, 60),
    "tulip": (100, 30),
    "ghost": (48, 48),
    "cloud": (80, 40),
    "zebra": (50, 50),
}
"""Sizes of pictures, for buckets of several shapes; named as the demo's, they get its captions."""


def fingerprint() -> dict[str, Any]:
    """What decides how this machine rounds."""
    import torch

    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in LIBRARIES},
    }


def _processor() -> str:
    """Its name, which may be as vague as AMD EPYC; so model, cache and instructions are added."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:  # another system than Linux
        return f"{platform.system()} {platform.machine()} {platform.processor()}"
    pairs = (line.partition(":")[::2] for line in text.splitlines())
    known = {key.strip(): value.strip() for key, value in pairs}
    named = ("model name", "cpu family", "model", "stepping", "cache size")
    flags = known.get("flags", known.get("Features", ""))
    digest = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:8]
    return ", ".join([*(known.get(key, "?") for key in named), f"flags {digest}"])


def train(folder: Path) -> dict[str, Any]:
    """All runs, in one pack and alone, by one command; what is kept of them, by place and run."""
    _draw_images(folder / "photos")
    jobs = _write_options(folder / "conf" / "golden")
    command = ["train", "-m", "--config-dir", "conf", f"+golden={','.join(jobs)}", *SHARED]
    places = ["output_root=outputs", "cache_dir=cache", "dataset.image_dir=photos", "name=golden"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ONE_THREAD.items():
            patch.setenv(name, value)
        done = done_here(*command, *places, "hydra.sweep.dir=outputs/golden", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    curves = _curves(folder / "outputs")
    found: dict[str, Any] = {}
    for number, job in enumerate(jobs):
        name = f"golden-{number}"
        output_dir = folder / "outputs" / "golden" / str(number)
        found[job] = {
            **curves[name],
            "checkpoints": _checkpoints(output_dir, name),
            "pictures": _pictures(output_dir / "samples", name),
        }
    return found


def _draw_images(folder: Path) -> None:
    """Stripes and a square, in each picture others, and all without symmetry."""
    from PIL import Image, ImageDraw

    folder.mkdir()
    for number, (name, (width, height)) in enumerate(IMAGES.items()):
        image = Image.new("RGB", (width, height), (250 - 20 * number, 230, 90 + 25 * number))
        draw = ImageDraw.Draw(image)
        for x in range(0, width // 2, 5 + number):
            draw.rectangle((x, 0, x + 1 + number // 2, height - 1), (20 * number, 10, 30))
        draw.rectangle((width // 2, height // 3, width - 3, height - 2), (200, 40 * number, 0))
        image.save(folder / f"{name}.png")


def _write_options(folder: Path) -> list[str]:
    """An option of the group `golden` for each run of the pack, and for each alone; their names.

    How many states are kept changes no number, and runs that differ in it don't share a pack.
    """
    folder.mkdir(parents=True)
    jobs = {f"packed_{name}": (name, {}) for name in RUNS}
    jobs |= {f"alone_{name}": (name, {"keep_states": 3 + n}) for n, name in enumerate(RUNS)}
    for job, (name, states) in jobs.items():
        options, values = RUNS[name]
        defaults = [{f"override /{group}": option} for group, option in options.items()]
        content = {
            "defaults": defaults,
            **values,
            "trainer": {**values.get("trainer", {}), **states},
        }
        text = json.dumps(content, indent=1)  # JSON is YAML
        (folder / f"{job}.yaml").write_text(f"# @package _global_\n{text}\n")
    return list(jobs)


def _curves(output_root: Path) -> dict[str, Any]:
    """Of MLflow's store, by run: what was logged of steps, and scores of epochs."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output_root / 'mlflow.db'}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    found: dict[str, Any] = {}
    for run in client.search_runs(experiments):
        kinds: dict[str, Any] = {"steps": {}, "scores": {}}
        for key in sorted(run.data.metrics):
            if key == "train/it_per_s" or key.startswith(("best/", "val/score")):
                continue  # these two follow from the other scores
            history = client.get_metric_history(run.info.run_id, key)
            values = [metric.value for metric in sorted(history, key=lambda one: one.step)]
            kinds["steps" if key.startswith("train/") else "scores"][key] = values
        found[run.info.run_name] = kinds
    return found


def _checkpoints(folder: Path, name: str) -> dict[str, Any]:
    """By epoch: the digest of all weights, and what can be compared on another machine."""
    from safetensors.numpy import load_file

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        digest = hashlib.sha256()
        kinds: dict[str, list[Any]] = {}
        for key, tensor in sorted(load_file(path).items()):
            digest.update(f"{key} {tensor.dtype} {tensor.shape}\n".encode() + tensor.tobytes())
            kinds.setdefault(key.partition(".")[2], []).append(tensor.ravel())
        weights = {kind: _measured(tensors) for kind, tensors in kinds.items()}
        epoch = path.stem.removeprefix(f"{name}-")
        found[epoch] = {"sha256": digest.hexdigest(), "weights": weights}
    return found


def _measured(tensors: list[Any]) -> dict[str, float]:
    """Norm of all tensors of a kind, and their product with a fixed vector of its size."""
    import numpy as np

    values = np.concatenate(tensors).astype(np.float64)
    wave = np.cos(np.arange(len(values)) ** 2 % 1009)
    return {"norm": float(np.sqrt((values**2).sum())), "projection": float((values * wave).sum())}


def _pictures(folder: Path, name: str) -> dict[str, Any]:
    """By epoch and prompt: the digest of the pixels, and their mean."""
    import numpy as np
    from PIL import Image

    found = {}
    for path in sorted(folder.glob("*.png")):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        digest = hashlib.sha256(f"{pixels.shape}\n".encode() + pixels.tobytes()).hexdigest()
        key = path.stem.removeprefix(f"{name}_")
        found[key] = {"sha256": digest, "mean": round(float(pixels.mean()), 6)}
    return found


def leaves(tree: Any, *keys: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value with its path; the values of a list have their numbers."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, *keys, str(key))
    else:
        yield keys, tree


def differences(new: dict[str, Any], old: dict[str, Any], exact: bool) -> list[str]:
    """A line for each value that is not as it was."""
    ours, theirs = dict(leaves(new)), dict(leaves(old))
    lines = []
    for path in sorted({*ours, *theirs}):
        a, b = ours.get(path), theirs.get(path)
        if a is None or b is None or not (_same(a, b) if exact else _near(path, a, b, theirs)):
            lines.append(f"{' '.join(path)}: {a}, was {b}")
    return lines


def _same(a: float | str, b: float | str) -> bool:
    return a == b or (a != a and b != b)  # NaN


def _near(path: tuple[str, ...], a: Any, b: Any, old: dict[tuple[str, ...], Any]) -> bool:
    """Is it as it was, as far as machines that round otherwise can tell?"""
    *_, kind, last = path
    if last == "sha256" or _same(a, b):
        return True
    if last == "projection":  # of any sign; a random direction's is about as large as the norm
        return abs(a - b) <= RELATIVE * old[*path[:-1], "norm"]
    if last == "mean":
        return abs(a - b) <= MEAN
    return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=GAP if kind == "val/gap" else 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, forked_workers: None) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("golden"))


def test_numbers_are_as_they_were(trained):
    machines = json.loads(GOLDEN.read_text())
    here = fingerprint()
    known = [one["numbers"] for one in machines if one["machine"] == here]
    if not known:
        warnings.warn("another machine than golden.json's: compared by tolerance", stacklevel=1)
    lines = differences(trained, (known or [machines[0]["numbers"]])[0], exact=bool(known))
    assert not lines, f"{len(lines)} values, of which the first:\n" + "\n".join(lines[:20])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_alone_is_the_run_in_its_pack(name, trained):
    assert not differences(trained[f"alone_{name}"], trained[f"packed_{name}"], exact=False)


STREAMS: dict[tuple[str | int, ...], int] = {
    ("init", "lora_unet_mid_block"): 6748263479435462375,
    ("order", 1, "(64, 64)"): 3949786709183824653,
    ("buckets",): 7712415291551285913,
    ("caption", 3, 0): 5777026635702356441,
    ("flip", 3): 5085156897462478696,
    ("noise", 3): 877049058515921342,
    ("timesteps", 3): 5419100601687999426,
    ("dropout", 3, "lora_unet_mid_block"): 9160187109598681641,
    ("tuples", "holdout"): 7138529976253606411,
    ("validation", "fox.png", 500, 1): 5544021652258738683,
    ("bootstrap",): 8731817942318510755,
    ("drift", 0): 7374227649257831447,
    ("sample",): 2178326232981172076,
    ("sampler",): 852367346205932741,
    ("session", "demo-0"): 4478309530838735547,
    ("pissa", 320, 320, 16): 278140666984930599,
    ("points", 4): 2284923980903199398,
    ("sampler", 4): 9222695851725255475,
}
"""Seeds of the streams that there are, with keys as they are used, of the run seed 11."""


def test_random_streams_have_their_seeds():
    assert {key: rng.key_seed(11, *key) for key in STREAMS} == STREAMS


def test_random_streams_draw_their_values():
    import torch

    timesteps = torch.randint(1000, (4,), generator=rng.generator(11, "timesteps", 3))
    assert timesteps.tolist() == [747, 951, 352, 84]
    uniform = torch.rand(3, generator=rng.generator(11, "init", "lora_unet_mid_block"))
    assert uniform.tolist() == pytest.approx(
        [0.12486690282821655, 0.5493177175521851, 0.281083345413208], rel=1e-6
    )
    noise = torch.randn(20, generator=rng.generator(11, "noise", 3))
    assert noise[[0, 1, 19]].tolist() == pytest.approx(
        [1.1084589958190918, -0.97504723072052, -0.7172308564186096], rel=1e-5
    )
    flip = rng.python_random(11, "flip", 3)
    assert [flip.random() for _ in range(2)] == [0.5419882777783624, 0.7368285536721342]
    order = list(range(8))
    rng.python_random(11, "order", 1, "(64, 64)").shuffle(order)
    assert order == [6, 3, 4, 2, 7, 1, 5, 0]


def write(add: bool) -> None:
    """Record the numbers of this machine, in place of all others or beside them."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = train(Path(folder))
    here = fingerprint()
    others = json.loads(GOLDEN.read_text()) if add else []
    for one in others:
        if lines := differences(numbers, one["numbers"], exact=False):
            sys.exit("this machine's numbers are others:\n" + "\n".join(lines))
    others = [one for one in others if one["machine"] != here]
    machines = [*others, {"machine": here, "numbers": numbers}]
    GOLDEN.write_text(json.dumps(machines, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] not in (["--record"], ["--add"]):
        sys.exit(__doc__)
    write(add=sys.argv[1] == "--add")
