"""Even thinning: of what is not protected one token in so many stays, evenly spread, and stands for those that went.

Where a token goes is decided by its place alone, by a lattice over frame, height and width (the generalised golden ratio of
three dimensions, M. Roberts 2018): the kept ones lie evenly at every density, so as the film grows each chunk is thinned
further and none is dropped. Attention over an even sample is near that over all tokens once each kept one counts for as
many as it stands for: exp(q k) is multiplied by their number, as in an estimate by sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...settings import check, setting
from ..policy import KVView

BITS = 32
KEPT = 24
"""Bits that a float32 holds exactly."""
GOLDEN = 1.2207440846057596
"""The root of x^4 = x + 1."""
FRAME, HEIGHT, WIDTH = (round(2**BITS / GOLDEN**power) for power in (1, 2, 3))
LAYER = round(2**BITS * 0.6180339887498949)
"""From layer to layer the lattice is moved on, so that layers keep different tokens."""


@dataclass(frozen=True)
class Even:
    """Even thinning. Raises ValueError for a setting outside its range."""

    name: ClassVar[str] = "even"
    shared: ClassVar[bool] = True

    stands_for: float = setting(4.0, "A kept token counts for as many as it stands for, up to this number; 1: for itself alone.",
                                low=1.0, high=1000.0, step=0.5, advanced=True)  # fmt: skip

    def __post_init__(self) -> None:
        check(self)

    def score(self, view: KVView) -> Tensor:
        frame, place = view.tokens // view.frame_tokens, view.tokens % view.frame_tokens
        y, x = place // view.grid[1], place % view.grid[1]
        lattice = (frame * FRAME + y * HEIGHT + x * WIDTH + view.layer * LAYER) & (2**BITS - 1)
        return 1 - ((lattice >> (BITS - KEPT)).float() / 2**KEPT)[:, None]
