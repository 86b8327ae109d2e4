"""What a salience head is taught: the attention that every token receives from later chunks, from its own and from earlier ones.

Spatial-temporal-balanced salience of PaFu-KV (arXiv 2601.21896): of each key the strongest query, then the mean over heads.
Over all queries at once a token's own frame would always win, so the queries are split by where their chunk stands to the key's.
Two ways of attending stand here as well, for the two passes that a head learns from: the teacher's and the student's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kv.scores.salience import LOW, OUT, SAME, UP
from ..models.attention import BlockCausal, bidirectional

SCORES_AT_MOST = 2**26
"""Attention weights that are held at one time."""


def received_by_head(q: Tensor, k: Tensor, chunk: int, at_most: int = SCORES_AT_MOST) -> Tensor:
    """Queries and keys [B, H, T, D] of a film in chunks of `chunk` tokens (the last may be short) -> float32 [B, H, 3, T].

    Per key the largest weight of softmax(q k^T / sqrt(D)) over the queries of later chunks, of its own, of earlier ones (OUT).
    Where there are no such queries, as for the last and the first chunk, it is 0: see `counted`.
    Queries go block by block, so that no more than `at_most` weights exist at a time, or those of one query per film and head.
    """
    films, heads, tokens, width = q.shape
    keys = k.float().transpose(-1, -2)
    out = torch.zeros(films, heads, len(OUT), tokens, device=q.device)
    rows = max(1, at_most // (films * heads * tokens))
    for start in range(0, tokens, chunk):
        end = min(start + chunk, tokens)
        for first in range(start, end, rows):
            queries = q[:, :, first : min(first + rows, end)].float()
            most = (queries @ keys * width**-0.5).softmax(-1).amax(2)
            for which, span in ((LOW, slice(0, start)), (SAME, slice(start, end)), (UP, slice(end, tokens))):
                out[:, :, which, span] = torch.maximum(out[:, :, which, span], most[:, :, span])
    return out


def received(q: Tensor, k: Tensor, chunk: int, at_most: int = SCORES_AT_MOST) -> Tensor:
    """The same, mean over heads: float32 [B, 3, T]."""
    return received_by_head(q, k, chunk, at_most).mean(1)


def counted(tokens: int, chunk: int) -> Tensor:
    """bool [3, tokens]: False where no query could have paid attention, so that nothing is to be learnt from the 0."""
    at = torch.arange(tokens)
    last = (tokens - 1) // chunk * chunk
    return torch.stack([at < last, at >= 0, at >= chunk])


class Teacher:
    """Bidirectional attention that measures what every token receives. `received`: by layer, [B, 3, T]."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.received: dict[int, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        self.received[layer] = received(q, k, self.chunk)
        return bidirectional(layer, q, k, v, x)


class Student:
    """Block-causal attention that keeps what every layer was given. `hidden`: by layer, [B, T, C]."""

    def __init__(self, ends: Sequence[int]) -> None:
        self.attend = BlockCausal(ends)
        self.hidden: dict[int, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        self.hidden[layer] = x
        return self.attend(layer, q, k, v, x)
