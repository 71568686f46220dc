"""What a folder that somebody else may have made can set: our settings, and little beside them.

Such folders are those of options (`--config-dir`), which Hydra reads through
`hydra_plugins.lorasweep.options_folder`, and those in which a run or a sweep goes on (`resume`).
conf/ and the command line are the person's own, and may say anything.

Hydra's own part of a config is code in disguise (callbacks, classes of log handlers, folders to
search), so that of it such a folder chooses only a launcher and a sweeper, by their names. A few
settings reach out of this machine or run programs (`ONLY_SAID`): they hold if the command line
says them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config.conf_folder import OPTIONS_SCHEME, conf_dir
from lorasweep.config.resolvers import RESOLVERS
from lorasweep.config.run import KEYS
from lorasweep.core.foreign_files import (
    MAX_YAML_BYTES,
    ForeignFileError,
    inside,
    parse_yaml,
)
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import shown
from lorasweep.tracking.store import public_uri
from lorasweep.training.optimizers import KNOWN_PACKAGES

ONLY_SAID = (
    "model.allow_pickle",  # a pickle is a program
    "tracking.uri",  # where pictures and images are sent
    "study.storage",
    "launcher.pack_via",  # another machine's programs; their options hold commands of the shell
    "launcher.engine",
    "optimizer.type",  # imports a package, but for those of conf/
    "trainer.path",  # of programs
    "trainer.python",
)
"""Settings that hold only if they are conf/'s own or said on the command line."""

_OWN_NODES = KEYS | {"study"}
_BY_NAME = ("hydra/launcher", "hydra/sweeper")
_SAFE_RESOLVERS = "|".join(map(re.escape, (*RESOLVERS, "oc.select", "now")))
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_SAFE_INTERPOLATION = re.compile(rf"\$\{{(?:[\w.\[\]-]+\}}|(?:{_SAFE_RESOLVERS}):)")
_DEFAULT = re.compile(r"(?:(?:override|optional) +)*/?([\w./-]+)(?:@([\w.]+))?")


def read_options(folder: Path, name: str, package_of: Callable[[str], str | None]) -> str:
    """The text of a file of options, once all that it says may be said there.

    `name` is its path in the folder; `package_of` a text is where Hydra would put what it holds.
    Raises ForeignFileError.
    """
    path = folder / name
    text = _text(inside(folder, name))
    content = _checked(text, path)
    if name.lstrip("/").startswith("hydra/") or ".." in Path(name).parts:
        raise _hydras_own(path, name)
    package = package_of(text)
    if package not in (None, "", "_group_") and not _is_own_package(package):
        raise _hydras_own(path, f"@package {package}")
    if isinstance(content, Mapping):
        _check_hydra(content.get("hydra"), path)
        _check_defaults(content.get("defaults"), path)
    return text


def check_said(cfg: DictConfig, said: Sequence[str]) -> None:
    """Raise SettingsError for a value of ONLY_SAID that neither conf/ nor the command line has.

    For configs that a folder of options had a part in; `said` are the command line's overrides.
    """
    pairs = [word.lstrip("+~").partition("=")[::2] for word in said]
    nodes = [f"{key}." for key, value in pairs if value.startswith("{")]
    for key in ONLY_SAID:
        value = _resolved(cfg, key)
        by_line = any(f"{one}.".startswith(f"{key}.") for one, _ in pairs)
        by_line = by_line or key.startswith(tuple(nodes))
        if not (by_line or _is_harmless(key, value) or value in _in_conf(key)):
            raise SettingsError(
                f"{key}={shown(public_uri(str(value)))} is for you to say, and not for a folder of"
                f" options: if it is right, give {key}=… on the command line"
            )


def check_job(cfg: DictConfig, hydra_cfg: Any) -> None:
    """`check_said` for a config that Hydra composed; `hydra_cfg` is its node hydra."""
    if _has_options(hydra_cfg):
        check_said(cfg, hydra_cfg.overrides.task)


def check_searched(lines: Sequence[str], hydra_cfg: Any) -> None:
    """Raise SettingsError for what a sweep's file can't vary: each line is an override of jobs."""
    if _has_options(hydra_cfg) and (found := unsaid(lines)):
        raise SettingsError(
            f"study.params: a folder of options can't vary {shown(found[0])}; leave it out there"
        )


def unsaid(words: Iterable[str]) -> list[str]:
    """Of the overrides that a folder names, those that it can't decide by itself."""
    return [word for word in words if not _is_plain(word)]


def _has_options(hydra_cfg: Any) -> bool:
    return any(one.schema == OPTIONS_SCHEME for one in hydra_cfg.runtime.config_sources)


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    return content.decode()


