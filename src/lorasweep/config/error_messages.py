"""One line for a person, of any error that they can mend: it names the key and the remedy."""

from __future__ import annotations

import errno
import os

from omegaconf.errors import OmegaConfBaseException

from lorasweep.config import hydra_messages
from lorasweep.core.text import shown
from lorasweep.tracking.store import explain as explain_store


def one_line(error: Exception) -> str | None:
    """What a person is told of an error; None for an unknown one, which keeps its traceback."""
    from hydra.errors import HydraException
    from yaml import YAMLError  # type: ignore[import-untyped]

    if type(error).__module__.startswith("lorasweep"):
        return str(error)
    if isinstance(error, YAMLError):
        said = " ".join(str(error).split())
        return f"{shown(said, 300)}: it is not YAML; mend the file"
    if isinstance(error, UnicodeDecodeError):
        return f"a file of settings is not UTF-8 text ({error.reason}); save it so"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[:100]!r} can't be written as {error.encoding}; give it another name"
    if isinstance(error, HydraException | OmegaConfBaseException | ValueError):
        return hydra_messages.explain(error)
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return _of_file(error)
    return explain_store(error)


_REMEDIES = {
    errno.EACCES: "make it accessible",
    errno.EPERM: "make it accessible",
    errno.EROFS: "give a place that can be written to",
    errno.ENOSPC: "free some disk, or give another place",
    errno.EDQUOT: "free some disk, or give another place",
    errno.EFBIG: "free some disk, or give another place",
    errno.EIO: "the disk or its connection is at fault",
    errno.ENOTDIR: "a file is where a folder is needed",
    errno.EEXIST: "a file is where a folder is needed",
    errno.EISDIR: "a folder is where a file is needed",
    errno.ENOENT: "give a place that exists",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "it is a link to itself",
    errno.EMFILE: "allow more open files (ulimit -n)",
}
"""What a person can do about errors of files and folders."""


def _of_file(error: OSError) -> str:
    place = error.filename if error.filename2 is None else error.filename2
    where = (
        shown(os.fsdecode(place), 300) if isinstance(place, str | bytes | os.PathLike) else "a file"
    )
    return f"{where}: {error.strerror}; {_REMEDIES[error.errno or 0]}"
