"""LoRA files merged into a loaded base model before anything is computed with it.

As kohya's base_weights: what is trained, scored and drawn then is all on the merged base.
"""

from __future__ import annotations

import logging

from lorasweep.adapters.differences import bias_delta
from lorasweep.adapters.kohya_names import every_norm, every_site
from lorasweep.adapters.pack import check_fit, file_delta
from lorasweep.core.safetensors_header import CheckpointError
from lorasweep.lora_files import read_lora_file
from lorasweep.models.base_model import BaseModel

log = logging.getLogger(__name__)


def merge_base_weights(base: BaseModel) -> None:
    """Add the files of `model.base_weights` to the base's weights, one after the other.

    Each is computed in fp32 and rounded to the weights' type. Raises CheckpointError for a file
    that can't be read or doesn't fit, of which nothing is used then.
    """
    import torch

    known = every_site(base.parts) | every_norm(base.parts)
    for path, multiplier in base.settings.merged_weights:
        file = read_lora_file.read(path, base)
        for key, tensors in file.sites.items():
            if key not in known:
                raise CheckpointError(f"{path}: {key}: the base model has no such module")
            try:
                check_fit(known[key], tensors)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from None
        with torch.no_grad():
            for key, tensors in file.sites.items():
                site = known[key]
                own = {name: tensor.to(site.weight.device) for name, tensor in tensors.items()}
                changes = [(site.weight, file_delta(site, own)), (site.bias, bias_delta(own))]
                for parameter, delta in changes:
                    if parameter is not None and delta is not None:
                        parameter.copy_(parameter.float() + multiplier * delta)
        log.info("merged %s into the base model, times %g", path, multiplier)
