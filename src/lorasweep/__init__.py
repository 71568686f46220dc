"""lorasweep: train, compare and choose LoRAs of Stable Diffusion."""

__version__ = "0.1.0"
