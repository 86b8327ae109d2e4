"""A causal Wan network small enough for tests, with random weights, and the forms in which such networks are published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2

TEXT_DIM = 64
TO_HOST = {"config": '{"transformer": {"causal_ar": true}}'}
"""Metadata by which ComfyUI knows a causal model."""
Weights = Mapping[str, Tensor]


def tiny_causal(seed: int = 0, layers: int = 2, text_dim: int = TEXT_DIM, dim: int = 256) -> SkyReelsV2:
    torch.manual_seed(seed)
    network = SkyReelsV2(SkyReelsConfig(dim, 2 * dim, layers, text_dim))
    for name, p in network.named_parameters():
        nn.init.normal_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.05 if p.ndim > 1 else 0.02)
    return network.eval().requires_grad_(False)


def training_state(weights: Weights) -> dict[str, Any]:
    """As Self-Forcing and Causal-Forcing publish: the network twice, of which the average is better, and more."""
    raw = {f"model.{key}": torch.zeros_like(weight) for key, weight in weights.items()}
    return {"generator": raw, "generator_ema": fully_sharded(weights), "critic": {"model.x": torch.zeros(2)}, "step": 600, "betas": (0.0, 0.999)}


def fully_sharded(weights: Weights) -> dict[str, Tensor]:
    """Wrapped as a whole and block by block."""
    return {f"model._fsdp_wrapped_module.{_wrapped(key)}": weight for key, weight in weights.items()}


def _wrapped(key: str) -> str:
    parts = key.split(".")
    return ".".join([*parts[:2], "_fsdp_wrapped_module", *parts[2:]]) if parts[0] == "blocks" else key


PUBLISHED: dict[str, Callable[[Weights], Any]] = {
    "training state": training_state,
    "one generator": lambda weights: {"generator": {f"model.{key}": weight for key, weight in weights.items()}},
    "averaged and sharded": lambda weights: {"generator_ema": fully_sharded(weights)},
    "compiled": lambda weights: {"generator": {f"model._orig_mod.{key}": weight for key, weight in weights.items()}},
}
"""Layouts of .pt files that say what they are."""
SILENT: dict[str, Callable[[Weights], Any]] = {
    "plain": dict,
    "model": lambda weights: {f"model.{key}": weight for key, weight in weights.items()},
    "of a host": lambda weights: {f"model.diffusion_model.{key}": weight for key, weight in weights.items()},
}
"""Layouts that do not."""