def _checked(text: str, path: Path) -> Any:
    """What the YAML holds, each of whose strings may be resolved."""
    content = parse_yaml(text, path, object)
    for one in _strings(content):
        if (found := _unsafe(one)) is not None:
            raise ForeignFileError(
                f"{path}: {shown(found, 60)} is not resolved there; give such a value on the"
                " command line"
            )
    return content


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _strings(key)
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


def _unsafe(text: str, *, escapes: bool = True) -> str | None:
    """The first interpolation that isn't of other settings or a resolver of conf/'s, or None.

    Those of the environment (oc.env) read this machine; oc.decode and oc.create make others.
    """
    for found in _INTERPOLATION.finditer(text):
        is_text = escapes and len(found[1]) % 2 == 1
        start = found.end() - 2
        if not is_text and not _SAFE_INTERPOLATION.match(text, start):
            return text[start:]
    return None


def _is_own_package(package: str) -> bool:
    first = re.sub(r"^(_global_\.)+", "", package).partition(".")[0]
    return first == "_global_" or first in _OWN_NODES


def _check_hydra(node: Any, path: Path) -> None:
    """Of Hydra's node a sweep's file has its mode and what it varies."""
    rest = dict(node) if _is_map(node) else {"": node} if node is not None else {}
    sweeper = rest.pop("sweeper", None) or {}
    rest.pop("mode", None)
    params = sweeper.get("params") or {} if _is_map(sweeper) else None
    if rest or not _is_map(params) or set(sweeper) - {"params"}:
        raise _hydras_own(path, "hydra")
    words = [f"{name}={value}" for name, value in dict(params or {}).items()]
    if found := unsaid(words):
        raise ForeignFileError(f"{path}: {shown(found[0])} can't be varied there; leave it out")


def _check_defaults(defaults: Any, path: Path) -> None:
    for entry in defaults if isinstance(defaults, list) else [defaults] if defaults else []:
        pairs = entry.items() if _is_map(entry) else [(entry, None)]
        for key, value in pairs:
            found = _DEFAULT.fullmatch(str(key))
            if found is None:
                raise _hydras_own(path, f"defaults: {key}")
            group, package = found.groups()
            names = value if isinstance(value, list) else [value]
            by_name = group in _BY_NAME and package is None
            named = all(re.fullmatch(r"[\w-]+", str(one)) for one in names)
            if group.partition("/")[0] == "hydra" and not (by_name and named):
                raise _hydras_own(path, f"defaults: {key}")
            relative = package is None or package in ("_here_", "_group_")
            if not relative and not _is_own_package(package):
                raise _hydras_own(path, f"defaults: {key}")


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _hydras_own(path: Path, what: str) -> ForeignFileError:
    return ForeignFileError(
        f"{path}: {shown(what)}: Hydra's own settings are not taken from a folder of options, but"
        " for hydra/launcher and hydra/sweeper by name; give them on the command line"
    )


def _is_plain(word: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    key, values = str(override.key_or_group), _values(override._value)
    if override.package is not None or not re.fullmatch(r"[\w-]+([./][\w-]+)*", key):
        return False
    if _unsafe(word, escapes=False) is not None:
        return False
    if re.split("[./]", key)[0] == "hydra":
        return key in _BY_NAME and all(re.fullmatch(r"\w+", str(one)) for one in values)
    if any(f"{key}.".startswith(f"{one}.") for one in ONLY_SAID):
        return key in ONLY_SAID and all(_is_harmless(key, one) for one in values)
    # a group is chosen by name: no part of it is given with it
    return "." in key or not any(isinstance(one, dict) or "$" in str(one) for one in values)


def _values(value: Any) -> list[Any]:
    """The values of an override in Hydra's grammar, of its lists and choices each one."""
    inner = getattr(value, "list", value)  # of a choice
    if isinstance(inner, list):
        return [one for part in inner for one in _values(part)]
    return [getattr(value, "text", value)]  # without quotes


def _resolved(cfg: DictConfig, key: str) -> Any:
    """The value of a key as a run would get it; None where it has none."""
    group, _, rest = key.partition(".")
    try:  # this key alone: others may be missing, and doctor and pick go on without them
        node = cfg.get(group)
        return node.get(rest) if isinstance(node, dict | DictConfig) else None
    except (OmegaConfBaseException, TypeError):  # refused wherever it is read
        return None


def _is_harmless(key: str, value: Any) -> bool:
    if value is None:
        return True
    if key == "optimizer.type":
        package = str(value).rpartition(".")[0].partition(".")[0]
        return isinstance(value, str) and package in {"", "torch", *KNOWN_PACKAGES}
    return value is False or value == {}


def _in_conf(key: str) -> list[Any]:
    """The values that the options of conf/ have for a key."""
    group, _, rest = key.partition(".")
    found = [OmegaConf.select(OmegaConf.load(conf_dir() / "config.yaml"), key)]
    for file in (conf_dir() / group).glob("*.yaml"):
        found.append(OmegaConf.select(OmegaConf.load(file), rest))
    return found
