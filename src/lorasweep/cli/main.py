"""The command line: `lorasweep train | sweep | caption | pick | export | …`."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lorasweep import __version__

_EPILOG = """\
Settings are Hydra overrides (KEY=VALUE); `lorasweep train --cfg job` shows them all.

  lorasweep train experiment=demo                         the embedded demo, one run
  lorasweep train experiment=guide dataset.image_dir=DIR  the guide's recipe on your images
  lorasweep train -m dataset.image_dir=DIR adapter.rank=4,8,16 optimizer.unet_lr=1e-4,3e-4
  lorasweep sweep rank_lr dataset.image_dir=DIR           search with Optuna; again = go on
  lorasweep pick                                          choose among the last sweep's checkpoints
  lorasweep reproduce RUN                                 make a logged run again, and compare
  lorasweep export RUN --to merged                        the base model with the LoRA in it
  lorasweep ui                                            look at everything in MLflow
  lorasweep sync                                          send MLflow what it could not take before
"""


_SWEEP_HELP = """\
usage: lorasweep sweep NAME [--cfg job] [--config-dir DIR] [GROUP=OPTION | KEY=VALUE ...]

Run the sweep of sweeps/NAME.yaml, or go on with it: the same command continues what was broken off.

  lorasweep sweep rank_lr dataset.image_dir=photos
  lorasweep sweep rank_lr experiment=demo study.n_trials=30 study.pruner=wilcoxon
  lorasweep sweep rank_lr experiment=demo 'adapter.rank=choice(4,8)' optimizer.text_encoder_lr=0

  A plain value on the command line is held fixed, a range is searched, whatever the file says.
  study.KEY=VALUE changes how it searches; docs/sweeps.md has every KEY.

Sweeps that ship: {sweeps}
"""
PRECISIONS = ("fp32", "fp16", "bf16")
EXPORTS = ("merged", "diffusers-lora", "offline-lora")

_SETTINGS = "KEY=VALUE: settings to change"
_WORDS = {
    "resume": "name or folder of a run or of a sweep",
    "caption": "DIR: folder of images",
    "pick": "SWEEP: name of another sweep",
    "sync": "DIR: a run's folder or one of several, or RUN: a run's name (default: all)",
    "reproduce": "a run's name or MLflow id, or a LoRA's .safetensors file",
    "export": "a LoRA's .safetensors file, a run's name, or a checkpoint's (RUN-e012)",
    "convert": "SOURCE: a diffusers folder, hub id or .safetensors file, or embedded for the demo's"
    " model; TARGET: what to write, a name in .safetensors for a file",
}
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
    # what CUDA's matrix products need to be the same each time, where trainer.deterministic asks it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        if argv[:1] == ["train"]:  # Hydra reads the rest, its own flags included
            if {"-h", "--help"} & set(argv):
                print(_train_help())
                return
            train(_flags_first(argv[1:]))
            return
        if argv[:1] == ["sweep"]:
            _sweep(argv[1:])
            return
        arguments = _parsed(argv)
        sys.exit(arguments.command(arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _exit(error)


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """argparse takes words up to the first option only; ours may stand anywhere."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    takes_words = "words" in arguments
    if unknown := [word for word in rest if word.startswith("-") or not takes_words]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if takes_words:
        arguments.words += rest
    return arguments


