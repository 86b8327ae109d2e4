"""How alike keys are, by the cosine between them: with the sum of all, or pair by pair in bounded blocks.

A key of length 0 has no direction: it is alike to none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

NUMBERS_AT_MOST = 2**25
"""Numbers of an intermediate result that are in memory at a time; at least those of one key."""
TINY = 1e-8


def directions(k: Tensor) -> Tensor:
    """u = k / (|k| + 1e-8): [..., D] -> float32 [..., D]."""
    k = k.float()
    return k / (torch.linalg.vector_norm(k, dim=-1, keepdim=True) + TINY)


def mean_similarity(k: Tensor, at_most: int = NUMBERS_AT_MOST) -> Tensor:
    """r_j = 1/N sum_{i != j} cos(k_i, k_j): [B, H, N, D] -> float32 [B, H, N].

    In time and memory linear in N: r_j = (u_j . S - |u_j|^2) / N with S the sum of all directions. |u_j|^2 is subtracted and
    not 1, which would be wrong by 1/N for a key of length 0.
    """
    total = _total(k, at_most)
    parts = [(u @ total[..., None]).squeeze(-1) - (u * u).sum(-1) for u in _blocks(k, at_most)]
    return torch.cat(parts, 2) / k.shape[2]


def cosine_to_mean(k: Tensor, at_most: int = NUMBERS_AT_MOST) -> Tensor:
    """cos(k_j, mean_i u_i): [B, H, N, D] -> float32 [B, H, N]."""
    mean = directions(_total(k, at_most))[..., None]
    return torch.cat([(u @ mean).squeeze(-1) for u in _blocks(k, at_most)], 2)


def mean_similarity_but_to_newest(k: Tensor, threshold: float, at_most: int = NUMBERS_AT_MOST) -> Tensor:
    """1/N sum_i c_ij, c_ij = cos(k_i, k_j), but 0 where j = i or where j is the newest key with c_ij > threshold.

    [B, H, N, D] -> float32 [B, H, N]. R-KV's rule: of keys that repeat each other the newest is not held against itself. It
    has no linear form; pairs are compared in blocks of keys i, in time N^2.
    """
    batch, heads, n, _ = k.shape
    order, sums = torch.arange(n, device=k.device), []
    for head in k.flatten(0, 1):
        u, column, start = directions(head), k.new_zeros(n, dtype=torch.float32), 0
        for some in u.split(max(1, at_most // n)):
            c = some @ u.mT
            c.diagonal(start).zero_()
            newest = torch.where(c > threshold, order, -1).amax(-1, keepdim=True)
            column += c.masked_fill_(order == newest, 0).sum(0)
            start += len(some)
        sums.append(column)
    return torch.stack(sums).view(batch, heads, n) / n


def _blocks(k: Tensor, at_most: int) -> Iterator[Tensor]:
    """Directions of [B, H, N, D], some keys of all heads at a time."""
    batch, heads, _, d = k.shape
    return (directions(part) for part in k.split(max(1, at_most // (batch * heads * d)), 2))


def _total(k: Tensor, at_most: int) -> Tensor:
    total = k.new_zeros(*k.shape[:2], k.shape[3], dtype=torch.float32)
    for u in _blocks(k, at_most):
        total += u.sum(2)
    return total
