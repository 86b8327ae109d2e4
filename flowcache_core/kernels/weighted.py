"""Attention in which some keys count for several each, in one call: their log-weights are added to the logits as one row for all queries.

The row [1, 1, 1, L] is broadcast inside the kernel, so nothing as large as the scores is made. `segments.py` has the other form, which
leaves the keys where they are.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import as_products, attention, heads_apart, heads_together
from .segments import lse_is_fused

ONE_CALL_FROM = 2**11
"""Scores of a head from which the processor makes one call. Below, a call is over in microseconds either way, and films that small keep every bit
that segments gave them."""


def in_one_call(q: Tensor, k: Tensor, weight: float, fewer_keys: bool) -> bool:
    """Whether attention to keys of which some lie too far away, or count for exp(`weight`) each, is faster in one call than in segments.

    `fewer_keys`: whether no more keys would have to be turned than queries otherwise. On the processor one call was faster from 16 queries on, the
    least that was measured. On CUDA flash attention takes no row of log-weights, but gives the log-sum-exp, so there the weights are those of
    segments.
    """
    if q.device.type == "cpu":
        return q.shape[2] * k.shape[2] >= ONE_CALL_FROM
    return fewer_keys and not (weight and lse_is_fused(q))


def weighted(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, weight: float) -> Tensor:
    """[B, G * heads, T, D], [B, heads, L, D] twice -> [B, G * heads, T, D]: `attention` as if keys `start`..`end` were there exp(`weight`) times."""
    if not weight or start >= end:
        return attention(q, k, v)
    if q.shape[1] != k.shape[1]:
        return heads_apart(weighted(heads_together(q, k.shape[1]), k, v, start, end, weight), q.shape[1])
    by_products = as_products(q, k)
    wide = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" and not by_products else q.dtype
    row = _row(k.shape[2], start, end, weight, wide, q.device)
    return _products(q, k, v, row) if by_products else F.scaled_dot_product_attention(q, k, v, attn_mask=row)


@lru_cache(maxsize=16)
def _row(length: int, start: int, end: int, weight: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Log-weights [1, 1, 1, length]. Softmax knows only their differences, so what rounding takes from the weight is taken from the others too, for
    which the dtype has bits to spare: in bfloat16 a weight of 4 alone would be one of 3.986."""
    rounded = torch.tensor(weight, dtype=dtype).item()
    row = torch.full((1, 1, 1, length), rounded - weight, dtype=dtype, device=device)
    row[..., start:end] = rounded
    return row


def _products(q: Tensor, k: Tensor, v: Tensor, row: Tensor) -> Tensor:
    """`attention.products` with the row added by the first product itself."""
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    scores = torch.baddbmm(row[0].expand(len(q), q.shape[1], k.shape[1]), q, k.mT, alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, v.shape[:2])
