"""Which rows of the buffers belong to whom: history first, in order of position, then the chunks that are being denoised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..sampling.schedule import ChunkSchedule


class Layout:
    """Book-keeping of one run, the same for all layers and branches; no tensors.

    Without a `budget` history is whole chunks, and one is dropped when no later chunk sees it. With one, history is the
    first `kept` rows, whatever chunks they are of, and every chunk sees all of it.
    """

    def __init__(self, schedule: ChunkSchedule, frame_tokens: int, budget: int | None = None) -> None:
        self.schedule, self.frame_tokens, self.budget = schedule, frame_tokens, budget
        self.kept = 0
        self.spans: dict[int, tuple[int, int]] = {}
        """First row and number of rows of every chunk that lies there whole."""

    @property
    def total(self) -> int:
        return max((start + count for start, count in self.spans.values()), default=self.kept)

    @property
    def active(self) -> int:
        """Slots behind history that a budget has no say in."""
        return self.total - self.kept

    def begin(self, index: int) -> tuple[int, int, int]:
        """A chunk's first visible row, first own row and end; its rows are given to it on the first call."""
        if index not in self.spans:
            self.spans[index] = (self.total, self.schedule.span(index)[1] * self.frame_tokens)
        start, count = self.spans[index]
        oldest = self.schedule.oldest(index)
        first = min(at for k, (at, _) in self.spans.items() if k >= oldest) if self.budget is None else 0
        return first, start, start + count

    def settle(self, index: int) -> tuple[int, int]:
        """A finished chunk becomes history -> rows of history with it, and how many of them can stay.

        Without a budget what has to go are the first rows; with one, a score decides. The rows behind move up.
        """
        if self.budget is None:
            seen = self.schedule.oldest(min(index + 1, self.schedule.chunks - 1))
            gone = sum(count for k, (_, count) in self.spans.items() if k < seen)
            self.spans = {k: (start - gone, count) for k, (start, count) in self.spans.items() if k >= seen}
            return self.total + gone, self.total
        start, count = self.spans.pop(index)
        stays = min(start + count, self.budget)
        gone = start + count - stays
        self.kept = stays
        self.spans = {k: (at - gone, n) for k, (at, n) in self.spans.items()}
        return start + count, stays


@dataclass(frozen=True, slots=True)
class Capacity:
    """Slots that a run needs at most: in all, of history at the moment when a chunk has joined it, and of active chunks."""

    total: int
    history: int
    active: int


def capacity(schedule: ChunkSchedule, frame_tokens: int, budget: int | None = None) -> Capacity:
    """Found by going through the run's book-keeping."""
    rows, total, history, active = Layout(schedule, frame_tokens, budget), 0, 0, 0

    def begin(indices: Iterable[int]) -> None:
        nonlocal total, active
        for index in indices:
            rows.begin(index)
        total, active = max(total, rows.total), max(active, rows.active)

    def settle(index: int) -> None:
        nonlocal history
        history = max(history, rows.settle(index)[0])

    for index in range(schedule.given):
        begin([index])
        settle(index)
    for row in schedule.rows:
        begin(chunk.index for chunk in row.active)
        for chunk in row.active:
            if chunk.step == chunk.steps - 1 and chunk.index < schedule.chunks - 1:
                settle(chunk.index)
    return Capacity(total, history, active)
