"""Attention over keys that do not lie in one piece: each segment on its own with its log-sum-exp, and the exact merge.

A segment is attended to wherever it is stored, with queries turned to its positions if need be; nothing is joined or moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .attention import SCORES_AT_MOST, heads_apart, heads_together, runs
from .choice import by_triton

HALF = (torch.float16, torch.bfloat16)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """[B, G * heads, T, D], [B, heads, L, D] twice -> [B, G * heads, T, D] and log sum exp(q k^T / sqrt(D)), float32 [B, G * heads, T].

    L is at least 1; `G` neighbouring query heads share a key head. In float64 the log-sum-exp is float64 too. On the processor
    16-bit inputs are computed in float32, which is as fast as their own kernels there.
    """
    if q.shape[1] != k.shape[1]:
        out, lse = attention_with_lse(heads_together(q, k.shape[1]), k, v)
        return heads_apart(out, q.shape[1]), heads_apart(lse, q.shape[1])
    if lse_is_fused(q):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
        return out, lse
    if q.device.type == "cpu":
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q.to(wide), k.to(wide), v.to(wide))
        return out.to(q.dtype), lse
    return products_with_lse(q, k, v)


def lse_is_fused(q: Tensor) -> bool:
    """Whether a fused kernel of a GPU returns the log-sum-exp for such queries."""
    return q.device.type == "cuda" and q.dtype in HALF and has_flash(q.device, q.dtype, q.shape[3])


@cache
def has_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch's flash attention, which returns the log-sum-exp, runs here: not every card, build and size of heads. Tried once."""
    x = torch.zeros(1, 1, 1, head_dim, dtype=dtype, device=device)
    return runs(lambda: torch.ops.aten._scaled_dot_product_flash_attention(x, x, x))


def products_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The textbook form of the same, in float32 and in blocks of queries: the scores of one block are all that is held of them."""
    if q.shape[1] != k.shape[1]:
        out, lse = products_with_lse(heads_together(q, k.shape[1]), k, v)
        return heads_apart(out, q.shape[1]), heads_apart(lse, q.shape[1])
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=wide)
    k, v, scale = k.to(wide).transpose(-1, -2), v.to(wide), q.shape[-1] ** -0.5
    block = max(1, SCORES_AT_MOST // (k.shape[0] * k.shape[1] * k.shape[3]))
    for at in range(0, q.shape[2], block):
        scores = q[:, :, at : at + block].to(wide) @ k * scale
        lse[:, :, at : at + block] = total = scores.logsumexp(-1)
        out[:, :, at : at + block] = (scores - total.unsqueeze(-1)).exp() @ v
    return out, lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Of attention over disjoint segments, (output [B, heads, T, D], log-sum-exp [B, heads, T]) each -> attention over all their keys.

    Every segment's share of the whole softmax is known from the log-sum-exps, so this is exact (FlashAttention-2, section 3.1.1
    states the identity). Summed in float32, returned in the dtype of the parts.
    """
    first, _ = parts[0]
    if len(parts) == 1:
        return first

    def call(kernels: Any) -> Tensor | None:
        return kernels.merge(parts) if kernels.serves(parts) else None

    merged = by_triton("merging segments of attention", "segments_triton", first.device, call)
    return merge_by_pytorch(parts) if merged is None else merged


def merge_by_pytorch(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`merge` of at least two."""
    first, _ = parts[0]
    shares = torch.stack([lse for _, lse in parts]).softmax(0)
    whole = shares[0].unsqueeze(-1) * first
    for share, (out, _) in zip(shares[1:], parts[1:], strict=True):
        whole.addcmul_(share.unsqueeze(-1), out.to(whole))
    return whole.to(first.dtype)
