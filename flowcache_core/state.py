"""What one run remembers, keyed by chunk. It is born with the session and dies with it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar, cast

from torch import Tensor

from .decision import Decision

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a computed step leaves behind for one branch: its noise level and the tensor that reuse replays."""

    sigma: float
    value: Tensor


class RunMemory:
    """What a policy remembers across the chunks of a run, found by its type."""

    def __init__(self) -> None:
        self._things: dict[type, object] = {}

    def of(self, kind: type[T], make: Callable[[], T]) -> T:
        if kind not in self._things:
            self._things[kind] = make()
        return cast(T, self._things[kind])

    def find(self, kind: type[T]) -> T | None:
        return cast("T | None", self._things.get(kind))

    def clear(self) -> None:
        self._things.clear()


@dataclass(slots=True)
class ChunkState:
    """The memory of one chunk that is being denoised."""

    drift: float = 0.0
    reused_in_a_row: int = 0
    computed: int = 0
    latent: Tensor | None = None
    decided_at: int = -1
    decision: Decision | None = None
    predictions: dict[Hashable, tuple[Prediction, ...]] = field(default_factory=dict)
    run: RunMemory = field(default_factory=RunMemory)

    def keep(self, branches: Hashable, sigma: float, value: Tensor) -> None:
        """Remember a computed step; the last two are enough for a linear prediction."""
        self.predictions[branches] = (*self.predictions.get(branches, ())[-1:], Prediction(sigma, value))

    def predict(self, branches: Hashable, sigma: float, order: int) -> Tensor:
        """The last value (order 0), or the line through the last two, at noise level `sigma` (order 1)."""
        *earlier, last = self.predictions[branches]
        if order == 0 or not earlier or earlier[0].sigma == last.sigma:
            return last.value
        ahead = (sigma - last.sigma) / (last.sigma - earlier[0].sigma)
        return last.value + ahead * (last.value - earlier[0].value)


class RunState:
    """All chunks in flight: `of` makes or finds one, `drop` forgets it when the chunk has become history."""

    def __init__(self) -> None:
        self._chunks: dict[int, ChunkState] = {}
        self.memory = RunMemory()

    def of(self, index: int) -> ChunkState:
        return self._chunks.setdefault(index, ChunkState(run=self.memory))

    def drop(self, index: int) -> None:
        self._chunks.pop(index, None)

    def clear(self) -> None:
        self._chunks.clear()
        self.memory.clear()

    def __len__(self) -> int:
        return len(self._chunks)
