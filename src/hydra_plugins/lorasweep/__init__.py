"""Hydra finds plug-ins here; their code is in the package lorasweep."""
