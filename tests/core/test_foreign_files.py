"""What others wrote is read within bounds, and refused in one line that names the file."""

import os
from pathlib import Path

import pytest

from lorasweep.core.foreign_files import (
    ForeignFileError,
    check_no_pipe,
    inside,
    parse_json,
    parse_yaml,
    read_json,
    read_text,
    read_yaml,
)


def test_plain_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, null]}')
    (tmp_path / "a.yaml").write_text("a: &x [1, null]\nb: *x\n")
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}
    assert read_yaml(tmp_path / "a.yaml") == {"a": [1, None], "b": [1, None]}
    assert parse_json("[1]", "a text", list) == [1]


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, "1" * 5_000, "\x1b[2J"])
def test_json_of_another_shape_is_one_line(text: str) -> None:
    with pytest.raises(ForeignFileError, match=r"^[ -~]*some\.json[ -~]*$"):
        parse_json(text, "some.json")


_BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        _BOMB,
        "a: &a [*a]",
        "a: &a {<<: *a}",
        "[" * 3_000,
        "a: !!python/object/apply:os.system ['touch made']",
        "day: 2026-13-45",
        "a: [1",
        "- 1",
        "",
    ],
)
def test_yaml_that_is_large_or_of_another_shape_is_one_line(text: str) -> None:
    with pytest.raises(ForeignFileError, match=r"^[ -~]*some\.yaml[ -~]*$"):
        parse_yaml(text, "some.yaml")


def test_what_may_be_read_without_end_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        for read in (read_json, read_yaml, read_text, check_no_pipe):
            with pytest.raises(ForeignFileError, match="is a device or a pipe"):
                read(tmp_path / name)
    check_no_pipe(tmp_path)
    check_no_pipe(tmp_path / "gone")


def test_a_text_is_read_within_its_bounds(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("\ufeffabc")
    assert read_text(tmp_path / "a", 6) == "abc"
    for content, said in ((b"x" * 7, "has more than"), (b"\xff\xfe", "is not UTF-8")):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ForeignFileError, match=said):
            read_text(tmp_path / "a", 6)


def test_a_path_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    home, outside = tmp_path / "run", tmp_path / "secret"
    home.mkdir()
    outside.write_text("secret")
    (home / "file").write_text("own")
    (home / "link").symlink_to(outside)
    (home / "up").symlink_to(tmp_path)
    assert inside(home, "file") == inside(home, home / "file") == home / "file"
    for path in ("link", "up/secret", "../secret", str(outside), "/etc/passwd"):
        with pytest.raises(ForeignFileError, match="lies outside"):
            inside(home, path)
