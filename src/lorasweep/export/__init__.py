"""What is made of a trained LoRA or a base model for other programs, read back and drawn.

merge.py (LoRA into its base), diffusers_lora.py (LoRA for diffusers), generic_diffusion_feature.py,
convert_model.py (single file and diffusers folder), resize.py, extract.py. Each writes beside its
target, checks what was written, and only then lets it appear. Open merge.py first.
"""

from lorasweep.export.convert_model import convert
from lorasweep.export.diffusers_lora import lora_for_diffusers
from lorasweep.export.exported import Exported, ExportError
from lorasweep.export.generic_diffusion_feature import offline_lora
from lorasweep.export.merge import merged

__all__ = ["ExportError", "Exported", "convert", "lora_for_diffusers", "merged", "offline_lora"]
