"""A stand-in for a checkout of kohya's sd-scripts and for its Python, without torch.

`write` makes the folder. Its train_network.py reads the TOML, counts the steps of the folders of
images, and writes what the real one writes, in the same places and order: TensorBoard's log, in it
the end of an epoch, then the epoch's file (in place, in two pieces) and state, then the next
epoch's steps. What it does amiss, `plan.json` beside it says by run: ["crash", 2] in epoch 2; also
oom, hang, torn (the last file) and short (it reads other images than we do).
"""

import json
import sys
from pathlib import Path

_PYTHON = """#!/bin/sh
# `python -c QUESTION` and `python -m accelerate.commands.launch --config_file FILE SCRIPT …`
case "$1 $2" in
    -c*torch.__version__*) echo '2.6.0 False'; exit 0;;
    -c*PRESET*) echo '{preset}'; exit 0;;
    -c*) echo '{answer}'; exit 0;;
    *--help) exit 0;;
esac
shift 4
"{python}" -S "$@"
code=$?
if [ $code != 0 ]; then
    echo 'Traceback (most recent call last):
  File "accelerate/commands/launch.py", line 763, in simple_launcher' >&2
    echo "subprocess.CalledProcessError: Command returned non-zero exit status $code." >&2
    exit 1
fi
"""
PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "tensorboard", "toml", "lycoris")
NO_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB."


def write(folder: Path, weights: Path, packages=PACKAGES, *, preset=False) -> Path:
    """The folder of a checkout, which gives these weights as every checkpoint; its Python.

    `preset`: are LyCORIS's presets those that name modules of SD1.5 twice?
    """
    folder.mkdir()
    (folder / "train_network.py").write_text(Path(__file__).read_text())
    (folder / "weights.safetensors").write_bytes(weights.read_bytes())
    answer = json.dumps({"python": "3.10.14", "packages": dict.fromkeys(packages, "1.0")})
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(_PYTHON.format(answer=answer, python=sys.executable, preset=preset))
    python.chmod(0o755)
    plan(folder)
    return python


def plan(folder: Path, **amiss) -> None:
    """What goes amiss from now on, by run: ("crash", 2) in its epoch 2."""
    (folder / "plan.json").write_text(json.dumps(amiss))


def main() -> None:
    """Train, as the TOML that the command line names says."""
    import tomllib

    toml = Path(sys.argv[sys.argv.index("--config_file") + 1])
    settings = {}
    for section in tomllib.loads(toml.read_text()).values():
        settings |= section
    _train(settings, Path(__file__).parent)


def _train(settings, here):
    import os
    import time

    name, output = settings["output_name"], Path(settings["output_dir"])
    kind, when = json.loads((here / "plan.json").read_text()).get(name, ["", 0])
    (here / f"{name}.new").write_text(str(os.getpid()))
    (here / f"{name}.new").rename(here / f"{name}.pid")
    per_epoch = _steps(Path(settings["train_data_dir"]), settings["train_batch_size"])
    total = settings["max_train_steps"]
    num_epochs = -(-total // per_epoch)
    first = settings.get("initial_epoch") or 1
    if first > 1:  # as the real one does, it fails without its state
        assert Path(settings["resume"], "train_state.json").is_file()
    log = _Log(Path(settings["logging_dir"], time.strftime("%Y%m%d%H%M%S"), "network_train"))
    global_step = 0  # again from 0 when resumed
    for epoch in range(first, num_epochs + 1):
        print(f"\nepoch {epoch}/{num_epochs}")
        for step in range(per_epoch - (kind == "short")):
            if kind in ("crash", "oom", "hang") and epoch == when and step == 1:
                _go_amiss(kind)
            global_step += 1
            _bar(global_step, total)
            log.scalars(global_step, **{"loss/current": 1 / epoch, "loss/average": 1 / epoch})
            log.scalars(global_step, **{"lr/textencoder": 1e-4, "lr/unet": 1e-3 * global_step})
            if global_step >= total:
                break
        log.scalars(epoch, **{"loss/epoch_average": 1 / epoch})
        if settings.get("sample_every_n_epochs"):
            (output / "sample").mkdir(parents=True, exist_ok=True)
            (output / "sample" / f"{name}_e{epoch:06d}_00_20261129.png").write_bytes(b"picture")
        if epoch < num_epochs:
            stem = f"{name}-{epoch:06d}"
            _save(here, output / f"{stem}.safetensors", settings, global_step, epoch)
            if settings["save_state"]:
                _save_state(output / f"{stem}-state", epoch, epoch * per_epoch)
    _save(here, output / f"{name}.safetensors", settings, global_step, num_epochs, kind == "torn")
    if settings["save_state"]:
        _save_state(output / f"{name}-state", num_epochs, total)
    print("model saved.")


def _steps(data, batch_size):
    """Of an epoch, with one bucket."""
    rows = 0
    for folder in data.iterdir():
        repeats = folder.name.partition("_")[0]
        if repeats.isdigit():
            images = [one for one in folder.iterdir() if one.suffix in (".png", ".jpg", ".webp")]
            rows += int(repeats) * len(images)
    return -(-rows // batch_size)


def _go_amiss(kind):
    import time

    if kind == "hang":
        time.sleep(600)
    print("Traceback (most recent call last):", file=sys.stderr)
    said = NO_MEMORY if kind == "oom" else "RuntimeError: the stars are wrong"
    print(said, file=sys.stderr)
    sys.exit(1)


def _bar(step, total):
    percent = 100 * step // total
    print(f"\rsteps: {percent:3d}%|####    | {step}/{total} [00:01<00:01, avr_loss=0.1]", end="")


def _save(here, path, settings, step, epoch, torn=False):
    """A safetensors file with kohya's metadata, written in place, in two pieces."""
    content = (here / "weights.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = {
        "ss_output_name": settings["output_name"],
        "ss_network_module": settings["network_module"],
        "ss_network_dim": str(settings["network_dim"]),
        "ss_network_alpha": str(settings["network_alpha"]),
        "ss_steps": str(step),
        "ss_epoch": str(epoch),
        "ss_session_id": "1",
        "ss_sd_scripts_commit_hash": "stand-in",
    }
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content[8 + size :]
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data[: len(data) // 2])
        file.flush()
        if not torn:
            file.write(data[len(data) // 2 :])


def _save_state(folder, epoch, step):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"state")
    state = {"current_epoch": epoch, "current_step": step}
    (folder / "train_state.json").write_text(json.dumps(state))


class _Log:
    """TensorBoard's file: framed protobuf messages; nobody here looks at their checksums."""

    def __init__(self, folder):
        folder.mkdir(parents=True)
        self.file = (folder / "events.out.tfevents.1.stand-in.1.0").open("wb")

    def scalars(self, step, **values):
        import struct

        for tag, value in values.items():
            name = tag.encode()
            content = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", value)
            summary = b"\x0a" + bytes([len(content)]) + content
            event = b"\x09" + struct.pack("<d", 0.0) + b"\x10" + _varint(step)
            event += b"\x2a" + bytes([len(summary)]) + summary
            self.file.write(struct.pack("<Q", len(event)) + b"\0" * 4 + event + b"\0" * 4)
        self.file.flush()


def _varint(number):
    found = b""
    while number >= 128:
        found, number = found + bytes([number % 128 + 128]), number // 128
    return found + bytes([number])


if __name__ == "__main__":
    main()
