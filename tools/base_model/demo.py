"""The demo's data: pictures of a style the base has never seen, and their sidecar captions.

The captions are made by rule from emojibase's labels and tags, in the manner of a tagger (wd)
and of a sentence captioner (kosmos); neither model was run.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tools.base_model import captions, data, icons

SIZE = 128  # pixels; the trainer scales them to the base's own size
TAGS = 7  # of a tag list, the words of the label included
STYLE_TAGS = ("high contrast", "monochrome", "simple background", "white background")
UNCOUNTED = ("bread",)  # no article

KEPT_OUT = (  # the prompts that judge the style on concepts it was not learned from
    "pizza",
    "cat face",
    "rocket",
    "house",
    "dog face",
    "red apple",
    "cactus",
    "panda",
)

TRAINED = (  # 18 of these are concepts the base draws
    "rabbit face",
    "evergreen tree",
    "fox",
    "bread",
    "sauropod",
    "bell",
    "pig face",
    "bus",
    "banana",
    "zebra",
    "eggplant",
    "grinning face",
    "ant",
    "volcano",
    "snail",
    "pencil",
    "violin",
    "lobster",
    "bicycle",
    "tulip",
    "balloon",
    "spider",
    "star",
    "guitar",
    "elephant",
    "giraffe",
    "candle",
    "cookie",
    "ghost",
    "butterfly",
)

VALIDATED = (  # for a held-out loss
    "tomato",
    "shark",
    "clown face",
    "cloud",
    "mushroom",
    "lemon",
    "squid",
    "red heart",
)


def write(rendered: icons.Rendered, folder: Path) -> None:
    """Write the pictures and `captions.jsonl`: 30 to train on, then 8 to hold out."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for label in (*TRAINED, *VALIDATED):
        i = rendered.labels.index(label)
        picture = (data.on_colour(rendered.rgba[i : i + 1], "white")[0] + 1) * 127.5
        name = f"{label.replace(' ', '_')}.png"
        pixels = picture.transpose(1, 2, 0).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / name, optimize=True)
        lines.append(json.dumps({"file": name, **caption(label, rendered.tags[i])}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


def caption(label: str, tags: tuple[str, ...]) -> dict[str, str]:
    """Both captions of one picture."""
    words = list(dict.fromkeys(single_words(label, tags)))[:TAGS]
    name = label if label in UNCOUNTED else captions.with_article(label)
    return {
        "wd": ", ".join([*words, *STYLE_TAGS]),
        "kosmos": f"a high contrast icon of {name}, black ink on a white background",
    }


def single_words(label: str, tags: tuple[str, ...]) -> Iterator[str]:
    """The label's words, then the tags of one word, in lower case."""
    yield from label.lower().split()
    yield from (tag.lower() for tag in tags if " " not in tag)
