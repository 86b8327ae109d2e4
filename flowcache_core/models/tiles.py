"""A film in tiles: where they lie, what each counts where they overlap, and how they become one film again.

What happens to a tile is unknown here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

Span = tuple[int, int]
"""First place, and the one after the last."""
Sizes = tuple[int, int, int]
"""Along time, height and width."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes of a tile in latent cells, and how many cells it has in common with the next one at least."""

    frames: int
    side: int
    common_frames: int = 0
    common: int = 0

    def __post_init__(self) -> None:
        for size, common, what in ((self.frames, self.common_frames, "latent frames"), (self.side, self.common, "latent cells a side")):
            if not 0 <= common < size:
                raise ValueError(f"tiles of {size} {what} cannot have {common} in common: choose at least 1, of which 0 to {max(size - 1, 0)}")

    def spans(self, cells: Sequence[int]) -> list[list[Span]]:
        """Along time, height and width of a film of so many cells."""
        sizes, common = (self.frames, self.side, self.side), (self.common_frames, self.common, self.common)
        return [spans(*axis) for axis in zip(cells, sizes, common, strict=True)]


def spans(length: int, size: int, common: int) -> list[Span]:
    """Tiles along one axis: from its front in even strides, the last moved back until it is whole."""
    if length <= size:
        return [(0, length)]
    return [(start, start + size) for start in (*range(0, length - size, size - common), length - size)]


def shares(tiles: Sequence[Span]) -> list[Tensor]:
    """What each tile counts at each of its places, float32: 1, but a line up and a line down where it overlaps its neighbours.

    At every place of the axis the shares add up to 1.
    """
    before = (0, *(end for _, end in tiles[:-1]))
    after = (*(start for start, _ in tiles[1:]), tiles[-1][1])
    lines = [_line(end - start, left - start, end - right) for (start, end), left, right in zip(tiles, before, after, strict=True)]
    total = torch.zeros(tiles[-1][1])
    for (start, end), line in zip(tiles, lines, strict=True):
        total[start:end] += line
    return [line / total[start:end] for (start, end), line in zip(tiles, lines, strict=True)]


def _line(length: int, rise: int, fall: int) -> Tensor:
    """1, but for the first `rise` and the last `fall` places."""
    place = torch.arange(length) + 0.5
    return torch.minimum(place / max(rise, 0.5), (length - place) / max(fall, 0.5)).clamp(max=1)


def in_tiles(x: Tensor, tiling: Tiling, run: Callable[[Tensor], Tensor], channels: int, taken: Sizes = (1, 1, 1), made: Sizes = (1, 1, 1)) -> Tensor:
    """x [B, C, T, H, W], tile by tile through `run`, whose results are blended -> [B, channels, ...] in the dtype and place of `x`.

    `taken`, `made`: places of a cell along time, height and width in what `run` takes and in what it makes. Beside `x` and the result, one
    tile is held.
    """
    cells = [length // per for length, per in zip(x.shape[2:], taken, strict=True)]
    axes = tiling.spans(cells)
    counts = [shares([(start * per, end * per) for start, end in axis]) for axis, per in zip(axes, made, strict=True)]
    out = x.new_zeros(len(x), channels, *(n * per for n, per in zip(cells, made, strict=True)))
    for tile in product(*([*zip(axis, count, strict=True)] for axis, count in zip(axes, counts, strict=True))):
        where = [span for span, _ in tile]
        out[_places(where, made)] += _counted(run(x[_places(where, taken)]).to(out), [count for _, count in tile])
    return out


def _counted(part: Tensor, counts: Sequence[Tensor]) -> Tensor:
    for axis, count in enumerate(counts):
        part = part * count.to(part).view(-1, *[1] * (2 - axis))
    return part


def _places(where: Sequence[Span], per: Sizes) -> tuple[slice, ...]:
    return slice(None), slice(None), *(slice(start * n, end * n) for (start, end), n in zip(where, per, strict=True))
