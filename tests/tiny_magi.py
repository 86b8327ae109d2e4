"""MAGI-1 networks small enough for tests, with random weights."""

from __future__ import annotations

import torch
from torch import nn

from flowcache_core.models.magi import Magi, MagiConfig

PLAIN = MagiConfig(64, 96, 2, 1, head_dim=32, text_dim=12, caption=60)
"""As 4.5B: two query heads share a key head."""
GATED = MagiConfig(128, 80, 2, 2, head_dim=32, channels=32, text_dim=12, caption=60, gated=True)
"""As 24B."""


def tiny_magi(config: MagiConfig = PLAIN, seed: int = 0) -> Magi:
    torch.manual_seed(seed)
    network = Magi(config)
    for name, p in network.named_parameters():
        nn.init.normal_(p, std=0.5 if "norm" in name else 0.2)
    with torch.no_grad():
        network.rope.bands.copy_(10000 ** (-torch.arange(config.bands) / config.bands))
    return network.eval().requires_grad_(False)
