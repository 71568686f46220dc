"""A VAE of its own, for models whose file holds none, or another's: from a file or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.export.diffusers_folder import FILES, read_part, read_tensors
from lorasweep.export.single_file_names import PREFIXES, ModelLayout, modern_name
from lorasweep.models.model_files import ModelError, read_object

if TYPE_CHECKING:
    from torch import Tensor

_SCALE = "scaling_factor"


def read_vae(source: str, layout: ModelLayout, configs: Path) -> Mapping[str, Tensor]:
    """A VAE's tensors by diffusers' names, for a model of this layout and these configs.

    `source` is a file under either names, a VAE's own folder, or the folder of a model. Raises
    ModelError.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        is_model = (path / "vae").is_dir()
        _check_scale(path / "vae" if is_model else path, configs)
        tensors = read_part(path, "vae") if is_model else read_tensors(path / FILES["vae"])
    elif path.exists():
        tensors = read_tensors(path)
    else:
        raise ModelError(f"--vae {source}: no such file or folder on this machine")
    prefix = PREFIXES["vae"]
    if any(name.startswith(prefix) for name in tensors):  # a whole model's file
        tensors = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
    if any(name.startswith("decoder.up_blocks.") for name in tensors):
        found: Mapping[str, Tensor] = {modern_name("vae", n): t for n, t in tensors.items()}
    else:
        weights, _ = layout.to_diffusers({f"{prefix}{n}": t for n, t in tensors.items()})
        found = weights["vae"]
    missing = [name for name in layout.shapes["vae"] if name not in found]
    if missing:
        raise ModelError(
            f"--vae {source}: {len(missing)} of a VAE's {len(layout.shapes['vae'])} tensors are"
            f" missing, first {missing[0]}"
        )
    return {name: found[name] for name in layout.shapes["vae"]}


def _check_scale(folder: Path, configs: Path) -> None:
    """SDXL's VAE has the same shapes, and another scale of its latents."""
    theirs = read_object(folder / "config.json", f"--vae {folder}").get(_SCALE, 0.18215)
    own = read_object(configs / "vae" / "config.json", str(configs)).get(_SCALE, 0.18215)
    if theirs != own:
        raise ModelError(
            f"--vae {folder}: its {_SCALE} is {theirs}, the model's {own}: it is of another family"
        )
