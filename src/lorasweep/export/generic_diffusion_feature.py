"""What generic diffusion feature (arXiv 2410.03558) loads, and the lines that a person pastes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lorasweep.export import diffusers_folder
from lorasweep.export.attach_loras import Loras
from lorasweep.export.diffusers_lora import write_for_diffusers
from lorasweep.export.exported import Exported, is_file
from lorasweep.export.merge import merged
from lorasweep.models.base_model import Precision
from lorasweep.models.load_model import Model


@dataclass(frozen=True)
class Loader:
    """How generic diffusion feature loads an architecture (its feature/components/models.py)."""

    version: str
    config: str
    img_size: int
    pipeline: str
    base: str
    """What it attaches LoRA files to."""

    def lines_to_paste(self, arguments: str) -> tuple[str, ...]:
        """An empty line, and the two of Python."""
        return (
            "",
            "from diffusion_feature import FeatureExtractor",
            f'df = FeatureExtractor(layer="feature/configs/{self.config}",'
            f' version="{self.version}", device="cuda", img_size={self.img_size}, {arguments})',
        )


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
PGV2 = replace(SDXL, version="pgv2", base="playgroundai/playground-v2-1024px-aesthetic")
"""Playground v2, of SDXL's architecture."""
PEFT_NOTE = (
    "generic diffusion feature attaches a file by diffusers, which needs peft: pip install peft"
)


def loader_of(base: Model) -> Loader:
    """How this base is loaded; Playground is known by its name alone."""
    if not diffusers_folder.is_sdxl(base.path, base.revision):
        return SD15
    return PGV2 if "playground-v2-" in base.path else SDXL


def offline_lora(
    base: Model,
    loras: Loras,
    target: Path,
    *,
    rank: int | None = None,
    precision: Precision | None = None,
    vae: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write what generic diffusion feature loads, with the lines to paste.

    A `target` ending in .safetensors is a LoRA file that diffusers loads, for `offline_lora` and
    `offline_lora_filename`; it is attached to SD1.5 or SDXL then. Any other is a whole model
    folder, for `offline_lora` alone; of SDXL it holds the variant fp16 too, which is what is
    loaded. Raises as `merged` and `write_for_diffusers` do.
    """
    loader = loader_of(base)
    if is_file(target):
        written = write_for_diffusers(base, loras, target, rank, overwrite=overwrite)
        folder, name = str(target.absolute().parent), target.name
        arguments = f"offline_lora={folder!r}, offline_lora_filename={name!r}"
        note = (
            f"With a file, generic diffusion feature takes {loader.base} as the base; this LoRA's"
            f" is {base.path}. A whole model folder (--out without .safetensors) holds its own"
            " base."
        )
        notes = [PEFT_NOTE] if base.path == loader.base else [note, PEFT_NOTE]
    else:
        written = merged(
            base,
            loras,
            target,
            precision=precision,
            vae=vae,
            overwrite=overwrite,
            pipeline_class=loader.pipeline,
            fp16_variant=loader is not SD15,
        )
        arguments, notes = f"offline_lora={str(target.absolute())!r}", []
    return replace(written, lines=(*written.lines, *notes, *loader.lines_to_paste(arguments)))
