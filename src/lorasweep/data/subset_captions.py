"""The captions that lie in kohya's folders, or that their names give, as sd-scripts reads them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lorasweep.core.foreign_files import ForeignFileError, read_text
from lorasweep.core.settings import SettingsError
from lorasweep.core.text import listed, shown
from lorasweep.data.dataset import Dataset, ImageSet, images_in, logger
from lorasweep.data.kohya_folders import ArmCaptions
from lorasweep.data.subsets import Subset, subsets

MAX_CAPTION = 1_000_000  # bytes of a file; 10,000 long tags have a fifth of it


def subset_captions(dataset: Dataset, images: ImageSet) -> dict[str, ArmCaptions]:
    """What each of the data set's kohya folders has of the images, by the folder's arm.

    Raises SettingsError for a caption file that can't be read.
    """
    found = {}
    for subset in subsets(dataset):
        paths = images_in(subset)
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
        # of the same image twice in a folder the first counts, as in the image set
        first = dict(zip(digests[::-1], paths[::-1], strict=True))
        texts = _captions(subset, list(first.values()))
        of_images = dict(zip(first, texts, strict=True))
        found[subset.name] = ArmCaptions(
            repeats=subset.num_repeats,
            captions=tuple(
                of_images.get(image.sha256) if (split == "reg") == subset.is_reg else None
                for split, image in images.by_split
            ),
            captioner=subset.about(),
            has_lines=subset.settings.enable_wildcard,
            keeps_alpha=subset.settings.alpha_mask,
        )
    return found


def _captions(subset: Subset, images: Sequence[Path]) -> list[str]:
    """What each image's caption file says; without one, the class tokens."""
    found = [_caption(subset, path) for path in images]
    if missing := [path.name for path, one in zip(images, found, strict=True) if one is None]:
        logger.warning(
            "%s: no %s file for %s; their caption is %r",
            subset.image_dir,
            subset.caption_extension,
            listed(sorted(missing)),
            subset.class_tokens,
        )
    return [subset.class_tokens if one is None else one for one in found]


def _caption(subset: Subset, image: Path) -> str | None:
    path = image.with_name(f"{image.stem}{subset.caption_extension}")
    if not os.path.lexists(path):
        return None
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(subset.root):
        raise SettingsError(
            f"{shown(str(path), 300)} is a link that leads out of the image folder; put a copy of"
            " what it points to in its place"
        )
    try:
        text = re.sub("\r\n?", "\n", read_text(path, MAX_CAPTION))
        return text if subset.settings.enable_wildcard else text.partition("\n")[0]
    except ForeignFileError as error:
        raise SettingsError(f"{shown(str(error), 400)}; mend it") from None
    except OSError as error:
        raise SettingsError(f"cannot read {shown(str(path), 300)}: {error.strerror}") from None
