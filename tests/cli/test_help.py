"""What each command's help shows, and what the shell offers on Tab."""

import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress

import pytest

from lorasweep.cli import main
from lorasweep.cli.command_line import parse
from lorasweep.cli.completion import complete_word

NAMES = [module.__name__.rpartition(".")[2].removesuffix("_command") for module in main.COMMANDS]


def helped(name, capsys):
    with suppress(SystemExit):
        main.main([name, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_help_has_examples_and_they_are_understood(name, capsys):
    text = helped(name, capsys)
    found = re.findall(rf"^  lorasweep ({name}\b.*)$", text, re.MULTILINE)
    assert len(found) >= 2
    parser, _ = main._parser()
    for example in found:
        if name not in ("train", "sweep"):  # whose words Hydra reads
            assert parse(parser, shlex.split(example)).command


@pytest.mark.parametrize(
    ("command", "word", "offers"),
    [
        ("train", "adapter=lo", {"adapter=lora", "adapter=locon", "adapter=loha", "adapter=lokr"}),
        ("train", "adapter.rank", {"adapter.rank=", "adapter.rank_dropout="}),
        ("train", "adap", {"adapter=", "adapter."}),
        ("sweep", "rank", {"rank_lr"}),
        ("train", "rank", set()),
        ("pick", "nothing=", set()),
    ],
)
def test_tab_offers_groups_options_and_settings(command, word, offers):
    _, commands = main._parser()
    assert set(complete_word(word, commands.choices[command])) == offers


def test_the_shell_is_answered(tmp_path):
    """By argcomplete's protocol, which its line for ~/.bashrc speaks."""
    line = "lorasweep train optimizer=adam"
    answer = tmp_path / "answer"
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    subprocess.run([sys.executable, "-m", "lorasweep"], env={**os.environ, **asked}, check=True)
    offered = {"optimizer=adamw", "optimizer=adamw8bit", "optimizer=adamw_schedulefree"}
    assert set(answer.read_text().split("\n")) == offered