class _OneLineParser(argparse.ArgumentParser):
    """argparse, without its lines of usage before each mistake."""

    def error(self, message: str) -> NoReturn:
        from lorasweep.core.settings import SettingsError

        raise SettingsError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="lorasweep",
        description="Train, compare and choose LoRAs of Stable Diffusion.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lorasweep {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add(commands, "train", "", "train one run, or with -m a sweep of them (a Hydra app)")
    _add(commands, "sweep", "NAME ", "search with Optuna: run a sweep of sweeps/, or go on with it")
    _add(commands, "resume", "RUN|DIR ", "go on with a run or a sweep that was broken off", _resume)
    _add(commands, "caption", "DIR ", "caption a folder of images into kohya's folders", _caption)
    pick = _add(
        commands, "pick", "[SWEEP] ", "choose the best checkpoint of the newest sweep", _pick
    )
    pick.add_argument("--run", help="only this run's; together with --epoch it is your own choice")
    pick.add_argument("--epoch", type=int, help="only this epoch's checkpoints")
    pick.add_argument("--limit", type=_count, default=15, help="rows of the table (default 15)")
    _add_reproduce(commands)
    _add_export(commands)
    convert = _add(
        commands, "convert", "SOURCE TARGET ", "diffusers folder <-> single .safetensors", _convert
    )
    convert.add_argument("--config", help="folder or hub id of a single file's configs, tokenizer")
    convert.add_argument("--dtype", choices=PRECISIONS, help="precision (default: as it is)")
    convert.add_argument("--overwrite", action="store_true", help="replace an existing TARGET")
    ui = _add(commands, "ui", "", "show MLflow's pages for this project, on localhost", _ui)
    ui.add_argument(
        "--optuna",
        nargs="?",
        const="",
        metavar="SWEEP",
        help="show a sweep's study in optuna-dashboard instead (default: the newest)",
    )
    ui.add_argument("--port", type=_port, default=5000, help="port to listen on (default 5000)")
    _add(commands, "sync", "[DIR|RUN] ", "send MLflow what it could not take before", _sync)
    _add_file_commands(commands)
    _add(commands, "doctor", "", "check devices, disk, models, weights and tracking", _doctor)
    return parser


def _port(text: str) -> int:
    """Of a server: those below 1024 are the system's."""
    if not 1024 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError("give a port from 1024 to 65535")
    return int(text)


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("give a number of at least 1")
    return int(text)


def _sweep(argv: Sequence[str]) -> None:
    """`sweep NAME …` is `train -m +sweeps=NAME …`."""
    from lorasweep.config.config import groups
    from lorasweep.core.settings import SettingsError

    if {"-h", "--help"} & set(argv) or not argv:
        print(_SWEEP_HELP.format(sweeps=", ".join(groups()["sweeps"])))
        return
    name = argv[0]
    if not re.fullmatch(r"\w[\w-]*", name):
        raise SettingsError(
            f"{name}: a sweep's name comes first; there are {', '.join(groups()['sweeps'])}"
        )
    train(_flags_first(["-m", f"+sweeps={name}", *argv[1:]]))


def _flags_first(argv: Sequence[str]) -> list[str]:
    """Hydra's parser wants all overrides in one piece."""
    is_override = [word[:1] != "-" and ("=" in word or word[:1] == "~") for word in argv]
    found = list(zip(argv, is_override, strict=True))
    return [word for word, is_one in found if not is_one] + [
        word for word, is_one in found if is_one
    ]


def _add_reproduce(commands: Any) -> None:
    again = _add(commands, "reproduce", "RUN|FILE ", "make a logged run again", _reproduce)
    again.add_argument("--strict", action="store_true", help="stop if anything is not as it was")
    again.add_argument("--same-pack", action="store_true", help="with the runs it trained with")
    again.add_argument("--recaption", action="store_true", help="make the captions again too")
    again.add_argument(
        "--override",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="train a variation; may be given several times",
    )
    again.add_argument(
        "--as-config", type=Path, metavar="DIR", help="only write a folder for train --config-dir"
    )


def _add_export(commands: Any) -> None:
    export = _add(commands, "export", "CHECKPOINT|RUN ", "take a LoRA to other programs", _export)
    export.add_argument(
        "--to",
        required=True,
        choices=EXPORTS,
        help="merged: the whole model with the LoRA in it; diffusers-lora: for load_lora_weights;"
        " offline-lora: for generic diffusion feature",
    )
    export.add_argument("--out", type=Path, help="where to; ending in .safetensors: a single file")
    export.add_argument("--strength", type=float, default=1.0, help="1 (default) is as trained")
    export.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        metavar="FILE=WEIGHT",
        help="merge a further LoRA too; may be given several times",
    )
    export.add_argument("--rank", type=int, help="of the approximation, where one is needed")
    export.add_argument("--dtype", choices=PRECISIONS, help="precision (default: the base's)")
    export.add_argument("--overwrite", action="store_true", help="replace what is there")


