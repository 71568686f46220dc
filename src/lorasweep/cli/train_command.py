"""`lorasweep train`: a Hydra app, and the job that Hydra runs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasweep.cli.command_line import Commands, OneLineParser, add_command, end_with

log = logging.getLogger(__name__)
_HELP = """\
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


def add_parser(commands: Commands) -> None:
    """For the list of commands: the words after `train` are read by `train`."""
    add_command(commands, "train", None, "train one run, or with -m a sweep of them (a Hydra app)")


def train(argv: Sequence[str]) -> None:
    """Train what the words after `lorasweep train` say, or print its help."""
    if {"-h", "--help"} & set(argv):
        from lorasweep.config.conf_folder import groups

        options = "\n".join(f"  {name:16}{', '.join(found)}" for name, found in groups().items())
        print(_HELP.format(options=options))
    else:
        train_by_hydra(argv)


def train_by_hydra(argv: Sequence[str]) -> None:
    """Compose the config with Hydra and train; its flags (-m, --cfg, --config-dir) are Hydra's."""
    folder, rest = _options_folder(argv)
    argv = flags_first(rest)
    import hydra

    from lorasweep.config.compose import added
    from lorasweep.config.conf_folder import conf_dir, options_from
    from lorasweep.config.resolvers import register_resolvers

    register_resolvers()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and we say it in one line
    sys.argv = ["lorasweep train", *added(argv)]
    app = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    with options_from(folder):  # Hydra's own --config-dir would read it unchecked
        app(_job)()


def _options_folder(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The folder that --config-dir names, and the other words."""
    parser = OneLineParser(prog="lorasweep train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    found, rest = parser.parse_known_args(argv)
    return found.config_dir, rest


def flags_first(argv: Sequence[str]) -> list[str]:
    """The same words, overrides last: Hydra's parser wants them in one piece.

    Raises SettingsError for a flag that Hydra would answer with its usage in ten lines. These are
    the flags that Hydra documents (hydra.cc, "Hydra's command line flags"), but for those that take
    a whole configuration from elsewhere: --config-path, and --experimental-rerun, of a pickle.
    """
    parser = OneLineParser(prog="lorasweep train", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for names in ("--hydra-help", "--version", "--resolve", "--run -r", "--multirun -m"):
        parser.add_argument(*names.split(), action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    for names in ("--package -p", "--config-name -cn"):
        parser.add_argument(*names.split())
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--info", "-i", nargs="?")
    overrides = parser.parse_intermixed_args(list(argv)).overrides
    return [*(word for word in argv if word not in overrides), *overrides]


def _job(cfg: Any) -> None:
    """One job, as Hydra's own launchers call it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_cfg = HydraConfig.get()
    try:
        _train_job(cfg, hydra_cfg)
    except Exception as error:
        if hydra_cfg.mode == RunMode.MULTIRUN:  # Hydra reports it; the other jobs go on
            raise
        from lorasweep.config.error_messages import one_line
        from lorasweep.runs.run_folder import delete_if_nothing_began

        if one_line(error) is not None:  # the command is refused
            delete_if_nothing_began(Path(hydra_cfg.runtime.output_dir), Path(str(cfg.output_root)))
        end_with(error)


def _train_job(cfg: Any, hydra_cfg: Any) -> None:
    from lorasweep.config.build_run import build_run, job_identity
    from lorasweep.config.foreign_settings import check_job
    from lorasweep.data import dataset
    from lorasweep.runs import run_folder
    from lorasweep.tracking.sync import publish_left

    check_job(cfg, hydra_cfg)
    run = build_run(cfg, **job_identity(hydra_cfg))
    if status := run_folder.ended(run):
        publish_left(run.tracking, run.output_root, [run.output_dir])
        if status == "failed" and run.number is not None:  # a job: whoever gave it counts on it
            from lorasweep.core.failures import RunError

            raise RunError("it failed before")
        print(f"{run.name} has ended in {run_folder.as_typed(run.output_dir)}: nothing to train")
        return
    log.info("%s: everything goes to %s", run.name, run_folder.as_typed(run.output_dir))
    dataset.find(run.dataset)
    run.check()
    from lorasweep.core.failures import RunError
    from lorasweep.runs.session import Failure, run_pack
    from lorasweep.sweeps.trial_job import JobsStudy, train_trials

    study = JobsStudy.of(cfg, hydra_cfg)
    if study is not None:  # a trial that a sweep gave to Hydra's launcher
        failures = train_trials([run], study)
    else:
        with run_folder.stoppable(run.output_dir) as interrupts:
            failures = [one for one in run_pack([run], interrupts) if isinstance(one, Failure)]
    if failures:
        raise RunError(failures[0].reason, failures[0].kind)
