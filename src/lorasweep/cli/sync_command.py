"""`lorasweep sync [DIR|RUN]`: send MLflow what it could not take before."""

from __future__ import annotations

import argparse

from lorasweep.cli.command_line import (
    Commands,
    add_command,
    say_lines,
    show_examples,
    tracking_settings,
)


def add_parser(commands: Commands) -> None:
    """Add the command's words."""
    words_help = "DIR: a run's folder or one of several, or RUN: a run's name (default: all)"
    text = "send MLflow what it could not take before"
    sync = add_command(commands, "sync", _sync, text, "[DIR|RUN]", words_help)
    show_examples(
        sync,
        ["sync", "sync photos-3 tracking.uri=http://host:5000"],
        settings="output_root, tracking.*",
    )


def _sync(arguments: argparse.Namespace) -> int:
    from lorasweep import tracking

    _, settings, output_root = tracking_settings(arguments)
    given = any(override.startswith("tracking.uri=") for override in arguments.overrides)
    only = arguments.word
    results = tracking.sync(settings, output_root, only, uri_is_given=given)
    say_lines([result.line() for result in results] or ["MLflow has everything."])
    return 0 if all(result.is_done for result in results) else 1
