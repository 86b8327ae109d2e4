"""Recognises the network in a checkpoint by its shapes, loads it strictly, and refuses everything else with a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .key_names import PREFIXES as PREFIXES
from .key_names import original_names
from .quantised import MARKER, Shaped, is_companion, plain_shapes, restored, scale_key
from .shards import open_checkpoint
from .shards import read as read
from .skyreels import PATCH, SkyReelsConfig, SkyReelsV2

RELEASES = {
    (1536, 8960, 30, True): "SkyReels-V2-DF 1.3B",
    (5120, 13824, 40, False): "SkyReels-V2-DF 14B (540P and 720P have the same shapes)",
}
"""(width, width of the feed-forward layer, layers, frame-rate tensors) -> what was released with these sizes."""

STRANGERS = {
    "lora_": "a LoRA: put it into models/loras and connect Load LoRA behind Load AR Video Model",
    "videodit_blocks.": "a MAGI-1 checkpoint: this loader knows SkyReels-V2 diffusion forcing only",
    "vace_": "a VACE checkpoint: this loader knows SkyReels-V2 diffusion forcing only",
    "control_adapter.": "a camera-control checkpoint: this loader knows SkyReels-V2 diffusion forcing only",
    "face_adapter.": "a Wan Animate checkpoint: this loader knows SkyReels-V2 diffusion forcing only",
    "double_blocks.": "a Flux or Hunyuan checkpoint: this loader knows SkyReels-V2 diffusion forcing only",
    "encoder.block.": "a T5 text encoder: put it into models/text_encoders and use Load CLIP (type wan)",
    "encoder.downsamples.": "a VAE: put it into models/vae and use Load VAE",
}
"""Part of a key -> what a file with such a key is."""
IMAGE_KEYS = ("img_emb.", ".k_img.", ".add_k_proj.", "image_embedder.")


def without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of the released checkpoints, whatever layout or wrapper they were saved from."""
    return {name: weights[key] for key, name in original_names(weights, (MARKER,)).items()}


def skyreels_config(weights: Mapping[str, Shaped], name: str) -> SkyReelsConfig:
    """The sizes of the network in `weights`: original name -> tensor, or slot of a file.

    Raises ValueError unless every key and shape fits, and nothing is left over.
    """
    shapes = plain_shapes(weights)
    _refuse_strangers(shapes, name)
    try:
        config = SkyReelsConfig.from_shapes(shapes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in SkyReelsV2(config).state_dict().items()}
    missing, extra = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    if missing or extra:
        parts = [f"{len(keys)} {what} ({_first(keys)})" for keys, what in ((missing, "missing"), (extra, "unknown")) if keys]
        raise ValueError(f"{name} is not a complete SkyReels-V2 diffusion-forcing checkpoint: {' and '.join(parts)} of {len(wanted)} keys")
    wrong = [k for k in wanted if wanted[k] != shapes[k]]
    if wrong:
        key = wrong[0]
        more = f"; so have {len(wrong) - 1} more keys another shape: are the files of one model?" if len(wrong) > 1 else ""
        raise ValueError(f"{name}: {key} has shape {shapes[key]}, but a network of width {config.dim} needs {wanted[key]}{more}")
    if (config.dim, config.ffn_dim, config.layers, not config.fps) in RELEASES and not config.fps:
        raise ValueError(
            f"{name} has the sizes of SkyReels-V2-DF 1.3B but not its frame-rate tensors (fps_embedding, fps_projection): "
            "it is Wan 2.1 or a model made from it, which has not learnt a noise level per chunk, or a repack that lost them"
        )
    return config


def release_of(config: SkyReelsConfig) -> str:
    """What was published with these sizes, or the sizes."""
    sizes = f"{config.layers} layers of width {config.dim}, {'with' if config.fps else 'without'} frame rate"
    return RELEASES.get((config.dim, config.ffn_dim, config.layers, config.fps), sizes)


def load_skyreels(weights: Mapping[str, Tensor], name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> SkyReelsV2:
    """Strictly loaded, in evaluation mode, with plain torch layers. Scaled fp8 weights are written out in `dtype`."""
    config = skyreels_config(weights, name)
    scales = {k: weights[k] for k in weights if is_companion(k, weights.keys())}
    return _filled(config, ((k, v) for k, v in weights.items() if k not in scales), scales, dtype, torch.device(device))


def load_skyreels_file(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> SkyReelsV2:
    """A file, any file of a set, or a folder -> the network; `dtype` None keeps that of the file.

    Refusals come before a tensor is read. Then file after file is read: what keeps its dtype and place stays mapped, and
    the peak of memory is that of the network and one file.
    """
    checkpoint = open_checkpoint(path)
    names = original_names(checkpoint.slots, (MARKER,))
    slots = {names[key]: slot for key, slot in checkpoint.slots.items() if key in names}
    config = skyreels_config(slots, checkpoint.name)
    aside = [key for key, name in names.items() if is_companion(name, slots.keys())]
    scales = {names[key]: tensor for key, tensor in checkpoint.tensors(aside)}
    values = ((names[key], tensor) for key, tensor in checkpoint.tensors(names.keys() - set(aside)))
    return _filled(config, values, scales, dtype, torch.device(device))


def _filled(config: SkyReelsConfig, weights: Iterator[tuple[str, Tensor]], scales: Mapping[str, Tensor], dtype: torch.dtype | None,
            device: torch.device) -> SkyReelsV2:  # fmt: skip
    state: dict[str, Tensor] = {}
    for key, weight in weights:
        scale = scale_key(key, scales.keys())
        state[key] = restored(key, weight, scales[scale] if scale else None, dtype).to(device)
    with torch.device("meta"):
        network = SkyReelsV2(config, dtype=dtype or state["blocks.0.self_attn.q.weight"].dtype)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _refuse_strangers(shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    for part, what in STRANGERS.items():
        if any(part in key for key in shapes):
            raise ValueError(f"{name} is {what}")
    takes, gives = shapes.get("patch_embedding.weight", (0, 0))[1], shapes.get("head.head.weight", (0,))[0] // PATCH**2
    image = next((key for key in shapes if any(part in key for part in IMAGE_KEYS)), None)
    if image or (takes and gives and takes != gives):
        why = f"it has {image}" if image else f"it takes {takes} channels and gives {gives}"
        raise ValueError(
            f"{name} is an image-to-video or control checkpoint ({why}): SkyReels-V2 diffusion forcing needs no such weights, "
            "it takes the first frames as finished latents; load a SkyReels-V2-DF checkpoint"
        )


def _first(keys: list[str]) -> str:
    return f"{', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
