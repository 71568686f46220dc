"""`lorasweep ui`: show MLflow's pages, or a sweep's study in optuna-dashboard, on localhost."""

from __future__ import annotations

import argparse

from lorasweep.cli.command_line import (
    Commands,
    add_command,
    is_there,
    say_unsent,
    show_examples,
    tracking_settings,
)


def add_parser(commands: Commands) -> None:
    """Add the command's flags."""
    text = "show MLflow's pages for this project, on localhost"
    ui = add_command(commands, "ui", _ui, text, "[SWEEP]", "SWEEP: only its runs")
    ui.add_argument(
        "--optuna",
        nargs="?",
        const="",
        metavar="SWEEP",
        help="show a sweep's study in optuna-dashboard instead (default: the newest)",
    )
    ui.add_argument("--port", type=_port, default=5000, help="port to listen on (default 5000)")
    show_examples(
        ui,
        ["ui", "ui --optuna rank_lr --port 5001"],
        settings="output_root, tracking.*",
    )


def _port(text: str) -> int:
    """Of a server: those below 1024 are the system's."""
    if not 1024 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError("give a port from 1024 to 65535")
    return int(text)


def _ui(arguments: argparse.Namespace) -> int:
    from lorasweep.judging.pick_rule import sign
    from lorasweep.tracking import ui_server
    from lorasweep.tracking.mlflow_page import Shown

    if arguments.optuna and "=" in arguments.optuna and not is_there(arguments.optuna):
        arguments.overrides.append(arguments.optuna)  # a setting, which argparse took for the sweep
        arguments.optuna = ""
    cfg, settings, output_root = tracking_settings(arguments)
    if arguments.optuna is not None:
        from lorasweep.sweeps.study import study_storage

        where = cfg.study.storage if "study" in cfg else None
        return study_storage.show(arguments.optuna or None, where, output_root, arguments.port)
    uri, artifacts = settings.resolve(output_root), settings.artifacts(output_root)
    say_unsent(output_root)
    by = cfg.pick.by
    what = Shown(sweep=arguments.word, by=by, smaller_first=sign(by) == 1)
    return ui_server.serve(uri, settings.experiment, artifacts, arguments.port, what)
