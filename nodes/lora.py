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
DIFFERENCES = ("diff", "diff_b", "w_norm", "b_norm", "set_weight")
"""How keys end that hold a whole weight or bias, or its change."""
MODULATION = ".diff_m"
"""How lightx2v ends keys that hold the change of a block's `modulation`. The host patches no weights of modules that have modules within."""


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
    known |= {key for key in weights for layer, _, kind in [key.rpartition(".")] if layer in layers and kind in DIFFERENCES}
    if modulations := [key for key in weights if key.endswith(MODULATION)]:
        raise ValueError(
            f"{name}: {len(modulations)} of {len(weights)} tensors are changes of modulations ({MODULATION}), which ComfyUI puts on no model of this "
            "kind, so that the film would be of a part of the LoRA: use one without them"
        )
    if strange := sorted(weights.keys() - known):
        first = strange[0].removeprefix("diffusion_model.")
        raise ValueError(
            f"{name}: {len(strange)} of {len(weights)} tensors are for no layer of this model, such as {first}: "
            "it is no LoRA, or one for another model; choose another"
        )
    patched = model.clone()
    patched.add_patches(patches)
    return patched
