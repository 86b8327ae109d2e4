"""Reads checkpoint files and refuses, with a sentence, what is not exactly the expected network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .skyreels import SkyReelsConfig, SkyReelsV2

PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file -> tensors and metadata. Raises ValueError for a missing, foreign or truncated file."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        size = Path(path).stat().st_size
        raise ValueError(f"{Path(path).name} ({size} bytes) is not a whole safetensors file: {error}; download it again") from error


def without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original key names, whatever wrapper the file was saved from."""
    for prefix in PREFIXES:
        if f"{prefix}patch_embedding.weight" in weights:
            return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    return dict(weights)


def skyreels_config(weights: Mapping[str, Tensor], name: str) -> SkyReelsConfig:
    """The sizes of the network in `weights`. Raises ValueError unless every key and shape fits, and nothing is left over."""
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    try:
        config = SkyReelsConfig.from_shapes(shapes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in SkyReelsV2(config).state_dict().items()}
    missing, extra = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    if missing or extra:
        parts = [
            f"{len(keys)} {what} ({keys[0]}{', ...' if len(keys) > 1 else ''})" for keys, what in ((missing, "missing"), (extra, "unknown")) if keys
        ]
        raise ValueError(f"{name} is not a complete SkyReels-V2 diffusion-forcing checkpoint: {' and '.join(parts)} of {len(wanted)} keys")
    wrong = [k for k in wanted if wanted[k] != shapes[k]]
    if wrong:
        key = wrong[0]
        raise ValueError(f"{name}: {key} has shape {shapes[key]}, but a network of width {config.dim} needs {wanted[key]}")
    return config


def load_skyreels(weights: Mapping[str, Tensor], name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> SkyReelsV2:
    """Strictly loaded, in evaluation mode, with plain torch layers."""
    config = skyreels_config(weights, name)
    with torch.device("meta"):
        network = SkyReelsV2(config, dtype=dtype)
    network.load_state_dict({k: v.to(device, dtype) for k, v in weights.items()}, assign=True)
    return network.eval().requires_grad_(False)
