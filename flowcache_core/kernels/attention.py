"""Attention without a mask, by whichever form is fastest on the device at hand."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

SCORES_AT_MOST = 2**26
"""Elements of the score matrix that the product form may hold in memory."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, G * heads, T, D], [B, heads, L, D] twice -> [B, G * heads, T, D].

    `G` neighbouring query heads share a key head (grouped-query attention). PyTorch's fused CPU kernel is slow in bfloat16 on
    processors without AMX; there two matrix products win as long as the scores are small.
    """
    if q.shape[1] != k.shape[1]:
        return heads_apart(attention(heads_together(q, k.shape[1]), k, v), q.shape[1])
    small = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= SCORES_AT_MOST
    if q.device.type == "cpu" and q.element_size() == 2 and small:
        return products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The textbook form: softmax(q k^T / sqrt(D)) v."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def heads_together(q: Tensor, heads: int) -> Tensor:
    """[B, G * heads, T, D] -> [B, heads, G * T, D]: the query heads that share a key head become more queries of that head.

    Without a mask no query knows of another, so this is exact; no key is repeated, and every kernel serves it.
    """
    if q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} query heads cannot share {heads} key heads evenly: their number must be a multiple of {heads}")
    return q.unflatten(1, (heads, -1)).flatten(2, 3)


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """Back again, of anything that there is per query: [B, key heads, G * T, ...] -> [B, heads, T, ...]."""
    return x.unflatten(2, (heads // x.shape[1], -1)).flatten(1, 2)
