"""`lorasweep pick [SWEEP]`: choose the best checkpoint of a sweep."""

from __future__ import annotations

import argparse

from lorasweep.cli.command_line import (
    Commands,
    add_command,
    say_unsent,
    show_examples,
    tracking_settings,
)


def add_parser(commands: Commands) -> None:
    """Add the command's words and flags."""
    text = "choose the best checkpoint of the newest sweep"
    pick = add_command(commands, "pick", _pick, text, "[SWEEP]", "SWEEP: name of another sweep")
    pick.add_argument("--run", help="only this run's; together with --epoch it is your own choice")
    pick.add_argument("--epoch", type=int, help="only this epoch's checkpoints")
    pick.add_argument("--show", action="store_true", help="only show the table: record nothing")
    pick.add_argument(
        "--replace", action="store_true", help="put the rule's choice in place of a person's"
    )
    pick.add_argument("--limit", type=_count, default=15, help="rows of the table (default 15)")
    show_examples(
        pick,
        ["pick --show", "pick", "pick --run photos-3 --epoch 12"],
        settings="pick.*, output_root, tracking.*",
    )


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("give a number of at least 1")
    return int(text)


def _pick(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from lorasweep.core.text import harmless
    from lorasweep.runs import pick_checkpoint, pick_table

    cfg, settings, output_root = tracking_settings(arguments)
    say_unsent(output_root)
    choice = pick_checkpoint.choose(
        settings,
        output_root,
        sweep=arguments.word,
        by=cfg.pick.by,
        run=arguments.run,
        epoch=arguments.epoch,
    )
    if arguments.show:
        lines = pick_table.not_recorded(choice)
    else:
        choice = pick_checkpoint.record(choice, settings, output_root, replaces=arguments.replace)
        lines = pick_table.summary(choice)
    console = Console()
    console.print(pick_table.table(choice, arguments.limit))
    for line in lines:
        console.print(harmless(line), soft_wrap=True, highlight=False, markup=False)
    return 0
