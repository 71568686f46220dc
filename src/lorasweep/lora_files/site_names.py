"""What a tensor's name in a LoRA file means, whichever program gave it: its site, and its role.

kohya:       lora_unet_down_blocks_0_…_attn1_to_q.lora_down.weight; of SDXL lora_unet_input_blocks_…
LyCORIS:     the same, and lycoris_down_blocks_0_…
diffusers:   unet.down_blocks.0.….attn1.to_q.lora_A.weight, …attn1.processor.to_q_lora.down.weight;
             its convert_state_dict_to_kohya says lora_te1_ for SD1.x's only text encoder
PEFT:        base_model.model.down_blocks.0.….attn1.to_q.lora_A.weight
OneTrainer:  unet.input_blocks.1.1.….attn1.to_q.lora_down.weight, clip_l.text_model.…
ComfyUI:     diffusion_model.input_blocks.1.1.….attn1.to_q.lora_up.weight, text_encoders.clip_l.…

They differ in dots and underscores, in what stands before a part's modules, in the layout of the
UNet, and in what stands behind a module. So a name is cut into module and role (`_ROLE`), the
module's path is flattened, its part is told by what it begins with (`_BEGINNINGS`), and the
original layout's blocks are counted out (`diffusers_path`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

ROLES = {
    "lora": {"lora_down.weight", "lora_up.weight", "lora_mid.weight"},
    "loha": {f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "lokr": {f"lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "full": {"diff"},
    "norm": {"w_norm", "b_norm"},
    "bias": {"diff_b"},
    "oft": {"oft_diag", "oft_blocks", "rescale"},
    "glora": {f"{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm")},
    "ia3": {"on_input", "weight"},
    "tlora": {"q_layer.weight", "p_layer.weight", "lambda_layer"},
}
"""kohya's and LyCORIS's names of a site's tensors, by algorithm (`weight_deltas.algorithm`)."""
BESIDE = {"alpha", "dora_scale", "diff_b"}
"""What may stand beside any of them."""

_PLAIN = "|".join(
    re.escape(role) for role in sorted({*BESIDE}.union(*ROLES.values()), key=len, reverse=True)
)
_ROLE = re.compile(
    r"^(?P<path>.+?)(?:"
    r"(?:_lora|\.lora|\.lora_linear_layer)\.(?P<side>down|up)\.weight"
    r"|\.(?P<peft>lora_A|lora_B|lora_magnitude_vector)(?:\.(?!weight$|bias$)[\w-]+)?"
    r"(?:\.(?P<of>weight|bias))?"
    rf"|\.(?P<plain>{_PLAIN})(?:\.(?!weight$)[\w-]+)?"  # PEFT's state_dict has the adapter's name
    r")$"
)
_PEFT_ROLES = {
    ("lora_A", "weight"): "lora_down.weight",
    ("lora_B", "weight"): "lora_up.weight",
    ("lora_B", "bias"): "lora_up.bias",
    ("lora_magnitude_vector", "weight"): "dora_scale",
    ("lora_magnitude_vector", None): "dora_scale",
}
UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
_WRAPPERS = ("base_model_model_", "lycoris_")
_BEGINNINGS = {
    "lora_unet_": UNET,
    "unet_": UNET,
    "diffusion_model_": UNET,
    "model_diffusion_model_": UNET,
    "lora_te_": TEXT,
    "lora_te1_": TEXT,
    "lora_te2_": TEXT_2,
    "text_encoder_2_": TEXT_2,
    "text_encoder_": TEXT,
    "text_encoders_clip_l_transformer_": TEXT,
    "text_encoders_clip_h_transformer_": TEXT,
    "text_encoders_clip_g_transformer_": TEXT_2,
    "clip_l_": TEXT,
    "clip_h_": TEXT,
    "clip_g_": TEXT_2,
}
_UNET_ROOTS = (
    *("down_blocks_", "mid_block_", "up_blocks_", "conv_in", "conv_out", "conv_norm_out"),
    *("time_embedding_", "add_embedding_", "input_blocks_", "middle_block_", "output_blocks_"),
    *("time_embed_", "label_emb_"),
)
_TEXT_ROOTS = ("text_model_", "encoder_layers_", "final_layer_norm", "text_projection")
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

_ORIGINAL_OUTER = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
_ORIGINAL_BLOCK = re.compile(
    r"(?:(?P<way>input|output)_blocks_(?P<block>\d+)|middle_block)_(?P<place>\d+)_(?P<inner>\w+)"
)
_ORIGINAL_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_FAMILIES = (
    (r"token_refiner|double_blocks_\d+_(img|txt)_mlp_fc", "HunyuanVideo"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"single_transformer_blocks_|(^|_)(double|single)_blocks_\d+_", "Flux"),
    (r"joint_blocks_\d+_", "Stable Diffusion 3"),
    (r"transformer_blocks_\d+_(img|txt)_(mlp|mod)", "Qwen-Image"),
    (r"transformer_blocks_\d+_attn_", "Stable Diffusion 3"),
    (r"_prior_(unet|te)", "Stable Cascade"),
    (r"(unet|transformer|model)_blocks_\d+_(cross|self)_attn_(q|k|v|o|norm)", "Wan"),
    (r"(noise|context)_refiner|_layers_\d+_attention_", "Lumina or Z-Image"),
    (r"(^|lora_)transformer_", "a diffusion transformer"),
)
"""Other families by what their modules are called, the most telling first."""
_FLUX_WIDTH = 3072


