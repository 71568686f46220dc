"""What the commands share: words and settings in any order, what they say, and how they end."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lorasweep.cli.completion import complete_word

Commands = Any
"""What argparse's `add_subparsers` returns; its class is private."""


class OneLineParser(argparse.ArgumentParser):
    """argparse, without its lines of usage before each mistake."""

    def error(self, message: str) -> NoReturn:
        """Raise SettingsError with the message, and what an unknown flag was meant to be."""
        from lorasweep.core.settings import SettingsError
        from lorasweep.core.trainer_words import meant

        hint = f"see {self.prog} --help"
        if found := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            flag = found[1]
            flags = [*re.findall(r"--[\w-]+", self.format_help()), "--config-dir"]
            close = meant(flag, flags)
            if close and not close.startswith("-"):
                hint = f"did you mean {close}=VALUE? Settings are given without dashes"
            elif close:
                hint = f"did you mean {close}?"
        raise SettingsError(f"{message}; {hint}")


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int] | None,
    text: str,
    words: str = "",
    words_help: str = "",
) -> argparse.ArgumentParser:
    """A command that takes `words`, such as `SOURCE TARGET` or `[SWEEP]`, and settings (KEY=VALUE).

    `run` finds them as `arguments.words`, of which `arguments.word` is the first or None, and
    `arguments.overrides`; it returns the exit code.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=run, takes=words.split(), needs=f"{name} what? Give {words_help}")
    told = "; ".join(filter(None, (words_help, "KEY=VALUE: settings to change")))
    metavar = " ".join(filter(None, (words, "KEY=VALUE")))
    takes = parser.add_argument("words", nargs="*", metavar=metavar, help=told)
    takes.completer = complete_word  # type: ignore[attr-defined]  # argcomplete looks for it
    parser.add_argument("--config-dir", type=Path, help="folder of your own options")
    return parser


def show_examples(
    parser: argparse.ArgumentParser, examples: Sequence[str], settings: str = ""
) -> None:
    """End a command's help with examples, without `lorasweep`, and the settings that it takes."""
    lines = ["examples:", *(f"  lorasweep {example}" for example in examples)]
    if settings:
        lines += ["", f"settings: {settings}"]
    parser.epilog = "\n".join(lines)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The command that `argv` gives, its words, settings and flags in any order.

    Raises SettingsError for what is not understood, and for words that are missing.
    """
    from lorasweep.core.settings import SettingsError

    arguments, rest = parser.parse_known_args(argv)  # argparse takes words up to the first flag
    takes_words = "words" in arguments
    if unknown := [word for word in rest if word.startswith("-") or not takes_words]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if not takes_words:
        return arguments
    given = [*arguments.words, *rest]
    # a file's name may have a = too
    words = [word for word in given if "=" not in word or is_there(word)]
    if len(words) > len(arguments.takes):
        excess = words[len(arguments.takes)]
        raise SettingsError(f"{excess}: not understood; settings are given as KEY=VALUE")
    if "" in words:
        raise SettingsError("an empty word names nothing")
    if len(words) < sum(not word.startswith("[") for word in arguments.takes):
        raise SettingsError(arguments.needs)
    arguments.words, arguments.word = words, words[0] if words else None
    arguments.overrides = [word for word in given if word not in words]
    return arguments


def is_there(word: str) -> bool:
    """Is it the name of a file, a folder or a link?"""
    return os.path.lexists(word) and "\0" not in word


def tracking_settings(arguments: argparse.Namespace) -> tuple[Any, Any, Path]:
    """The composed config, its tracking settings and its output_root; no images are needed."""
    from lorasweep.config.build_run import absolute_folder
    from lorasweep.config.compose import compose_without_images
    from lorasweep.core.settings import build
    from lorasweep.tracking.moved_store import follow_move

    cfg = compose_without_images(arguments.overrides, arguments.config_dir)
    settings = build(cfg.tracking, "tracking")
    output_root = absolute_folder(cfg.output_root, "output_root")
    follow_move(settings, output_root)
    return cfg, settings, output_root


def say_unsent(output_root: Path) -> None:
    """Tell of runs that MLflow doesn't have whole; what is shown lacks them."""
    from lorasweep.tracking.sync import unsent

    if folders := unsent(output_root):
        number = f"{len(folders)} run{'s' if len(folders) > 1 else ''}"
        say_lines([f"MLflow does not have everything of {number}: send it by `lorasweep sync`."])


def say_lines(lines: Sequence[str]) -> None:
    """Print the lines, in which names may be anybody's; whoever reads them may have stopped."""
    from lorasweep.core.progress import say
    from lorasweep.core.text import harmless

    for line in lines:
        say(harmless(line))


def end_with(error: Exception) -> NoReturn:
    """End the process: with one line and exit code 2 for what the user can mend."""
    from lorasweep.config.error_messages import one_line
    from lorasweep.core.text import harmless

    line = one_line(error)
    if line is None:
        raise error
    print(f"lorasweep: {harmless(line)}", file=sys.stderr)
    sys.exit(2)
