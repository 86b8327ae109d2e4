"""What a KV cache has to know of a network: sizes, and how positions turn keys; and what a network attends with. No weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries, keys, values, what the layer's self-attention was given) -> attention output."""


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Where keys and values of a call belong: slots `at`, a range or int64 [T], of buffers [B, heads, slots, head_dim]."""

    keys: Tensor
    values: Tensor
    at: slice | Tensor


class AttendBySlots(ABC):
    """An `Attend` that keeps keys and values in slots. A layer may write them there itself and then attend without handing them over."""

    @abstractmethod
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """As `Attend`: writes keys and values, then attends."""

    @abstractmethod
    def slots(self, layer: int, like: Tensor) -> Slots | None:
        """Where this call's keys and values of a layer are to be written, in the dtype and on the device of `like`; None: they are handed over."""

    @abstractmethod
    def look(self, layer: int, q: Tensor, x: Tensor) -> Tensor:
        """Attention, once they are in their slots."""


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """`Attend` of one layer."""

    attend: Attend
    layer: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.attend(self.layer, q, k, v, x)

    def slots(self, like: Tensor) -> Slots | None:
        """None: keys and values are handed over."""
        return self.attend.slots(self.layer, like) if isinstance(self.attend, AttendBySlots) else None

    def look(self, q: Tensor, x: Tensor) -> Tensor:
        """Where there are `slots`."""
        assert isinstance(self.attend, AttendBySlots)
        return self.attend.look(self.layer, q, x)


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
