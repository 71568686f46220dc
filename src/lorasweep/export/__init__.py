"""What is made of a trained LoRA or a base model for other programs, read back and drawn.

In come LoRA files and models; out go a model with LoRAs merged in (merge.py), a LoRA for diffusers
(diffusers_lora.py), a converted model, a resized or an extracted LoRA. Each is written beside its
target and checked before it appears. Open merge.py first.
"""

from lorasweep.export.convert_model import convert
from lorasweep.export.diffusers_lora import lora_for_diffusers
from lorasweep.export.exported import Exported, ExportError
from lorasweep.export.generic_diffusion_feature import offline_lora
from lorasweep.export.merge import merged

__all__ = ["ExportError", "Exported", "convert", "lora_for_diffusers", "merged", "offline_lora"]