def _add_file_commands(commands: Any) -> None:
    """What reads and makes LoRA files; they take words and flags, no settings."""
    info = commands.add_parser("info", help="say what a LoRA file is, whoever wrote it")
    info.set_defaults(command=_info)
    info.add_argument("file", type=Path, help="a .safetensors file of kohya, LyCORIS, diffusers …")
    info.add_argument("--json", action="store_true", help="as JSON")
    resize = commands.add_parser("resize", help="give a LoRA file another rank")
    resize.set_defaults(command=_resize)
    resize.add_argument("file", type=Path, help="a LoRA, LoCon, DoRA, LoHa or LoKr")
    resize.add_argument("--rank", type=int, help="the new rank; with --energy, the largest")
    resize.add_argument("--energy", type=float, help="share to keep; each module gets its own rank")
    resize.add_argument("--out", type=Path, help="file to write (default: beside, NAME-resized)")
    resize.add_argument(
        "--model",
        help="base model to draw a picture with, before and after: an option's name (sd15,"
        " embedded), folder, file or hub id (default: the one it was trained on, if it is here)",
    )
    resize.add_argument("--config", help="for a single file: diffusers folder or hub id of configs")
    resize.add_argument("--overwrite", action="store_true", help="replace the file to write")
    _add_extract(commands)


def _add_extract(commands: Any) -> None:
    extract = commands.add_parser("extract", help="make a LoRA of the difference of two models")
    extract.set_defaults(command=_extract)
    extract.add_argument("tuned", help="the tuned model: a diffusers folder, file or hub id")
    extract.add_argument("base", help="the model it was tuned from, or embedded for the demo's")
    extract.add_argument("--rank", type=int, required=True, help="rank of the LoRA")
    extract.add_argument("--conv-rank", type=int, help="of 3x3 convolutions (default: --rank)")
    extract.add_argument(
        "--targets", default="attn-mlp", help="attn-mlp (default), conv, full, unet-only"
    )
    extract.add_argument("--config", help="for single files: diffusers folder or hub id of configs")
    extract.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    extract.add_argument("--overwrite", action="store_true", help="replace the file to write")


def _train_help() -> str:
    """Ours, for Hydra's own lists every folder on its search path."""
    from lorasweep.config.config import groups

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
    told = "; ".join(filter(None, (_WORDS.get(name), _SETTINGS)))
    parser.add_argument("words", nargs="*", metavar=f"{words}KEY=VALUE", help=told)
    parser.add_argument("--config-dir", type=Path, help="folder of your own options")
    return parser


def _split(arguments: argparse.Namespace, at_most: int) -> tuple[list[str], list[str]]:
    """Words and overrides. Raises SettingsError for more than `at_most` words."""
    from lorasweep.core.settings import SettingsError

    # a file's name may have a = too
    words = [word for word in arguments.words if "=" not in word or _is_there(word)]
    if len(words) > at_most:
        raise SettingsError(f"{words[at_most]}: not understood; settings are given as KEY=VALUE")
    if "" in words:
        raise SettingsError("an empty word names nothing")
    return words, [word for word in arguments.words if word not in words]


def _is_there(word: str) -> bool:
    return os.path.lexists(word) and "\0" not in word


def train(argv: Sequence[str]) -> None:
    """Compose the config with Hydra and train; its flags (-m, --cfg, --config-dir) are Hydra's."""
    import hydra

    from lorasweep.config.config import conf_dir, register_resolvers

    _check_flags(argv)
    register_resolvers()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and we say it in one line
    sys.argv = ["lorasweep train", *argv]
    app = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    app(_job)()


