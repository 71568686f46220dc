"""What the commands share: words and settings in any order, what they say, and how they end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

Commands = Any
"""What argparse's `add_subparsers` returns; its class is private."""


class OneLineParser(argparse.ArgumentParser):
    """argparse, without its lines of usage before each mistake."""

    def error(self, message: str) -> NoReturn:
        """Raise SettingsError with the message."""
        from lorasweep.core.settings import SettingsError

        raise SettingsError(f"{message}; see {self.prog} --help")


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int] | None,
    text: str,
    words: str = "",
    words_help: str = "",
) -> argparse.ArgumentParser:
    """A command that takes `words` and settings (with a `=`), in any order."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=run)
    told = "; ".join(filter(None, (words_help, "KEY=VALUE: settings to change")))
    metavar = " ".join(filter(None, (words, "KEY=VALUE")))
    parser.add_argument("words", nargs="*", metavar=metavar, help=told)
    parser.add_argument("--config-dir", type=Path, help="folder of your own options")
    return parser


def split_words(arguments: argparse.Namespace, at_most: int) -> tuple[list[str], list[str]]:
    """Words and overrides. Raises SettingsError for more than `at_most` words."""
    from lorasweep.core.settings import SettingsError

    # a file's name may have a = too
    words = [word for word in arguments.words if "=" not in word or is_there(word)]
    if len(words) > at_most:
        raise SettingsError(f"{words[at_most]}: not understood; settings are given as KEY=VALUE")
    if "" in words:
        raise SettingsError("an empty word names nothing")
    return words, [word for word in arguments.words if word not in words]


def is_there(word: str) -> bool:
    """Is it the name of a file, a folder or a link?"""
    return os.path.lexists(word) and "\0" not in word


def tracking_settings(overrides: Sequence[str], config_dir: Path | None) -> tuple[Any, Any, Path]:
    """The composed config, its tracking settings and its output_root; no images are needed."""
    from lorasweep.config.build_run import absolute_folder
    from lorasweep.config.compose import compose_without_images
    from lorasweep.core.settings import build

    cfg = compose_without_images(overrides, config_dir)
    return cfg, build(cfg.tracking, "tracking"), absolute_folder(cfg.output_root, "output_root")


def say_unsent(output_root: Path) -> None:
    """Tell of runs that MLflow doesn't have whole; what is shown lacks them."""
    from lorasweep import tracking

    if folders := tracking.unsent(output_root):
        number = f"{len(folders)} run{'s' if len(folders) > 1 else ''}"
        say_lines([f"MLflow does not have everything of {number}: send it by `lorasweep sync`."])


def say_lines(lines: Sequence[str]) -> None:
    """Print the lines; whoever reads them may have stopped."""
    from lorasweep.core.progress import say

    for line in lines:
        say(line)


def end_with(error: Exception) -> NoReturn:
    """End the process: with one line and exit code 2 for what the user can mend."""
    from lorasweep.config.error_messages import one_line
    from lorasweep.core.text import harmless

    line = one_line(error)
    if line is None:
        raise error
    print(f"lorasweep: {harmless(line)}", file=sys.stderr)
    sys.exit(2)
