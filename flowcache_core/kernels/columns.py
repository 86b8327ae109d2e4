"""How much attention every key is given: the column sums of a softmax that is never held whole.

The scores are made for a block of queries at a time, so their memory is bounded whatever the length of the film.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .choice import by_triton

SCORES_AT_MOST = 2**25
"""Scores (query x key pairs) that are in memory at a time; at least those of one query."""

Grouped = Literal["mean", "max"]


def column_sums(q: Tensor, k: Tensor, grouped: Grouped = "mean", at_most: int = SCORES_AT_MOST) -> Tensor:
    """sum_i softmax_j(q_i . k_j / sqrt(D)): [R, G * H, Q, D], [R, H, N, D] -> float32 [R, H, N], which add up to Q along N.

    Where `G` query heads share a key head, "mean" takes the mean of their attention; "max" takes, before the softmax, the
    largest of their logits (R-KV, and FlowCache after it). Whatever the dtypes, sums and softmax are in float32. Triton
    kernels do it where `choice.py` says so, `in_blocks` elsewhere.
    """

    def call(kernels: Any) -> Tensor | None:
        return kernels.column_sums(q, k, grouped == "max") if kernels.serves(q, k) else None

    sums = by_triton("column sums of attention", "columns_triton", q.device, call)
    return in_blocks(q, k, grouped, at_most) if sums is None else sums


def in_blocks(q: Tensor, k: Tensor, grouped: Grouped = "mean", at_most: int = SCORES_AT_MOST) -> Tensor:
    """`column_sums` in plain PyTorch, with at most `at_most` scores in memory, or those of one query."""
    batch, heads, n, d = k.shape
    count = q.shape[2]
    queries, keys = q.unflatten(1, (heads, -1)).flatten(0, 1), k.flatten(0, 1)
    group = queries.shape[1]
    heads_at_once = max(1, at_most // (group * count * n))
    queries_at_once = max(1, at_most // (group * n * heads_at_once))
    sums = []
    for some, mine in zip(queries.split(heads_at_once), keys.split(heads_at_once), strict=True):
        columns, wide = some.new_zeros(len(some), n, dtype=torch.float32), mine.float().mT
        for part in some.split(queries_at_once, 2):
            logits = (part.flatten(1, 2).float() * d**-0.5 @ wide).unflatten(1, (group, -1))
            if grouped == "max":
                columns += logits.amax(1).softmax(-1).sum(1)
            else:
                columns += logits.softmax(-1).sum((1, 2)) / group
        sums.append(columns)
    return torch.cat(sums).view(batch, heads, n)
