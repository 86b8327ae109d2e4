"""The layers that a LoRA from training is for, under the names of the released checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

from .causal_wan_checkpoint import MODEL, WRAPPERS
from .key_names import from_diffusers

PARTS = ("generator_lora.", "generator_ema.", "generator.")
"""Parts of a training state that hold it; others are those of critics."""
HOLDERS = ("base_model.model.", MODEL, "diffusion_model.", "transformer.")
"""What PEFT, training, hosts and Diffusers write before the name of a layer."""
DIFFUSERS = (".attn1.", ".attn2.", ".ffn.net.")
"""Parts of names that only Diffusers gives."""
DEFAULT = ".default."
"""How PEFT calls its first LoRA, in the middle of a key."""


def lora_names(keys: Iterable[str]) -> dict[str, str]:
    """Key in the file -> LAYER.lora_A.weight and the like, without the names of training around it; keys of other parts are left out."""
    names = {key: key for key in keys}
    if part := next((part for part in PARTS if any(key.startswith(part) for key in names)), ""):
        names = {key: key.removeprefix(part) for key in names if key.startswith(part)}
    plain = {key: _plain(name) for key, name in names.items()}
    if any(part in name for name in plain.values() for part in DIFFUSERS):
        return {key: from_diffusers(name) for key, name in plain.items()}
    return plain


def _plain(name: str) -> str:
    name = WRAPPERS.sub("", name).replace(DEFAULT, ".")
    for holder in HOLDERS:
        name = name.removeprefix(holder)
    return name
