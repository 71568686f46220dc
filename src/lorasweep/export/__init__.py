"""What is made of a trained LoRA or a base model for other programs, read back and drawn.

merge.py (LoRA into its base), diffusers_lora.py (LoRA for diffusers), generic_diffusion_feature.py,
convert_model.py (single file and diffusers folder), resize.py, extract.py. Each writes beside its
target, checks what was written, and only then lets it appear. Open merge.py first.
"""
