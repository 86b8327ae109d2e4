"""The one top-k: which slots of history stay."""

from __future__ import annotations

import torch
from torch import Tensor


def select(scores: Tensor, keep: int, protected: Tensor, groups: Tensor | None = None, count: int = 0) -> Tensor:
    """-> int64 [B, keep], ascending: the slots with the highest scores, of equal ones the newer.

    scores: float32 [B, N], the newest slot last; `protected`: bool [B, N], these stay first of all, whatever the others score;
    `groups`: int64 [B, N], below `count`: slots of one group (a frame, a chunk) share the mean of their scores, so that they stay
    or go together wherever `keep` allows it.
    """
    if groups is not None:
        scores = _shared(scores, groups, count)
    scores = torch.where(protected, torch.inf, scores.nan_to_num())
    newest_first = torch.sort(scores.flip(1), dim=1, descending=True, stable=True).indices[:, :keep]
    return (scores.shape[1] - 1 - newest_first).sort(1).values


def _shared(scores: Tensor, groups: Tensor, count: int) -> Tensor:
    """Every slot's score becomes the mean over its group. On CUDA nobody knows in which order slots are added up, so that is done in float64: its
    error is beyond what the mean is rounded to."""
    total = scores.new_zeros(len(scores), count, dtype=torch.float64).scatter_add_(1, groups, scores.double())
    sizes = scores.new_zeros(len(scores), count).scatter_add_(1, groups, torch.ones_like(scores))
    return (total / sizes.clamp(min=1)).to(scores.dtype).gather(1, groups)
