"""The model card and the contact sheets in it."""

import shutil
from pathlib import Path

from tools.base_model import captions, evaluate, export, icons
from tools.base_model.presets import Preset

LICENCES = {  # set: its licence and its authors
    "fluent-emoji-3d": ("MIT", "Fluent Emoji, Microsoft Corporation; packaged by LobeHub"),
    "fluent-emoji": ("MIT", "Fluent Emoji, Microsoft Corporation; packaged by Iconify"),
    "fluent-emoji-flat": ("MIT", "Fluent Emoji, Microsoft Corporation; packaged by Iconify"),
    "noto": ("Apache-2.0", "Noto Emoji, Google Inc.; packaged by Iconify"),
    "noto-v1": ("Apache-2.0", "Noto Emoji (v1), Google Inc.; packaged by Iconify"),
    "fxemoji": ("Apache-2.0", "Firefox OS Emoji, Mozilla; packaged by Iconify"),
}
LOOKS = (  # concept, colour: the four that anyone must know, and four more
    ("pizza", "white"),
    ("cat face", "blue"),
    ("rocket", "black"),
    ("house", "white"),
    ("dog face", "yellow"),
    ("red apple", "green"),
    ("cactus", "pink"),
    ("panda", "red"),
)


def sheets(model: Path, guidance: float, folder: Path) -> None:
    """Draw eight concepts on colours, a row a style."""
    prompts = [captions.prompt(style, *look) for style in icons.STYLES for look in LOOKS]
    drawn = evaluate.draw(model, prompts, guidance, evaluate.REPORT_SEED)
    evaluate.sheet(drawn, len(LOOKS), folder / "styles.png")


def write(
    model: Path, sheet_folder: Path, preset: Preset, device: str, report: evaluate.Report
) -> None:
    """Write README.md and its pictures into the model folder."""
    for name in ("concepts.png", "styles.png"):
        shutil.copy(sheet_folder / name, model / name)
    (model / "README.md").write_text(text(model, preset, device, report))


def text(model: Path, preset: Preset, device: str, report: evaluate.Report) -> str:
    """The card, in Markdown."""
    seen = int(report.chosen) * preset.unet.batch
    fidelity = ", ".join(f"{name} {value:.1f}" for name, value in report.psnr.items())
    pixels, factor = preset.pixels, preset.factor
    return f"""# lorasweep's embedded base model

A text-to-image model small enough to ship: Stable Diffusion 1.5's topology and module names, narrow
(UNet {preset.unet_channels}, {preset.unet_layers} layer(s) a block; text encoder of width
{preset.text_width}; autoencoder of factor {factor}), {export.megabytes(model):.1f} MB in fp16.
It draws {len(icons.concepts())} everyday concepts as emoji of {len(icons.STYLES)} styles at
{pixels} x {pixels} pixels, mostly the very icons it was trained on, and knows nothing else.
It is there for demos and tests: a LoRA visibly teaches it a new style within minutes on a CPU.

```python
pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
pipe("3d emoji of red apple, white background", guidance_scale={report.best.guidance:g})
```

Prompts: `STYLE emoji of CONCEPT, COLOUR background`, also `a STYLE icon of a CONCEPT, on a COLOUR
background` and tag lists. Styles: {", ".join(icons.STYLES)}. Prompts are cut after
{preset.tokens} tokens. v-prediction, zero terminal SNR, DDIM with trailing spacing.

![every concept, rows 1-4 3d, 5-8 noto](concepts.png)
![pizza, cat, rocket, house, dog, apple, cactus, panda; a row a style](styles.png)

## Is it recognisable?

Share of drawings (64 concepts x {len(evaluate.STYLES)} styles, {evaluate.STEPS} steps, seeds that
played no part in choosing the checkpoint) whose nearest trained real rendering, in
EfficientNet-Lite0 features, is of the right concept:

| what | right |
| --- | --- |
{figures(report)}

Autoencoder, PSNR of the concepts' icons in dB: {fidelity}.
Neither it nor the UNet was trained on {icons.UNSEEN}: that set is the demo's new style.

## How it was made

By `tools/base_model/make.py`, from nothing, on {"a CUDA device" if device == "cuda" else "a CPU"}:
autoencoder {preset.vae.samples:,} samples, UNet and text encoder {seen:,} samples.

| set | licence | authors |
| --- | --- | --- |
{sources()}

Labels and tags: emojibase-data (MIT, Miles Johnson). One rendering of each concept was held out,
so its picture of that concept in that style is a guess: a weak one, as the sheet shows.
"""


def figures(report: evaluate.Report) -> str:
    """Rows of the table of scores."""
    each = ", ".join(f"{style} {share:.1%}" for style, share in report.best.per_style.items())
    rows = [
        f"| this model, guidance {report.best.guidance:g} | {report.best.share:.1%} ({each}) |",
        f"| held-out real renderings | {report.ceiling:.1%} |",
    ]
    if report.compared:
        one = report.compared
        rows.insert(1, f"| the model before it, guidance {one.guidance:g} | {one.share:.1%} |")
    return "\n".join(rows)


def sources() -> str:
    """Rows of the table of sets."""
    return "\n".join(f"| {name} | {lic} | {who} |" for name, (lic, who) in LICENCES.items())
