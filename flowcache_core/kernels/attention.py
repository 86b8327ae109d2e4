"""Attention without a mask, by whichever form is fastest on the device at hand."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

SCORES_AT_MOST = 2**26
"""Elements of the score matrix that the product form may hold in memory."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, heads, T, D], [B, heads, L, D] twice -> [B, heads, T, D].

    PyTorch's fused CPU kernel is slow in bfloat16 on processors without AMX; there two matrix products win as long as the
    scores are small.
    """
    small = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= SCORES_AT_MOST
    if q.device.type == "cpu" and q.element_size() == 2 and small:
        return products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The textbook form: softmax(q k^T / sqrt(D)) v."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
