"""What a KV cache has to know of a network: sizes, and how positions turn keys. No weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries, keys, values, what the layer's self-attention was given) -> attention output."""


class Rotary(Protocol):
    """How a network turns queries and keys by their position."""

    def phases(self, start: int, frames: int, grid: tuple[int, int]) -> Tensor:
        """Of the tokens of `frames` latent frames from `start` on, complex64 [frames * height * width, head_dim / 2].

        `grid`: height and width of a frame in tokens.
        """
        ...

    def shift(self, frames: int) -> Tensor:
        """Of a move along time alone, by any number of latent frames, complex64 [1, head_dim / 2]."""
        ...

    def turn(self, x: Tensor, phases: Tensor) -> Tensor:
        """[..., T, head_dim] by phases [T or 1, head_dim / 2]; their conjugate turns back."""
        ...


class NetworkSizes(Protocol):
    name: ClassVar[str]
    """Of the kind of network: weights that were made beside one kind are not for another of the same sizes."""
    layers: int
    heads: int
    """Heads of keys and values."""
    query_heads: int
    """A multiple of `heads` (grouped-query attention). They need not fill the width."""
    head_dim: int
    width: int
    """Channels of a token between the layers."""
    rotary: Rotary

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of h x w. Raises ValueError for a latent that does not divide into tokens."""
        ...
