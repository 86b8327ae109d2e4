"""Attention in pieces: over disjoint segments of keys, put together by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (s.softmax(-1) @ v.float()).to(q.dtype), s.logsumexp(-1)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    lse = torch.stack([p[1] for p in parts])
    w = (lse - lse.logsumexp(0)).exp()[..., None]
    return (w * torch.stack([p[0].float() for p in parts])).sum(0).to(parts[0][0].dtype)
