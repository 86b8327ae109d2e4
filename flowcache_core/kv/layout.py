"""Which slots of the buffers belong to whom: history first, in order of position, then the chunks that are being denoised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from ..sampling.chunk import Chunk
from ..sampling.schedule import ChunkSchedule, Row

Reach = Callable[[Chunk], int | None]
"""Chunks, itself included, that a chunk sees at its step in any branch that looks back; None: all that the schedule allows."""


@dataclass(frozen=True, slots=True)
class Range:
    """What a branch that does not see all of what the schedule allows sees of a chunk: nothing of the chunks before `oldest`.

    `first`: first slot of the chunks from there on that lie whole. What is left of them in a history under a budget lies
    before it, where the keeper knows.
    """

    oldest: int
    first: int


class Layout:
    """Book-keeping of one run, the same for all layers and branches; no tensors.

    Without a `budget` history is whole chunks, and one is dropped when no later chunk sees it: within what the schedule allows, and
    within `reach`. With one, history is the first `kept` slots, whatever chunks they are of, and a chunk sees all of it where no `range`
    says less.
    """

    remembers: ClassVar[tuple[str, ...]] = ("kept", "spans")
    spans: dict[int, tuple[int, int]]
    """First slot and number of slots of every chunk that lies there whole."""

    def __init__(self, schedule: ChunkSchedule, frame_tokens: int, budget: int | None = None, reach: Reach | None = None) -> None:
        self.schedule, self.frame_tokens, self.budget, self.reach = schedule, frame_tokens, budget, reach
        self.kept = 0
        self.spans = {}

    @property
    def total(self) -> int:
        return max((start + count for start, count in self.spans.values()), default=self.kept)

    @property
    def active(self) -> int:
        """Slots behind history that a budget has no say in."""
        return self.total - self.kept

    def begin(self, index: int) -> tuple[int, int, int]:
        """A chunk's first visible slot, first own slot and end; its slots are given to it on the first call."""
        if index not in self.spans:
            self.spans[index] = (self.total, self.schedule.span(index)[1] * self.frame_tokens)
        start, count = self.spans[index]
        return self._first(self.oldest(index)) if self.budget is None else 0, start, start + count

    def oldest(self, index: int) -> int:
        """The first chunk that a chunk sees, as far as its slots are still there."""
        return self.schedule.oldest(index) if self.budget is None else 0

    def range(self, index: int, seen: int) -> Range:
        """Of a chunk that has begun, for a branch that sees `seen` chunks, itself included, and no more than the schedule allows."""
        if seen < 1:
            raise ValueError(f"chunk {index + 1} was to see {seen} chunks: a chunk sees at least itself, so use 1 or more")
        oldest = max(index - seen + 1, self.oldest(index))
        return Range(oldest, self._first(oldest))

    def _first(self, oldest: int) -> int:
        return min(at for k, (at, _) in self.spans.items() if k >= oldest)

    def settle(self, index: int) -> tuple[int, int]:
        """A finished chunk becomes history -> slots of history with it, and how many of them can stay.

        Without a budget the first slots are given up; with one, a score decides. The slots behind move up.
        """
        if self.budget is None:
            seen = self._oldest_after(index)
            gone = sum(count for k, (_, count) in self.spans.items() if k < seen)
            self.spans = {k: (start - gone, count) for k, (start, count) in self.spans.items() if k >= seen}
            return self.total + gone, self.total
        start, count = self.spans.pop(index)
        stays = min(start + count, self.budget)
        gone = start + count - stays
        self.kept = stays
        self.spans = {k: (at - gone, n) for k, (at, n) in self.spans.items()}
        return start + count, stays

    def _oldest_after(self, index: int) -> int:
        """The first chunk that is still seen when a chunk has finished."""
        if self.reach is None:
            return self.schedule.oldest(min(index + 1, self.schedule.chunks - 1))
        oldest = index + 1
        for later in range(index + 1, self.schedule.chunks):
            step = self._next_step(later, index)
            oldest = min(oldest, self._oldest_from(later, step))
            if step == 0:
                break
        return oldest

    def _next_step(self, index: int, finished: int) -> int:
        """Of a chunk, when another has finished."""
        row = self._finishes.get(finished)
        before = self.schedule.steps if index < self.schedule.given else 0
        return before if row is None else min(row.indices[index], self.schedule.steps)

    def _oldest_from(self, index: int, step: int) -> int:
        """The first chunk that a chunk sees at one of its steps from `step` on."""
        assert self.reach is not None
        counts = [self.reach(self.schedule.at(index, now)) for now in range(step, self.schedule.steps + 1)]
        within = [count for count in counts if count is not None]
        first = index - max(within) + 1 if len(within) == len(counts) else 0
        return max(first, self.schedule.oldest(index))

    @cached_property
    def _finishes(self) -> dict[int, Row]:
        """By chunk, the row of its last step."""
        return {chunk.index: row for row in self.schedule.rows for chunk in row.active if chunk.step == chunk.steps - 1}


@dataclass(frozen=True, slots=True)
class Capacity:
    """Slots that a run needs at most: in all, of history at the moment when a chunk has joined it, and of active chunks."""

    total: int
    history: int
    active: int


def capacity(schedule: ChunkSchedule, frame_tokens: int, budget: int | None = None, reach: Reach | None = None) -> Capacity:
    """Found by going through the run's book-keeping."""
    layout, total, history, active = Layout(schedule, frame_tokens, budget, reach), 0, 0, 0

    def begin(indices: Iterable[int]) -> None:
        nonlocal total, active
        for index in indices:
            layout.begin(index)
        total, active = max(total, layout.total), max(active, layout.active)

    def settle(index: int) -> None:
        nonlocal history
        history = max(history, layout.settle(index)[0])

    for index in range(schedule.given):
        begin([index])
        settle(index)
    for row in schedule.rows:
        begin(chunk.index for chunk in row.active)
        for chunk in row.active:
            if chunk.step == chunk.steps - 1 and chunk.index < schedule.chunks - 1:
                settle(chunk.index)
    return Capacity(total, history, active)
