"""The pages say what is true: paths, links, settings, commands, and the worked example runs."""

import math
import re
import shlex
from pathlib import Path

import pytest
import yaml

from command_line import exit_code
from conftest import SMALL
from lorasweep import tracking
from lorasweep.cli.command_line import OneLineParser, parse
from lorasweep.cli.main import COMMANDS
from lorasweep.config.conf_folder import conf_dir, sweeps_dir

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lorasweep"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SETTINGS = ROOT / "docs" / "settings.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
WOULD_BE = {"src/lorasweep/judging/metrics/prompt_effect.py", "cli/NAME_command.py"}
"""Files that a page says would be there."""
RECIPES = {"experiment", "debug", "model_defaults"}
"""Groups whose options set keys of others; options called demo do so too."""


TESTS = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}


def code_blocks(page, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def rows(page, heading):
    """Cells of the rows of all tables below a heading, to the next of its level."""
    (section,) = re.findall(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page.read_text(), re.DOTALL | re.MULTILINE
    )
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if not set("".join(row)) <= {"-", " ", "|"}][1:]


def anchor(heading):
    """GitHub's name of a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, fragment = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name}: {target}"


def test_every_path_of_the_architecture_exists():
    paths = [
        path
        for concept, files, add in rows(ARCHITECTURE, "Where do I find, where do I add")
        for path in re.findall(r"`([\w./]+)`", f"{concept} {files} {add}")
        if "/" in path and "NAME" not in path
    ]
    assert len(paths) > 60
    missing = [one for one in paths if not ((PACKAGE / one).exists() or (ROOT / one).exists())]
    assert not missing


def test_every_python_file_that_pages_name_exists():
    for page in PAGES:
        for name in re.findall(r"`([\w./]+/\w+\.py)`", prose(page)):
            made_by_the_reader = name.startswith("mine/") or name in WOULD_BE
            places = [(root / name).exists() for root in (PACKAGE, ROOT, ROOT / "tests")]
            assert made_by_the_reader or any(places), f"{page.name}: {name}"


def test_the_architecture_lists_every_room():
    named = {row[1].strip("`") for row in rows(ARCHITECTURE, "Rooms and floors")}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert named == rooms


def test_the_groups_and_options_are_those_of_conf():
    listed = {
        row[0].strip("`"): set(re.findall(r"`([\w]+)`", row[2]))
        for row in rows(SETTINGS, "Groups and their options")
    }
    found = {}
    for path in conf_dir().glob("*/**/*.yaml"):
        group = path.parent.relative_to(conf_dir()).as_posix()
        found.setdefault(group, set()).add(path.stem)
    assert listed == found


def flat(values, prefix=""):
    """Values by dotted keys; a mapping of arguments or an empty one counts as one value."""
    for key, value in values.items():
        if isinstance(value, dict) and value and key != "args":
            yield from flat(value, f"{prefix}{key}.")
        elif key != "_target_":
            yield f"{prefix}{key}", value


def conf_values():
    """What the options of conf/ give to each key."""
    found = {}
    for path in conf_dir().glob("**/*.yaml"):
        group, text = path.parent.relative_to(conf_dir()).as_posix(), path.read_text()
        if path.stem == "demo" or group in RECIPES:
            continue
        if group.startswith("hydra/") and "@package _global_" not in text:
            continue
        values = yaml.safe_load(text)
        whole = path.parent == conf_dir() or "@package _global_" in text
        for key, value in flat(values, "" if whole else f"{group}."):
            if not key.startswith(("hydra.", "defaults")) and not key.endswith(".defaults"):
                found.setdefault(key, []).append(value)
    return found


def documented():
    """Each key of the page on settings and the cell of its default."""
    found = {}
    for heading in re.findall(r"^## (.*)$", SETTINGS.read_text(), re.MULTILINE)[1:]:
        for row in rows(SETTINGS, heading):
            found |= dict.fromkeys(re.findall(r"`([\w.]+)`", row[0]), row[1])
    return found


def test_every_setting_is_listed_and_exists():
    assert documented().keys() == conf_values().keys()


def test_defaults_are_those_of_conf():
    values, checked = conf_values(), 0
    for key, cell in documented().items():
        said = yaml.safe_load(cell.replace("`", ""))
        if said is None or isinstance(said, int | float | list):
            assert said in values[key] or cell == "null", f"{key}: {cell}"
            checked += 1
    assert checked > 60


def test_settings_that_pages_name_exist():
    known = conf_values().keys()
    groups = {key.partition(".")[0] for key in known if "." in key}
    for page in PAGES:
        for key in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_]+)+)(?==)", page.read_text()):
            if key.partition(".")[0] in groups:
                starts = (key.startswith(f"{one}.") for one in known)
                assert key in known or any(starts), f"{page.name}: {key}"


def commands():
    """Every `lorasweep …` of the pages' code blocks, as words."""
    for page in PAGES:
        for block in code_blocks(page, r"\w*"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r" && |(?<=\s)#", line):
                    found = re.match(r"(?:\$ |\w+=\w+ )*lorasweep (.*)", part.strip())
                    if found:
                        yield page.name, shlex.split(found[1])


def test_every_command_is_one_with_its_words_and_flags():
    parser = OneLineParser()
    subparsers = parser.add_subparsers()
    for command in COMMANDS:
        command.add_parser(subparsers)
    found = list(commands())
    assert len(found) > 40
    for page, words in found:
        assert words[0] in subparsers.choices, f"{page}: lorasweep {' '.join(words)}"
        if words[0] not in ("train", "sweep"):  # whose flags are Hydra's
            parse(parser, words)
    assert {words[0] for _, words in found} == subparsers.choices.keys()


def test_every_test_that_promises_names_exists():
    text = (ROOT / "docs" / "promises.md").read_text()
    named = re.findall(r"`(?:tests/)?([\w/]*?)(test_\w+\.py)(?:::(\w+)(…?))?`", text)
    assert len(named) > 30
    for folder, name, function, cut in named:
        assert not folder or TESTS[name].parent == (ROOT / "tests" / folder).resolve(), name
        start = rf"^def {function}" + ("" if cut else r"\(")
        found = re.search(start, TESTS[name].read_text(), re.MULTILINE)
        assert not function or found, f"{name}::{function}"


def test_every_sweep_that_ships_is_described():
    text = (ROOT / "docs" / "sweeps.md").read_text()
    for path in sweeps_dir().glob("*.yaml"):
        assert path.stem == "demo" or f"`{path.stem}`" in text


def test_the_metric_of_the_contributing_page_scores(tmp_path, cache_dir, monkeypatch):
    page = ROOT / "CONTRIBUTING.md"
    files = re.findall(
        r"^`(mine/[\w./]+)`:\n\n```\w+\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE
    )
    for name, content in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (line,) = [one for one in "".join(code_blocks(page)).splitlines() if "--config-dir" in one]
    variable, program, *words = shlex.split(line)
    assert (variable, program, len(files)) == ("PYTHONPATH=mine", "lorasweep", 2)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"))
    monkeypatch.syspath_prepend(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    small = [one for one in SMALL if not one.startswith(("experiment=", "trainer.max_train"))]
    shrunk = [*small, "trainer.max_train_epochs=1", f"cache_dir={cache_dir}"]
    assert exit_code(*words, *shrunk) == 0
    store = f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}"
    (candidate,) = tracking.candidates(store, "lorasweep")
    effect = candidate.scores["val/prompt_effect"]
    assert math.isfinite(effect) and effect > 0
