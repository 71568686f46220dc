"""The command line: `lorasweep train | caption | pick | ui | doctor`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lorasweep import __version__

_EPILOG = """\
Settings are Hydra overrides (KEY=VALUE); `lorasweep train --cfg job` shows them all.

  lorasweep train experiment=demo                         the embedded demo, one run
  lorasweep train experiment=guide dataset.image_dir=DIR  the guide's recipe on your images
  lorasweep train -m dataset.image_dir=DIR adapter.rank=4,8,16 optimizer.unet_lr=1e-4,3e-4
  lorasweep pick                                          choose among the last sweep's checkpoints
  lorasweep ui                                            look at everything in MLflow
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; mistakes of the user end with one line and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"]:  # Hydra reads the rest, its own flags included
            train(argv[1:])
            return
        arguments = _parser().parse_args(argv)
        sys.exit(arguments.command(arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _exit(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lorasweep",
        description="Train, compare and choose LoRAs of Stable Diffusion.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lorasweep {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add = _Commands(commands)
    add("train", _unreachable, "train one run, or with -m a sweep of them (a Hydra app)")
    caption = add("caption", _caption, "caption a folder of images and write kohya's folders")
    caption.add_argument("image_dir", metavar="DIR", help="folder of images")
    pick = add("pick", _pick, "choose the best checkpoint of a sweep, or record your own choice")
    pick.add_argument("sweep", nargs="?", metavar="SWEEP", help="name of a sweep; else the newest")
    pick.add_argument("--run", help="your own choice: name of the run")
    pick.add_argument("--epoch", type=int, help="your own choice: its epoch")
    pick.add_argument("--limit", type=int, default=15, help="rows of the table")
    ui = add("ui", _ui, "show MLflow's pages for this project, on localhost")
    ui.add_argument("--port", type=int, default=5000, help="port to listen on (default 5000)")
    add("doctor", _doctor, "check devices, disk, models, weights and the tracking store")
    return parser


class _Commands:
    """Adds sub-commands that take overrides and a folder of the user's own options."""

    def __init__(self, commands: Any) -> None:
        self._commands = commands

    def __call__(
        self, name: str, command: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = self._commands.add_parser(
            name, help=text, description=text
        )
        parser.set_defaults(command=command)
        parser.add_argument("--config-dir", type=Path, help="folder of your own options")
        parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
        return parser


def train(argv: Sequence[str]) -> None:
    """Compose the config with Hydra and train; its flags (-m, --cfg, --config-dir) are Hydra's."""
    import hydra

    from lorasweep.config import conf_dir, register_resolvers

    register_resolvers()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and we say it in one line
    sys.argv = ["lorasweep train", *argv]
    app = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    app(_job)()


def _job(cfg: Any) -> None:
    """One job, as Hydra's own launchers call it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_cfg = HydraConfig.get()
    try:
        _run_alone(cfg, hydra_cfg)
    except Exception as error:
        if hydra_cfg.mode == RunMode.MULTIRUN:  # Hydra reports it; the other jobs go on
            raise
        _exit(error)


def _run_alone(cfg: Any, hydra_cfg: Any) -> None:
    from lorasweep.config import build_run, job_identity

    run = build_run(cfg, **job_identity(hydra_cfg))
    run.optimizer.check()
    from lorasweep.run import Failure, RunError, run_pack

    for report in run_pack([run]):
        if isinstance(report, Failure):
            raise RunError(report.reason)


def _unreachable(arguments: argparse.Namespace) -> int:
    raise AssertionError("train is handed to Hydra before")


def _caption(arguments: argparse.Namespace) -> int:
    from lorasweep.config import build_run, compose

    overrides = [f"dataset.image_dir={arguments.image_dir}", *arguments.overrides]
    run = build_run(compose(overrides, arguments.config_dir), output_dir=Path())
    from lorasweep.run import write_folders

    print(f"Captions are in {write_folders(run)}")
    return 0


def _pick(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lorasweep import pick

    cfg, settings, output_root = _tracking(arguments)
    result = pick.pick(
        settings,
        output_root,
        sweep=arguments.sweep,
        by=cfg.pick.by,
        run=arguments.run,
        epoch=arguments.epoch,
    )
    console = Console()
    console.print(pick.table(result, arguments.limit))
    for line in pick.summary(result):
        console.print(line, soft_wrap=True, highlight=False)
    return 0


def _ui(arguments: argparse.Namespace) -> int:
    from lorasweep import tracking

    _, settings, output_root = _tracking(arguments)
    uri, artifacts = settings.resolve(output_root), settings.artifacts(output_root)
    return tracking.serve(uri, settings.experiment, artifacts, arguments.port)


def _doctor(arguments: argparse.Namespace) -> int:
    from lorasweep import doctor
    from lorasweep.config import compose

    return doctor.examine(compose(arguments.overrides, arguments.config_dir))


def _tracking(arguments: argparse.Namespace) -> tuple[Any, Any, Path]:
    """The composed config, its tracking settings and its output_root; no images are needed."""
    from lorasweep.config import compose
    from lorasweep.settings import build

    cfg = compose(["dataset.image_dir=lorasweep", *arguments.overrides], arguments.config_dir)
    return cfg, build(cfg.tracking, "tracking"), Path(cfg.output_root).absolute()


def _exit(error: Exception) -> NoReturn:
    line = _one_line(error)
    if line is None:
        raise error
    print(f"lorasweep: {line}", file=sys.stderr)
    sys.exit(2)


def _one_line(error: Exception) -> str | None:
    """What the user is told; None for an error of ours, which keeps its traceback."""
    from lorasweep.config import explain

    line = explain(error)
    if line is None and type(error).__module__.startswith("lorasweep"):
        return str(error)
    return line
