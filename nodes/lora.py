"""A LoRA as training publishes it, such as that of LongLive: a .pt file whose names the host does not read. Names that the host reads by itself, such
as those of kohya, are left to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.lora
import folder_paths

from ..flowcache_core.models.lora_names import lora_names
from ..flowcache_core.models.shards import open_checkpoint

NONE, FOLDER = "none", "loras"
TWICE, ONCE = "lora_unet__", "lora_unet_"
"""How the names of kohya begin in LoRAs for Wan-Fun, and elsewhere."""


def lora_files() -> list[str]:
    return [NONE, *folder_paths.get_filename_list(FOLDER)]


def with_lora(model: Any, name: str) -> Any:
    """A clone of a MODEL with the LoRA at full strength. Raises ValueError for a file with a layer that is not in the model, or with none."""
    checkpoint = open_checkpoint(Path(folder_paths.get_full_path_or_raise(FOLDER, name)))
    layers = comfy.lora.model_lora_keys_unet(model.model, {})
    names = {key: f"diffusion_model.{name}" for key, name in lora_names(checkpoint.stored).items()}
    names |= {key: kohya for key in names if (kohya := key.replace(TWICE, ONCE)).split(".")[0] in layers}
    weights = {names[key]: tensor for key, tensor in checkpoint.tensors(names)}
    patches = comfy.lora.load_lora(weights, layers, log_missing=False)
    known = {layer for patch in patches.values() for layer in getattr(patch, "loaded_keys", ())}
    if strange := sorted(weights.keys() - known):
        first = strange[0].removeprefix("diffusion_model.")
        raise ValueError(
            f"{name}: {len(strange)} of {len(weights)} tensors are for no layer of this model, such as {first}: "
            "it is no LoRA, or one for another model; choose another"
        )
    patched = model.clone()
    patched.add_patches(patches)
    return patched
