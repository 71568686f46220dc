"""What PEFT's config says of an adapter: how strong it is at a site, and whether it adds to a base.

Source: PEFT's tuners and `utils.other.get_pattern_key`. A diffusers file holds the same entries in
its metadata, with the part in front: unet.lora_alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lorasweep.core.foreign_files import ForeignFileError, parse_json
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.core.text import shown
from lorasweep.lora_files.site_names import Name

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's config in a file: JSON with keys such as unet.lora_alpha."""

_DEFAULT = 8.0  # PEFT's for r and for alpha, of all of its types
_READ = ("LORA", "LOHA", "LOKR")
_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Starts that leave the base's weights as they are; the others take their product off them."""
_CHANGED = (
    *("layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens"),
    *("kasa_config", "monteclora_config"),
)
"""Options by which a LoRA adds something else to the weights than its product."""
_BY_PEFT = "merge it by PEFT's merge_and_unload"
_SECONDS = 0.1  # for one match; PEFT's own patterns take microseconds


class PEFTConfig:
    """PEFT's config of a file; an empty one where it has none."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        """Of a file's metadata. Raises CheckpointError for what is no config of PEFT's."""
        try:
            where = f"{METADATA_KEY} in the file's metadata"
            self.values = parse_json(metadata.get(METADATA_KEY, "{}"), where)
        except ForeignFileError as error:
            raise CheckpointError(str(error)) from None

    def check(self) -> None:
        """Raise CheckpointError for an adapter that is no plain sum with the base's weights."""
        for name, value in self.values.items():
            key = name.rpartition(".")[2]  # behind the part
            if key == "peft_type" and str(value).upper() not in _READ:
                raise CheckpointError(
                    f"it is PEFT's {shown(str(value))}, which isn't read: {_BY_PEFT}"
                )
            if key == "init_lora_weights" and not _leaves_the_base(value):
                raise CheckpointError(
                    f"its LoRA began as a part of the base's weights ({key}={shown(str(value))}),"
                    " which only PEFT takes off the base: save it by PEFT's save_pretrained(…,"
                    f" path_initial_model_for_weight_conversion=…), or {_BY_PEFT}"
                )
            if key in _CHANGED and value:
                raise CheckpointError(f"PEFT's {key} isn't read: {_BY_PEFT}")

    def scale(self, name: Name, kind: str, rank: int | None) -> float:
        """What the product of a site's factors, of this `kind`, is multiplied by: alpha / rank.

        rsLoRA (arXiv 2312.03732) divides by the root of the rank. A LoKr of two whole factors has
        no `rank` but the config's. Without a config it is 1, as diffusers takes it.
        """
        own = self._of(name.part)
        key = "lora_alpha" if kind == "lora" else "alpha"
        default = _DEFAULT if "peft_type" in own else None
        alpha = self._at(name, own, key, "alpha_pattern", default)
        rank = rank or self._at(name, own, "r", "rank_pattern", _DEFAULT)
        if alpha is None or not rank:
            return 1.0
        return alpha / (math.sqrt(rank) if own.get("use_rslora") is True else rank)

    def _of(self, part: str | None) -> dict[str, Any]:
        """The entries of a part, with or without its name in front."""
        return {
            key.removeprefix(f"{part}."): value
            for key, value in self.values.items()
            if "." not in key or key.startswith(f"{part}.")
        }

    def _at(
        self, name: Name, own: Mapping[str, Any], key: str, patterns: str, default: float | None
    ) -> Any:
        """A number at a site: by the first pattern that matches, else the common one."""
        table = own.get(patterns)
        table = table if isinstance(table, dict) else {}
        for pattern in table:
            if _matches(pattern, name.dotted):
                return _number(table, pattern)
        return default if own.get(key) is None else _number(own, key)


def _leaves_the_base(start: Any) -> bool:
    return not isinstance(start, str) or start.lower() in (*_STARTS, "true", "false")


def _matches(pattern: str, path: str) -> bool:
    """PEFT's rule: a regular expression for the path, or for its end after a dot.

    A stranger's expression may take for ever in Python's `re`, so its time is limited.
    """
    import regex

    try:
        return bool(regex.match(rf"(.*\.)?({pattern})$", path, timeout=_SECONDS))
    except (regex.error, TimeoutError):
        raise CheckpointError(
            f"{METADATA_KEY}: {shown(pattern)} is no pattern for modules' names"
        ) from None


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{METADATA_KEY}: {shown(name)} is {shown(repr(value))}, no number")
    return float(value)
