"""Reading what somebody else may have written: bounded, of the right shape, inside its folder.

Whatever comes from outside (a run's folder, a tracking store, a config folder, a data set) is
parsed by these functions. Each raises ForeignFileError, whose message is one line that names the
file, in place of the many errors of the parsers.
"""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lorasweep.core.text import shown

MAX_BYTES = 64_000_000  # of a JSON text; captions of 100,000 images take a third of it
MAX_YAML_BYTES = 4_000_000
MAX_TOML_BYTES = 1_000_000  # a hundred folders take a fiftieth of it
MAX_YAML_NODES = 200_000  # after aliases are expanded; a composed config has about 300
_MAX_DEPTH = 60


class ForeignFileError(ValueError):
    """A file that is too large, not what its name says, or not where it should be."""


def parse_json(text: str | bytes, where: str | Path, kind: type = dict) -> Any:
    """The value of a JSON text, which must be a `kind`: dict or list. `where` names its source."""
    if len(text) > MAX_BYTES:
        raise ForeignFileError(f"{where} is {len(text) / 1e6:.0f} MB: too large to be read")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ForeignFileError(f"{where} is not JSON: {_one_line(error)}") from None
    return _of_kind(value, where, kind)


def parse_shaped(text: str | bytes, where: str | Path, shape: Any) -> Any:
    """The value of a JSON text that has the shape of a type or a dataclass, as plain values.

    Nothing is converted, but further keys may be there: a later lorasweep may write them.
    """
    from pydantic import TypeAdapter, ValidationError

    value = parse_json(text, where, object)
    try:
        TypeAdapter(shape).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{part}]" for part in first["loc"])
        raise ForeignFileError(
            f"{where} is not as lorasweep writes it: {shown(place)} {_one_line(first['msg'])}"
        ) from None
    return value


def parse_yaml(text: str | bytes, where: str | Path, kind: type = dict) -> Any:
    """The value of a YAML text of plain values, which must be a `kind`: dict or list.

    Aliases are counted as often as they are used, so that a few lines can't fill the memory.
    """
    check_yaml(text, where)
    try:
        value = _LOADER(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # a date in month 13, a tag of Python's
        raise ForeignFileError(f"{where} is not YAML of plain values: {_one_line(error)}") from None
    return _of_kind(value, where, kind)


def check_yaml(text: str | bytes, where: str | Path) -> None:
    """Raise ForeignFileError if a YAML text is damaged, or large once its aliases are expanded."""
    if len(text) > MAX_YAML_BYTES:
        raise ForeignFileError(f"{where} is {len(text) / 1e6:.0f} MB: too large for a YAML file")
    try:
        root = yaml.compose(text, Loader=_LOADER)
        nodes = 0 if root is None else _nodes(root, {}, 0)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ForeignFileError(f"{where} is not YAML of plain values: {_one_line(error)}") from None
    if nodes > MAX_YAML_NODES:
        raise ForeignFileError(f"{where} has {nodes:.0e} values once its aliases are expanded")


def read_json(path: Path, kind: type = dict) -> Any:
    """The value of a JSON file; see `parse_json`. Raises also OSError, if there is no such file."""
    return parse_json(_bounded(path, MAX_BYTES), path, kind)


def read_yaml(path: Path, kind: type = dict) -> Any:
    """The value of a YAML file; see `parse_yaml`. Raises also OSError, if there is no such file."""
    return parse_yaml(_bounded(path, MAX_YAML_BYTES), path, kind)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises also OSError, if there is no such file."""
    text = read_text(path, MAX_TOML_BYTES)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ForeignFileError(f"{path} is not TOML: {_one_line(error)}") from None


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """A file of at most `limit` bytes. Raises also OSError, if there is no such file."""
    content = _bounded(path, limit)
    if len(content) > limit:
        raise ForeignFileError(f"{path} has more than {limit / 1e6:g} MB: too large to be read")
    return content


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file of at most `limit` bytes. Raises also OSError."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ForeignFileError(f"{path} is not UTF-8 text") from None


def check_no_pipe(path: Path) -> None:
    """Raise ForeignFileError for a pipe, a socket or a device: reading it may never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ForeignFileError(f"{path} is a device or a pipe, not a file")


def inside(folder: Path, path: str | Path) -> Path:
    """`path`, relative to `folder` or absolute, with all links followed, if it lies in `folder`."""
    full = Path(os.path.realpath(folder / path))
    if not _is_inside(folder, full):
        raise ForeignFileError(f"{path} lies outside {folder}: it is not read")
    return full


def refuse_links_out(folder: Path) -> None:
    """Raise ForeignFileError if a link below `folder`, to a file or a folder, leads out of it.

    In the folder of a stranger, what we write there would land where the link says.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not _is_inside(folder, path):
                raise ForeignFileError(
                    f"{path} is a link that leads out of {folder}; put what it names in its place"
                )


def _bounded(path: Path, limit: int) -> bytes:
    check_no_pipe(path)
    with path.open("rb") as file:
        return file.read(limit + 1)


def _is_inside(folder: Path, path: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _of_kind(value: Any, where: str | Path, kind: type) -> Any:
    if not isinstance(value, kind):
        found = "empty" if value is None else f"a {type(value).__name__}"
        raise ForeignFileError(f"{where} should hold a {kind.__name__}, but is {found}")
    return value


def _nodes(node: yaml.Node, seen: dict[int, int], depth: int) -> int:
    if depth > _MAX_DEPTH:
        raise ValueError(f"values within values, over {_MAX_DEPTH} deep")
    if id(node) not in seen:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        seen[id(node)] = 1 + sum(_nodes(one, seen, depth + 1) for one in children)
    return seen[id(node)]


def _one_line(error: BaseException | str) -> str:
    return shown(" ".join(str(error).split()), 200)


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
