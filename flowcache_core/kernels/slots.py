"""Slots that are written, and slots that move within their buffer: in place, in order, and with bounded scratch.

A buffer is [B, H, N, D]: N slots for each of B films and H heads. Whatever moves, moves towards the start.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**24
"""Numbers that are copied aside at a time; at least those of one slot."""


def put(slots: Tensor, at: slice | Tensor, fresh: Tensor) -> None:
    """Slots `at`, a range or int64 [n], become `fresh` [B, H, n, D]."""
    if isinstance(at, slice):
        slots[:, :, at] = fresh
    else:
        slots.index_copy_(2, at, fresh)


def indexed(at: slice | Tensor) -> tuple[Tensor | None, int]:
    """Slots `at` as an operator takes them: their numbers, or None and the first of a range."""
    return (None, at.start) if isinstance(at, slice) else (at, 0)


def move_up(slots: Tensor, to: int, start: int, count: int) -> None:
    """`count` slots from `start` on come to lie from `to` on, at or before `start`.

    Nothing is copied aside where they move by a block or more: pieces no longer than the way they go do not overlap their targets.
    """
    way = start - to
    step = max(way, _per_block(slots))
    for at in range(0, count if way else 0, step):
        end = min(at + step, count)
        piece = slots[:, :, start + at : start + end]
        slots[:, :, to + at : to + end] = piece if step == way else piece.clone()


def keep(slots: Tensor, index: Tensor, count: int, first: int = 0, last: int = 0, behind: int = 0) -> None:
    """Of the first `count` slots those of `index` become the first ones; the `behind` slots that follow the `count` move up to them.

    index: int64 [B, kept], ascending without repeats, so no block of slots overwrites one that is still to be moved. The first
    `first` of them are the buffer's first, which stay where they are, and the last `last` are the last of the `count`, which move as one piece.
    Raises ValueError for more slots than there are.
    """
    kept = index.shape[1]
    if kept > count:
        raise ValueError(f"{kept} slots of the KV cache cannot be kept out of {count}: give each slot at most once")
    if kept == count:
        return
    plain = slots.view(torch.uint8) if slots.dtype.itemsize == 1 else slots  # no kernel selects among float8
    for film, chosen in zip(plain, index, strict=True):
        for start, end in blocks(film[None], first, kept - last):
            film[:, start:end] = film.index_select(1, chosen[start:end])
    move_up(plain, kept - last, count - last, last + behind)


def pool(slots: Tensor, groups: Tensor) -> None:
    """The middle slot of every group, int64 [B, n, m] with no slot in two groups, becomes the mean of the group's slots."""
    for film, of_film in zip(slots, groups, strict=True):
        middle = of_film.shape[1] // 2
        for some in of_film.split(max(1, BLOCK // (film.shape[0] * film.shape[2] * of_film.shape[1]))):
            film[:, some[:, middle]] = film[:, some].float().mean(2).to(film.dtype)


def blocks(x: Tensor, start: int, end: int, at_most: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges that make up slots `start`..`end` of x [B, H, N, D], of `at_most` numbers (None: BLOCK) or of one slot."""
    step = _per_block(x, at_most)
    for at in range(start, end, step):
        yield at, min(at + step, end)


def _per_block(x: Tensor, at_most: int | None = None) -> int:
    return max(1, (at_most or BLOCK) // (x.shape[0] * x.shape[1] * x.shape[3]))
