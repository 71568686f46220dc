"""What generic diffusion feature (arXiv 2410.03558) loads, and the lines that a person pastes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loader:
    """How generic diffusion feature loads an architecture (its feature/components/models.py)."""

    version: str
    config: str
    img_size: int
    pipeline: str
    base: str
    """What it attaches LoRA files to."""


SD15 = Loader(
    version="1-5",
    config="config_15_practical.json",
    img_size=512,
    pipeline="StableDiffusionImg2ImgPipeline",
    base="stable-diffusion-v1-5/stable-diffusion-v1-5",
)
SDXL = Loader(
    version="xl",
    config="config_xl_practical.json",
    img_size=1024,
    pipeline="StableDiffusionXLImg2ImgPipeline",
    base="stabilityai/stable-diffusion-xl-base-1.0",
)
PASTE = (
    "from diffusion_feature import FeatureExtractor",
    'df = FeatureExtractor(layer="feature/configs/{loader.config}", version="{loader.version}",'
    ' device="cuda", img_size={loader.img_size}, {arguments})',
)


def paste(arguments: str, loader: Loader) -> list[str]:
    """An empty line, and the two of Python."""
    return ["", *(line.format(arguments=arguments, loader=loader) for line in PASTE)]
