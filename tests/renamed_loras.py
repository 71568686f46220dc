"""A LoRA's tensors under the names of every program: (kohya's tensors, base) -> theirs."""

import re

from lorasweep.lora_files.peft_names import peft_path, to_peft


def as_kohya(tensors, base):
    return tensors


def as_peft(tensors, base):
    return {f"base_model.model.{name}": t for name, t in to_peft(tensors).items()}


def as_one_trainer(tensors, base):
    """Dotted, with the text encoder's name."""
    named = {name: peft_path(name.partition(".")[0]) for name in tensors}
    return {
        f"{path.replace('text_encoder.', 'clip_l.')}.{name.partition('.')[2]}": tensors[name]
        for name, path in named.items()
    }


def as_te1(tensors, base):
    return {name.replace("lora_te_", "lora_te1_"): tensor for name, tensor in tensors.items()}


def without_text_model(tensors, base):
    return {name.replace("_text_model_", "_"): tensor for name, tensor in tensors.items()}


def as_lycoris(tensors, base):
    return {name.replace("lora_unet_", "lycoris_"): tensor for name, tensor in tensors.items()}


def as_original(tensors, base):
    found = {}
    for name, tensor in tensors.items():
        key, _, role = name.partition(".")
        found[f"{base.original_names.get(key, key)}.{role}"] = tensor
    return found


def as_comfyui(tensors, base):
    original = as_original(tensors, base)
    return {
        name.replace("lora_unet_", "diffusion_model.").replace(
            "lora_te_", "text_encoders.clip_l.transformer."
        ): tensor
        for name, tensor in original.items()
    }


def by_diffusers(tensors, base):
    """Its convert_state_dict_to_kohya, which takes the rank for alpha."""
    from diffusers.utils import convert_state_dict_to_kohya

    return convert_state_dict_to_kohya(to_peft(tensors))


def as_peft_in_diffusers(tensors, base):
    return to_peft(tensors)


def as_diffusers_once_saved(tensors, base):
    """unet.….lora.down.weight, and of the text encoder lora_linear_layer."""
    found = {}
    for name, tensor in to_peft(tensors).items():
        layer = "lora" if name.startswith("unet") else "lora_linear_layer"
        old = name.replace("lora_A", f"{layer}.down").replace("lora_B", f"{layer}.up")
        found[old] = tensor
    return found


def as_attention_processors(tensors, base):
    """unet.….attn1.processor.to_out_lora.down.weight, and self_attn.to_out_lora of the text."""
    found = {}
    for name, tensor in as_diffusers_once_saved(tensors, base).items():
        old = re.sub(r"(attn[12])\.(to_[qkv]|to_out)(\.0)?\.lora\.", r"\1.processor.\2_lora.", name)
        old = re.sub(r"(q|k|v|out)_proj\.lora_linear_layer\.", r"to_\1_lora.", old)
        found[old] = tensor
    return found


def with_pefts_magnitudes(tensors, base):
    """kohya's names, but <site>.lora_magnitude_vector of outputs."""
    return {
        name.replace("dora_scale", "lora_magnitude_vector"): tensor.flatten()
        if name.endswith("dora_scale")
        else tensor
        for name, tensor in tensors.items()
    }
