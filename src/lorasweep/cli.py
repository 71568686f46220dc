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


_WORDS = "DIR: folder of images; SWEEP: name of another sweep; KEY=VALUE: settings to change"
_TRAIN_HELP = """\
usage: lorasweep train [-m] [--cfg job] [--config-dir DIR] [GROUP=OPTION | KEY=VALUE ...]

Train one run, or with -m one for every combination of values given with commas.

  lorasweep train experiment=demo
  lorasweep train dataset.image_dir=photos captions=[empty,sidecar] adapter.rank=16
  lorasweep train -m dataset.image_dir=photos adapter.rank=4,8,16 optimizer.unet_lr=1e-4,3e-4
  lorasweep train -m +sweeps=demo

  -m                take commas as a sweep; runs that can share a base model train together
  --cfg job         print the settings and train nothing: every KEY, and what the run would use
  --config-dir DIR  folder of your own options (DIR/adapter/mine.yaml is adapter=mine)
  --hydra-help      Hydra's further flags

Groups and their options:
{options}
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; mistakes of the user end with one line and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # threads that wait by spinning make every step several times slower where a core is shared
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if argv[:1] == ["train"]:  # Hydra reads the rest, its own flags included
            if {"-h", "--help"} & set(argv):
                print(_train_help())
                return
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
    _add(commands, "train", "", "train one run, or with -m a sweep of them (a Hydra app)")
    _add(commands, "caption", "DIR ", "caption a folder of images into kohya's folders", _caption)
    pick = _add(
        commands, "pick", "[SWEEP] ", "choose the best checkpoint of the newest sweep", _pick
    )
    pick.add_argument("--run", help="only this run's; together with --epoch it is your own choice")
    pick.add_argument("--epoch", type=int, help="only this epoch's checkpoints")
    pick.add_argument("--limit", type=int, default=15, help="rows of the table (default 15)")
    ui = _add(commands, "ui", "", "show MLflow's pages for this project, on localhost", _ui)
    ui.add_argument("--port", type=int, default=5000, help="port to listen on (default 5000)")
    _add(commands, "doctor", "", "check devices, disk, models, weights and tracking", _doctor)
    return parser


def _train_help() -> str:
    """Ours, for Hydra's own lists every folder on its search path."""
    from lorasweep.config import groups

    options = "\n".join(f"  {name:16}{', '.join(found)}" for name, found in groups().items())
    return _TRAIN_HELP.format(options=options)


def _add(
    commands: Any,
    name: str,
    words: str,
    text: str,
    command: Callable[[argparse.Namespace], int] | None = None,
) -> argparse.ArgumentParser:
    """A command that takes `words` and overrides (with a `=`), in any order."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=command)
    parser.add_argument("words", nargs="*", metavar=f"{words}KEY=VALUE", help=_WORDS)
    parser.add_argument("--config-dir", type=Path, help="folder of your own options")
    return parser


def _split(arguments: argparse.Namespace, at_most: int) -> tuple[list[str], list[str]]:
    """Words and overrides. Raises SettingsError for more than `at_most` words."""
    from lorasweep.settings import SettingsError

    words = [word for word in arguments.words if "=" not in word]
    if len(words) > at_most:
        raise SettingsError(f"{words[at_most]}: not understood; settings are given as KEY=VALUE")
    return words, [word for word in arguments.words if "=" in word]


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
    from lorasweep import dataset
    from lorasweep.config import build_run, job_identity

    run = build_run(cfg, **job_identity(hydra_cfg))
    dataset.find(run.dataset)
    run.check()
    from lorasweep.run import Failure, RunError, run_pack

    failures = [report.reason for report in run_pack([run]) if isinstance(report, Failure)]
    if failures:
        raise RunError(failures[0])


def _caption(arguments: argparse.Namespace) -> int:
    from lorasweep.config import build_run, compose

    words, overrides = _split(arguments, at_most=1)
    images = [f"dataset.image_dir={_quoted(words[0])}"] if words else []
    run = build_run(compose([*overrides, *images], arguments.config_dir), output_dir=Path())
    from lorasweep.run import write_folders

    print(f"Captions are in {write_folders(run)}")
    print("Edit them there: training with the same dataset and captions settings takes them so.")
    return 0


def _pick(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lorasweep import pick

    words, overrides = _split(arguments, at_most=1)
    cfg, settings, output_root = _tracking(overrides, arguments.config_dir)
    result = pick.pick(
        settings,
        output_root,
        sweep=words[0] if words else None,
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

    _, overrides = _split(arguments, at_most=0)
    _, settings, output_root = _tracking(overrides, arguments.config_dir)
    uri, artifacts = settings.resolve(output_root), settings.artifacts(output_root)
    return tracking.serve(uri, settings.experiment, artifacts, arguments.port)


def _doctor(arguments: argparse.Namespace) -> int:
    from lorasweep import doctor
    from lorasweep.config import compose

    _, overrides = _split(arguments, at_most=0)
    return doctor.examine(compose(overrides, arguments.config_dir))


def _quoted(text: str) -> str:
    """A value for Hydra's grammar, whatever characters it has."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _tracking(overrides: Sequence[str], config_dir: Path | None) -> tuple[Any, Any, Path]:
    """The composed config, its tracking settings and its output_root; no images are needed."""
    from lorasweep.config import compose
    from lorasweep.settings import build

    cfg = compose(["dataset.image_dir=lorasweep", *overrides], config_dir)
    return cfg, build(cfg.tracking, "tracking"), Path(cfg.output_root).absolute()


def _exit(error: Exception) -> NoReturn:
    from lorasweep.config import one_line

    line = one_line(error)
    if line is None:
        raise error
    print(f"lorasweep: {line}", file=sys.stderr)
    sys.exit(2)
