"""Dense attention over many chunks at once: what training and the upstream-like baseline use. `kv/cache.py` has the cached way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.attention import attention


def bidirectional(layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Every token sees every token. [B, heads, T, D] three times -> [B, heads, T, D]."""
    return attention(q, k, v)


class BlockCausal:
    """A chunk sees itself and the `window` - 1 chunks before it; `ends`: token index at which each chunk ends."""

    def __init__(self, ends: Sequence[int], window: int | None = None) -> None:
        self.ends, self.window = tuple(ends), window or len(ends)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        starts = (0, *self.ends[:-1])
        parts = []
        for chunk, (a, b) in enumerate(zip(starts, self.ends, strict=True)):
            first = starts[max(0, chunk - self.window + 1)]
            parts.append(attention(q[:, :, a:b], k[:, :, first:b], v[:, :, first:b]))
        return torch.cat(parts, 2)
