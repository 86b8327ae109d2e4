"""Chance: what any other score has to beat.

A slot's number is a hash of its token, so it is the same whenever it is asked for and whichever slots lie beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor

from ...settings import check, setting
from ..policy import KVView

T = TypeVar("T", int, Tensor)

BITS = 32
KEPT = 24
"""Bits of the hash that a float32 holds exactly."""


@dataclass(frozen=True)
class Random:
    """Even in 0..1, by seed, layer and token. Raises ValueError for a setting outside its range."""

    name: ClassVar[str] = "random"
    shared: ClassVar[bool] = True

    seed: int = setting(0, "Another seed keeps other tokens.", low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        check(self)

    def score(self, view: KVView) -> Tensor:
        key = _mixed(_mixed(self.seed) ^ view.layer)
        hashed = _mixed(_mixed(view.tokens & (2**BITS - 1)) ^ key)
        return ((hashed >> (BITS - KEPT)).float() / 2**KEPT)[:, None]


def _mixed(x: T) -> T:
    """One to one on 0 .. 2^32 - 1, near numbers to far ones: xor-shifts and odd factors that stay below 2^63."""
    for factor in (0x45D9F3B, 0x7FEB352D):
        x = ((x >> 16 ^ x) * factor) & (2**BITS - 1)
    return x >> 16 ^ x