@dataclass(frozen=True)
class Name:
    """The meaning of a tensor's name."""

    part: str | None
    """unet, text_encoder or text_encoder_2; None where it is no name of Stable Diffusion's."""
    path: str
    """The module's path in its part, flattened, text_model_ left out; of the UNet in the file's
    own layout."""
    role: str
    """kohya's name below the site, or `lora_up.bias`."""
    dotted: str
    """The path as PEFT's config knows it, with dots."""
    flat: str
    """The whole path with its beginning, flattened."""

    def key(self, *, is_sdxl: bool = False, layers: int | None = None) -> str:
        """kohya's name of the site.

        Of the original layout it is diffusers', where the UNet's `layers`, its residual blocks of a
        level, are given: kohya has that layout for SDXL alone.
        """
        if self.part is None:
            return self.flat if self.flat.startswith("lora_") else f"lora_{self.flat}"
        if self.part == UNET:
            path = self.path if layers is None else diffusers_path(self.path, layers)
            return f"lora_unet_{path}"
        number = "2" if self.part == TEXT_2 else "1" if is_sdxl else ""
        level = "" if self.path == "text_projection" else "text_model_"
        return f"lora_te{number}_{level}{self.path}"


@cache
def parsed(name: str) -> Name | None:
    """What a name means; None for one that is of no adapter's tensor."""
    match = _ROLE.match(name)
    if match is None:
        return None
    role = match["plain"] or (match["side"] and f"lora_{match['side']}.weight")
    role = role or _PEFT_ROLES.get((match["peft"], match["of"]))
    if role is None:
        return None
    dotted = match["path"].removeprefix("base_model.model.")
    flat = match["path"].replace(".processor.", ".").replace(".", "_")
    for wrapper in _WRAPPERS:
        flat = flat.removeprefix(wrapper)
    beginning = next((b for b in sorted(_BEGINNINGS, reverse=True) if flat.startswith(b)), "")
    part, path = _BEGINNINGS.get(beginning), flat.removeprefix(beginning)
    if part is None:
        part = UNET if flat.startswith(_UNET_ROOTS) else None
        part = TEXT if flat.startswith(_TEXT_ROOTS) else part
    elif dotted == match["path"]:
        dotted = re.sub(r"^(unet|text_encoder|text_encoder_2)\.", "", dotted)
    return Name(part, _modern(part, path) if part else path, role, dotted, flat)


def _modern(part: str, path: str) -> str:
    """Attention as diffusers names it today."""
    if part == UNET:
        return f"{path}_0" if path.endswith("_to_out") else path
    path = path.removeprefix("text_model_")
    for old, new in _OLD_TEXT.items():
        if path.endswith(f"self_attn_{old}"):
            return path.removesuffix(old) + new
    return path


def diffusers_path(path: str, layers: int) -> str:
    """A UNet module's flattened path in diffusers' layout, of one in either layout."""
    if path in _ORIGINAL_OUTER:
        return _ORIGINAL_OUTER[path]
    match = _ORIGINAL_BLOCK.fullmatch(path)
    if match is None:
        return path
    inner, place = match["inner"], int(match["place"])
    resnet = _ORIGINAL_RESNET.get(inner)
    if match["way"] is None:  # a residual block, attention, a residual block
        return (
            f"mid_block_resnets_{place // 2}_{resnet}"
            if resnet
            else f"mid_block_attentions_0_{inner}"
        )
    side = "down" if match["way"] == "input" else "up"
    first = 1 if side == "down" else 0  # input block 0 is conv_in
    level, number = divmod(int(match["block"]) - first, layers + 1)
    block = f"{side}_blocks_{level}"
    if resnet:
        return f"{block}_resnets_{number}_{resnet}"
    if inner == ("op" if side == "down" else "conv"):
        return f"{block}_{side}samplers_0_conv"
    return f"{block}_attentions_{number}_{inner}"


def family(names: dict[str, tuple[int, ...]]) -> str | None:
    """Which other family than Stable Diffusion 1.x, 2.x and SDXL a file is of, by names and shapes.

    None where nothing speaks of another. Without its single blocks Flux is told from Stable
    Diffusion 3 by its width.
    """
    flat = {name.replace(".", "_"): shape for name, shape in names.items()}
    for pattern, found in _FAMILIES:
        mark = re.compile(pattern)
        shapes = [shape for name, shape in flat.items() if mark.search(name)]
        if shapes:
            is_wide = any(len(shape) == 2 and _FLUX_WIDTH in shape for shape in shapes)
            return "Flux" if found == "Stable Diffusion 3" and is_wide else found
    return None
