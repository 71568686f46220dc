"""Base models: frozen, loaded from a hub id, a diffusers folder or a single file.

Settings (`Model`) come in; a `BaseModel` goes out, which encodes, predicts and decodes. The noise
schedule, the loss of a sample, devices and their memory are here too. Open base_model.py first,
then a family, such as stable_diffusion.py, then load_model.py.
"""

from lorasweep.models.base_model import BaseModel, Precision
from lorasweep.models.devices import choose_devices, resolve_device
from lorasweep.models.load_model import Model
from lorasweep.models.model_files import ModelError
from lorasweep.models.noise_schedule import NoiseSchedule

__all__ = [
    "BaseModel",
    "Model",
    "ModelError",
    "NoiseSchedule",
    "Precision",
    "choose_devices",
    "resolve_device",
]
