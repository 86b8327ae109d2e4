"""A run of which only every n-th row goes through the network, so that a network of released size can be measured in minutes.

The other rows are given what the network said of the chunk last. Films mean nothing with random weights; times, operations and memory are those of
the rows that ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from ..models.adapter import Call, ModelAdapter, Ranged, require_bidirectional
from ..network import Attend
from ..sampling.chunk import Chunk
from ..sampling.schedule import ChunkSchedule
from .around import Around

Count = Callable[[], float]
Key = tuple[int, int, int | None]
"""Chunk, batch, chunks that it looks back on; or branch and frames of a bidirectional section."""


def nothing() -> float:
    return 0.0


class EveryNth(Around):
    """`count`: floating-point operations so far; `held`: whether a policy keeps residuals.

    Run are every `every`-th row, the first step of a chunk, its clean pass, and the first step at which it has other branches or looks back on
    another number of chunks. What all others would have cost is taken from the last one that ran: `left_out`. That is exact where a chunk
    sees as many keys as then, and nearly so under a budget of history, whose size changes between.
    """

    def __init__(self, inner: ModelAdapter, schedule: ChunkSchedule, every: int, held: bool, branches: int, count: Count = nothing) -> None:
        super().__init__(inner)
        self.every, self.held, self.branches, self.count = every, held, branches, count
        self.row_of = {(chunk.index, chunk.step): number for number, row in enumerate(schedule.rows) for chunk in row.active}
        self.left_out, self.calls = 0.0, 0
        self._last: dict[Key, tuple[Any, float]] = {}

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        chunk = call.chunk
        if chunk.committing:
            self._last = {key: out for key, out in self._last.items() if key[0] != chunk.index}
            return self._kept(self.inner.forward(call, attend))
        key = chunk.index, len(call.x), self._reach(chunk)
        if key not in self._last or self.row_of[chunk.index, chunk.step] % self.every == 0:
            return self._run(key, lambda: self._kept(self.inner.forward(call, attend)))
        return self._again(key)

    def whole(self, x: Tensor, *given: Any) -> Tensor:
        """The branches of a row come one after the other."""
        row, branch = divmod(self.calls, self.branches)
        self.calls += 1
        key = branch, x.shape[2], None
        if key not in self._last or row % self.every == 0:
            return self._run(key, lambda: require_bidirectional(self.inner).whole(x, *given))
        return self._again(key)

    def _reach(self, chunk: Chunk) -> int | None:
        return self.inner.reach(chunk) if isinstance(self.inner, Ranged) else None

    def _kept(self, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        velocity, residual = out
        return velocity, residual if self.held else residual.new_empty(0)

    def _run(self, key: Key, evaluate: Callable[[], Any]) -> Any:
        before = self.count()
        out = evaluate()
        self._last[key] = out, self.count() - before
        return out

    def _again(self, key: Key) -> Any:
        out, operations = self._last[key]
        self.left_out += operations
        return out


@dataclass
class Sampling:
    """As `generate.MakeAdapter`, once; the fields are those of `EveryNth`."""

    schedule: ChunkSchedule
    every: int
    held: bool
    branches: int
    count: Count = nothing
    made: EveryNth | None = None

    def __call__(self, inner: ModelAdapter, sigmas: object) -> ModelAdapter:
        self.made = EveryNth(inner, self.schedule, self.every, self.held, self.branches, self.count)
        return cast(ModelAdapter, self.made)

    @property
    def left_out(self) -> float:
        return self.made.left_out if self.made else 0.0
