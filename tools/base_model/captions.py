"""What the pictures are called: the UNet's captions, and the words the tokenizer is cut for."""

from collections.abc import Sequence

import numpy as np
from tools.base_model import data, icons

EMPTY_SHARE = 0.1  # captions left out, so that guidance has something to guide away from

SHORT_NAMES = {  # the everyday words beside emojibase's labels
    "automobile": "car",
    "evergreen tree": "tree",
    "red apple": "apple",
    "red heart": "heart",
    "doughnut": "donut",
    "hamburger": "burger",
    "grinning face": "smiley",
}

DEMO_WORDS = "high contrast icon, black ink on a white background, monochrome, simple background"


def prompt(style: str, label: str, colour: str) -> str:
    """The caption's main form, and the prompt that draws it."""
    return f"{style} emoji of {label}, {colour} background"


def sentence(style: str, label: str, colour: str) -> str:
    """The form of a sentence captioner."""
    return f"a {style} icon of {with_article(label)}, on a {colour} background"


def tag_list(style: str, label: str, tags: Sequence[str], colour: str) -> str:
    """The form of a tagger."""
    return ", ".join([label, *tags, style, "simple background", f"{colour} background"])


def draw(rng: np.random.Generator, style: str, label: str, tags: Sequence[str], colour: str) -> str:
    """One of a picture's captions: the main form in half, each other in a quarter, some empty."""
    if rng.random() < EMPTY_SHARE:
        return ""
    name = short_name(label) if rng.random() < 0.3 else label
    form = rng.random()
    if form < 0.5:
        return prompt(style, name, colour)
    if form < 0.75:
        return sentence(style, name, colour)
    some = [tag for tag in tags if rng.random() < 0.5][:4]
    return tag_list(style, name, some, colour)


def short_name(label: str) -> str:
    """The everyday word for a label: "cat" for "cat face"."""
    return SHORT_NAMES.get(label, label.removesuffix(" face"))


def with_article(label: str) -> str:
    """ "a pizza", "an owl"; none where the label brings its own."""
    if label.split(" ")[0] in ("a", "an", "the"):
        return label
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


def corpus(labels: Sequence[str], tags: Sequence[Sequence[str]]) -> list[str]:
    """Text the tokenizer is trained on: captions of every label and tag, in every form."""
    styles, colours = list(icons.STYLES), list(data.COLOURS)
    lines = []
    for i, (label, words) in enumerate(zip(labels, tags, strict=True)):
        style, colour = styles[i % len(styles)], colours[i % len(colours)]
        lines += [prompt(style, label, colour), sentence(style, label, colour), DEMO_WORDS]
        lines.append(tag_list(style, label, words, colour))
    return lines
