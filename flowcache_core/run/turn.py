"""One evaluation of the network, as whoever evaluates it is given it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..kv.cache import Branches


class Turn(Protocol):
    """One evaluation of the network."""

    @property
    def index(self) -> int:
        """Of the chunk; in a section, of the first that moves."""
        ...

    @property
    def step(self) -> int:
        """Of the chunk; in a section, of the one that is least far. The number of steps in the pass over a finished chunk."""
        ...

    @property
    def committing(self) -> bool:
        """Whether it is the pass over a finished chunk, which writes history."""
        ...

    @property
    def reads(self) -> int:
        """The chunk whose texts count: its own, or where history is made anew for a later one, that one."""
        ...

    @property
    def start(self) -> int:
        """Latent frame of the film at which that begins which is evaluated."""
        ...

    @property
    def parts(self) -> tuple[tuple[int, slice], ...]:
        """Of each chunk that is evaluated for a step: the step, and its latent frames in what is evaluated."""
        ...

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise level of every latent frame in what is evaluated, where they differ in one evaluation; empty: all have that of `step`."""
        ...

    def unwritten(self, branches: Iterable[Hashable]) -> tuple[Hashable, ...]:
        """Of these branches and all that have run before, those that a committing turn has not run yet: later chunks would lack their keys."""
        ...

    def denoise(self, x: Tensor, context: Tensor, branches: Branches, blocks: Hashable = None, texts: Hashable = None) -> Tensor:
        """Velocity. x: [branches * films, C, F, h, w]; context: the branches' text embeddings; `blocks` and `texts`: as in `Session.denoise`."""
        ...


Evaluate = Callable[[Turn, Tensor], Tensor]
"""(turn, latents [films, C, F, h, w]) -> guided velocity of the same shape."""


@dataclass(frozen=True)
class WrappedTurn:
    """Where a turn is that goes on to another one; what it evaluates is a subclass's."""

    turn: Turn

    @property
    def index(self) -> int:
        return self.turn.index

    @property
    def step(self) -> int:
        return self.turn.step

    @property
    def committing(self) -> bool:
        return self.turn.committing

    @property
    def reads(self) -> int:
        return self.turn.reads

    @property
    def start(self) -> int:
        return self.turn.start

    @property
    def parts(self) -> tuple[tuple[int, slice], ...]:
        return self.turn.parts

    @property
    def levels(self) -> tuple[float, ...]:
        return self.turn.levels