def _check_flags(argv: Sequence[str]) -> None:
    """Raise SettingsError for a flag that Hydra would answer with its usage in ten lines."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = "lorasweep train"
    parser.error = partial(_OneLineParser.error, parser)  # type: ignore[method-assign]
    parser.parse_args(list(argv))


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
    from lorasweep.config.config import build_run, job_identity
    from lorasweep.data import dataset
    from lorasweep.runs import run_folder

    run = build_run(cfg, **job_identity(hydra_cfg))
    if status := run_folder.ended(run):
        if status == "failed" and run.number is not None:  # a job: whoever gave it counts on it
            from lorasweep.runs.session import RunError

            raise RunError("it failed before")
        print(f"{run.name} has ended in {run_folder.shown(run.output_dir)}: nothing to train")
        return
    dataset.find(run.dataset)
    run.check()
    from lorasweep.runs.session import Failure, RunError, run_pack
    from lorasweep.sweeps import trial_processes

    study = trial_processes.JobsStudy.of(
        cfg, hydra_cfg
    )  # a trial that a sweep gave to Hydra's launcher
    if study is not None:
        failures = trial_processes.train([run], study)
    else:
        with run_folder.stoppable(run.output_dir) as interrupts:
            failures = [one for one in run_pack([run], interrupts) if isinstance(one, Failure)]
    if failures:
        raise RunError.of(failures[0])


def _resume(arguments: argparse.Namespace) -> int:
    from lorasweep.config.config import begun_by
    from lorasweep.core.settings import SettingsError
    from lorasweep.runs import run_folder

    words, overrides = _split(arguments, at_most=1)
    if not words:
        raise SettingsError("resume what? Give the name or the folder of a run or of a sweep")
    _, _, output_root = _tracking(overrides, arguments.config_dir)
    command = begun_by(run_folder.find(words[0], output_root))
    os.chdir(command.cwd)
    _say([f"lorasweep train {shlex.join(command.argv)}"])
    train(command.argv)
    return 0


def _caption(arguments: argparse.Namespace) -> int:
    from lorasweep.config.config import build_run, compose, quoted
    from lorasweep.core.settings import SettingsError

    words, overrides = _split(arguments, at_most=1)
    given = [one for one in overrides if one.lstrip("+").startswith("dataset.image_dir=")]
    if words and given:
        raise SettingsError(f"{words[0]} and {given[0]}: give one folder of images")
    images = [f"dataset.image_dir={quoted(words[0])}"] if words else []
    run = build_run(compose([*overrides, *images], arguments.config_dir), output_dir=Path())
    from lorasweep.runs.session import write_folders

    _say(
        [
            f"Captions are in {write_folders(run)}",
            "Edit them there: training with the same dataset and captions settings takes them so.",
        ]
    )
    return 0


def _pick(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lorasweep.judging import pick

    words, overrides = _split(arguments, at_most=1)
    cfg, settings, output_root = _tracking(overrides, arguments.config_dir)
    _say_unsent(output_root)
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


def _reproduce(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lorasweep.core.settings import SettingsError
    from lorasweep.reproduce import reproduce_command
    from lorasweep.reproduce.reproduce_run import Options

    words, places = _split(arguments, at_most=1)
    if not words:
        raise SettingsError("reproduce what? Give a run's name, its MLflow id or a LoRA file")
    _, settings, output_root = _tracking(places, arguments.config_dir)
    request = reproduce_command.Request(
        word=words[0],
        uri=settings.resolve(output_root),
        experiment=settings.experiment,
        options=Options(
            places=places,
            overrides=arguments.overrides,
            same_pack=arguments.same_pack,
            recaption=arguments.recaption,
        ),
        strict=arguments.strict,
        as_config=arguments.as_config,
    )
    return reproduce_command.execute(request, Console())


def _export(arguments: argparse.Namespace) -> int:
    from lorasweep.core.settings import SettingsError
    from lorasweep.export import find_lora, merge

    words, overrides = _split(arguments, at_most=1)
    if not words:
        raise SettingsError("export what? Give a .safetensors file or a run's name")
    found = find_lora.find(words[0], overrides, arguments.config_dir)
    _say(found.lines)
    done = merge.export(
        found,
        arguments.to,
        out=arguments.out,
        strength=arguments.strength,
        others=arguments.others,
        rank=arguments.rank,
        precision=arguments.dtype,
        overwrite=arguments.overwrite,
    )
    _say([f"Written: {done.path}", *done.lines])
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from lorasweep.config.config import compose
    from lorasweep.core.settings import SettingsError
    from lorasweep.export import convert_model

    words, overrides = _split(arguments, at_most=2)
    if len(words) != 2:
        raise SettingsError("convert needs SOURCE and TARGET: one ends in .safetensors")
    cfg = compose(["dataset.image_dir=lorasweep", *overrides], arguments.config_dir)
    done = convert_model.convert(
        _model_path(words[0]),
        Path(words[1]),
        config=_model_path(arguments.config) if arguments.config else cfg.model.config,
        precision=arguments.dtype,
        overwrite=arguments.overwrite,
    )
    _say([f"Written: {done.path}", *done.lines])
    return 0


def _say(lines: Sequence[str]) -> None:
    from lorasweep.core.progress import say

    for line in lines:
        say(line)


def _info(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lorasweep.lora_files import info

    found = info.inspect(arguments.file)
    if arguments.json:
        _say([found.as_json()])
    else:
        info.show(found, Console())
    return 0


def _resize(arguments: argparse.Namespace) -> int:
    from lorasweep.core.progress import say
    from lorasweep.export import derived_file

    source: Path = arguments.file
    derived_file.resized(
        source,
        arguments.out or source.with_name(f"{source.stem}-resized.safetensors"),
        arguments.rank,
        arguments.energy,
        model=_model_of(arguments.model, arguments.config) if arguments.model else None,
        overwrite=arguments.overwrite,
        say=say,
    )
    return 0


def _extract(arguments: argparse.Namespace) -> int:
    from lorasweep.core.progress import say
    from lorasweep.export import derived_file

    tuned, base = (_model_of(path, arguments.config) for path in (arguments.tuned, arguments.base))
    derived_file.extracted(
        (tuned, base),
        arguments.out,
        arguments.rank,
        arguments.conv_rank,
        arguments.targets,
        overwrite=arguments.overwrite,
        say=say,
    )
    return 0


def _model_of(path: str, config: str | None) -> Any:
    """A model by its path, or its option's name, with conf/model/sd15's other values."""
    from lorasweep.config.config import compose, quoted
    from lorasweep.core.settings import build
    from lorasweep.lora_files import lora_file

    lora_file.refuse_as_model(Path(path))
    configs = [f"model.config={quoted(_model_path(config))}"] if config else []
    chosen = ["model=sd15", f"model.path={quoted(_model_path(path))}"]
    cfg = compose(["dataset.image_dir=lorasweep", *chosen, *configs])
    return build(cfg.model, "model")


def _model_path(word: str) -> str:
    """A model's own path; of an option of conf/model (embedded, sd15) what it says."""
    from lorasweep.config.config import compose, groups

    if word not in groups()["model"] or Path(word).exists():
        return word
    return str(compose(["dataset.image_dir=lorasweep", f"model={word}"]).model.path)


