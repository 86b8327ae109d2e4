"""What one run remembers, keyed by chunk. It is born with the session and dies with it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from .decision import Decision


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a computed step leaves behind for one branch: its noise level and the tensor that reuse replays."""

    sigma: float
    value: Tensor


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

    def of(self, index: int) -> ChunkState:
        return self._chunks.setdefault(index, ChunkState())

    def drop(self, index: int) -> None:
        self._chunks.pop(index, None)

    def clear(self) -> None:
        self._chunks.clear()

    def __len__(self) -> int:
        return len(self._chunks)
