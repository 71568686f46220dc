"""One module's tensors of every type of LoRA file, random: (site, draw) -> kohya's names."""

import torch


def normal(generator, *shape):
    return 0.1 * torch.randn(shape, generator=generator)


def lora(site, draw, rank=4, alpha=2.0):
    kernel = (1, 1) if site.is_conv else ()
    return {
        "lora_down.weight": normal(draw, rank, *site.weight.shape[1:]),
        "lora_up.weight": normal(draw, site.weight.shape[0], rank, *kernel),
        "alpha": torch.tensor(alpha),
    }


def mixed(site, draw):
    """kohya's block_dims and conv_alpha: ranks and alphas of many sizes."""
    return lora(site, draw, rank=3 + len(site.key) % 3, alpha=1.0 + len(site.key) % 4)


def tucker(site, draw):
    if not site.is_conv:
        return lora(site, draw)
    out, width, *kernel = site.weight.shape
    return {
        "lora_down.weight": normal(draw, 3, width, 1, 1),
        "lora_mid.weight": normal(draw, 3, 3, *kernel),
        "lora_up.weight": normal(draw, out, 3, 1, 1),
        "alpha": torch.tensor(2.0),
    }


def dora(site, draw, alpha=2.0):
    norms = site.weight.flatten(1).norm(dim=1) * 1.2
    return {
        **lora(site, draw, alpha=alpha),
        "dora_scale": norms.reshape(-1, *[1] * (site.weight.dim() - 1)),
    }


def dora_here_and_there(site, draw):
    return dora(site, draw) if sum(map(ord, site.key)) % 2 else mixed(site, draw)


def dora_of_inputs(site, draw):
    norms = site.weight.transpose(0, 1).flatten(1).norm(dim=1) * 1.05
    shape = (1, -1, *[1] * (site.weight.dim() - 2))
    return {**lora(site, draw), "dora_scale": norms.reshape(shape)}


def loha(site, draw, rank=2):
    out, width = site.weight.flatten(1).shape
    return {
        name: 3 * normal(draw, *((out, rank) if name.endswith("a") else (rank, width)))
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    } | {"alpha": torch.tensor(float(rank))}


def lokr(site, draw):
    out, width = site.weight.shape[:2]
    return {
        "lokr_w1": normal(draw, 2, 2),
        "lokr_w2": normal(draw, out // 2, width // 2, *site.weight.shape[2:]),
        "alpha": torch.tensor(2.0),
    }


def dora_of_loha(site, draw):
    return {**loha(site, draw), "dora_scale": dora(site, draw)["dora_scale"]}