def _ui(arguments: argparse.Namespace) -> int:
    from lorasweep.tracking import ui_server

    if arguments.optuna and "=" in arguments.optuna and not _is_there(arguments.optuna):
        arguments.words.append(arguments.optuna)  # a setting, which argparse took for the sweep
        arguments.optuna = ""
    _, overrides = _split(arguments, at_most=0)
    cfg, settings, output_root = _tracking(overrides, arguments.config_dir)
    if arguments.optuna is not None:
        from lorasweep.sweeps.study import study_storage

        where = cfg.study.storage if "study" in cfg else None
        return study_storage.show(arguments.optuna or None, where, output_root, arguments.port)
    uri, artifacts = settings.resolve(output_root), settings.artifacts(output_root)
    _say_unsent(output_root)
    return ui_server.serve(uri, settings.experiment, artifacts, arguments.port)


def _sync(arguments: argparse.Namespace) -> int:
    from lorasweep import tracking

    words, overrides = _split(arguments, at_most=1)
    _, settings, output_root = _tracking(overrides, arguments.config_dir)
    given = any(override.startswith("tracking.uri=") for override in overrides)
    only = words[0] if words else None
    results = tracking.sync(settings, output_root, only, uri_is_given=given)
    _say([result.line() for result in results] or ["MLflow has everything."])
    return 1 if any(result.left or result.refused or result.is_busy for result in results) else 0


def _say_unsent(output_root: Path) -> None:
    """Tell of runs that MLflow doesn't have whole; what is shown lacks them."""
    from lorasweep.tracking.sync import unsent

    if folders := unsent(output_root):
        number = f"{len(folders)} run{'s' if len(folders) > 1 else ''}"
        _say([f"MLflow does not have everything of {number}: send it by `lorasweep sync`."])


def _doctor(arguments: argparse.Namespace) -> int:
    from lorasweep.config.config import compose
    from lorasweep.runs import doctor

    _, overrides = _split(arguments, at_most=0)
    return doctor.examine(compose(overrides, arguments.config_dir))


def _tracking(overrides: Sequence[str], config_dir: Path | None) -> tuple[Any, Any, Path]:
    """The composed config, its tracking settings and its output_root; no images are needed."""
    from lorasweep.config.config import compose, folder
    from lorasweep.core.settings import build

    cfg = compose(["dataset.image_dir=lorasweep", *overrides], config_dir)
    return cfg, build(cfg.tracking, "tracking"), folder(cfg.output_root, "output_root")


def _exit(error: Exception) -> NoReturn:
    from lorasweep.config.config import one_line
    from lorasweep.core.text import harmless

    line = one_line(error)
    if line is None:
        raise error
    print(f"lorasweep: {harmless(line)}", file=sys.stderr)
    sys.exit(2)
