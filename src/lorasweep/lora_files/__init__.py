"""LoRA files: written as kohya's, read whatever program wrote them, and looked into.

A path comes in; checked tensors under kohya's names, an `Info`, or a written checkpoint go out.
checkpoint.py is the format and how a file is written, read_lora_file.py reads any program's,
peft_names.py is the way from PEFT's and diffusers' names. Open read_lora_file.py first.
"""

from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.lora_files.checkpoint import Checkpoint, checkpoint_path
from lorasweep.lora_files.info import Info, inspect
from lorasweep.lora_files.read_lora_file import LoRAFile

__all__ = ["Checkpoint", "CheckpointError", "Info", "LoRAFile", "checkpoint_path", "inspect"]
