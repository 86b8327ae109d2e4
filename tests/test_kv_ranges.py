"""How many chunks a branch sees at a step: against dense attention under a mask, and what is kept for later steps."""

from __future__ import annotations

import math
from collections.abc import Hashable

import pytest
import torch
from torch import Tensor

from flowcache_core.kernels import attention as module
from flowcache_core.kv import cache as cache_module
from flowcache_core.kv.cache import KVSizes, KVStore, Seen
from flowcache_core.kv.compressor import Budget
from flowcache_core.kv.keeper import Keeper
from flowcache_core.kv.layout import Layout, Range, capacity
from flowcache_core.kv.scores.even import Even
from flowcache_core.kv.scores.key_norm import KeyNorm
from flowcache_core.models.skyreels import HEAD_DIM, Rope
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.schedule import ChunkSchedule
from tests.test_kv_budget import FRAME, budget

HEADS, LAYERS, FILMS, STEPS = 2, 2, 2, 4
BRANCHES = ("text", "none", "alone")
FILM = ChunkSchedule(15, 3, STEPS, 1)
ROLLING = ChunkSchedule(20, 3, STEPS, 2, 3, prefix=2)
FINISHING = ChunkSchedule(17, 3, STEPS, STEPS, 3)
GROUPS = ((BRANCHES,), (("alone", "text"), ("none",)), (("text",), ("none", "alone")))


def fewer_at_later_steps(chunk: Chunk, branch: Hashable) -> int | None:
    """As MAGI-1: the nearer a chunk is to clean the fewer it sees, alone in its clean pass; one branch sees its own chunk only."""
    if branch == "alone" or chunk.committing:
        return 1
    return (9, 4, 3, 2)[chunk.step] if branch == "text" else None


def more_at_later_steps(chunk: Chunk, branch: Hashable) -> int | None:
    return None if branch == "none" else chunk.step + 1


class Film:
    """Random queries, keys and values of all branches go through a store, and each output is held against dense attention under a mask."""

    def __init__(self, schedule: ChunkSchedule, kept: Budget | None, seen: Seen | None) -> None:
        self.schedule, self.kept, self.seen, self.out = schedule, kept, seen, list[Tensor]()
        layout = Layout(schedule, FRAME, kept.slots if kept else None)
        room = capacity(schedule, FRAME, layout.budget)
        sizes = KVSizes(FILMS, LAYERS, HEADS, HEAD_DIM, room.total, room.history, room.active)
        self.keeper = Keeper(kept, schedule, LAYERS, FILMS, (2, 2), Rope()) if kept else None
        self.store = KVStore(sizes, layout, self.keeper, kept.cache_of(sizes, layout) if kept else None, seen=seen)
        self.newest = torch.zeros(2, len(BRANCHES), LAYERS, FILMS, HEADS, schedule.frames * FRAME, HEAD_DIM)
        self.chunk_of = torch.tensor([k for k in range(schedule.chunks) for _ in range(schedule.span(k)[1] * FRAME)])
        self.settled = 0

    def run(self, groups: tuple[tuple[str, ...], ...] = (BRANCHES,)) -> Film:
        torch.manual_seed(2)
        for index in range(self.schedule.given):
            self._clean(self.schedule.at(index, STEPS), groups)
        for row in self.schedule.rows:
            for chunk in row.active:
                self._pass(chunk, groups)
                if chunk.step == STEPS - 1 and chunk.index < self.schedule.chunks - 1:
                    self._clean(self.schedule.at(chunk.index, STEPS), groups)
        return self

    def _clean(self, chunk: Chunk, groups: tuple[tuple[str, ...], ...]) -> None:
        self._pass(chunk, groups)
        self.store.settle(chunk)
        self.settled = chunk.index + 1
        if self.keeper:
            self.keeper.locate()

    def _pass(self, chunk: Chunk, groups: tuple[tuple[str, ...], ...]) -> None:
        mine = slice(chunk.start * FRAME, (chunk.start + chunk.frames) * FRAME)
        q = torch.randn(len(BRANCHES), LAYERS, FILMS, HEADS, chunk.frames * FRAME, HEAD_DIM)
        self.newest[..., mine, :] = torch.randn(2, *q.shape)
        for group in groups:
            attend, numbers = self.store.attention(group, chunk), [BRANCHES.index(branch) for branch in group]
            for layer in range(LAYERS):
                own = (q[numbers, layer].flatten(0, 1), *(x[numbers, layer][..., mine, :].flatten(0, 1) for x in self.newest))
                out = attend(layer, *own, torch.zeros(len(own[0]), chunk.frames * FRAME, 8)).unflatten(0, (len(group), FILMS))
                self.out.append(out)
                for number, branch in enumerate(group):
                    for film in range(FILMS):
                        expected = self._dense(chunk, branch, layer, film, q[numbers[number], layer, film])
                        torch.testing.assert_close(out[number, film], expected, rtol=1e-4, atol=1e-5)

    def _dense(self, chunk: Chunk, branch: str, layer: int, film: int, q: Tensor) -> Tensor:
        count = self.seen(chunk, branch) if self.seen else None
        first = 0 if count is None else chunk.index - count + 1
        first = first if self.kept else max(first, self.schedule.oldest(chunk.index))
        bias = torch.zeros(len(self.chunk_of)).masked_fill((self.chunk_of < first) | (self.chunk_of > chunk.index), -math.inf)
        keys, values = self.newest[:, BRANCHES.index(branch), layer, film]
        if self.keeper:
            keys = keys.clone()
            held = self.keeper._kept[branch][layer].tokens[film] if branch in self.keeper._kept else torch.empty(0, dtype=torch.long)
            gone = self.chunk_of < self.settled
            gone[held] = False
            bias[gone] = -math.inf
            bias[held[self.keeper.middle.start : self.keeper.middle.end]] += self.keeper.middle.weight
            for k in range(self.settled):
                farther = chunk.start + chunk.frames - self.schedule.span(k)[0] - self.schedule.horizon
                if farther > 0:
                    keys[:, self.chunk_of == k] = Rope().turn(keys[:, self.chunk_of == k], Rope().shift(farther))
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=bias.expand(q.shape[1], -1))


@pytest.mark.parametrize("groups", GROUPS, ids=["together", "two and one", "one and two"])
@pytest.mark.parametrize("seen", [None, fewer_at_later_steps, more_at_later_steps])
@pytest.mark.parametrize("schedule", [FILM, ROLLING, FINISHING], ids=["whole", "rolling", "one by one"])
def test_a_branch_sees_as_many_chunks_as_are_said_and_the_window_holds(
    schedule: ChunkSchedule, seen: Seen | None, groups: tuple[tuple[str, ...], ...]
) -> None:
    Film(schedule, None, seen).run(groups)


@pytest.mark.parametrize("seen", [None, fewer_at_later_steps, more_at_later_steps])
@pytest.mark.parametrize("schedule", [FILM, ROLLING, FINISHING], ids=["whole", "rolling", "one by one"])
@pytest.mark.parametrize(
    "kept",
    [budget(6 * FRAME, FRAME, 3 * FRAME, KeyNorm()), budget(8 * FRAME, FRAME, 3 * FRAME, Even()), budget(5 * FRAME, 0, 0, KeyNorm(), offload=True)],
    ids=["scored", "even", "offloaded"],
)
def test_under_a_budget_too_where_what_is_left_of_a_chunk_differs_by_layer_branch_and_film(
    schedule: ChunkSchedule, seen: Seen | None, kept: Budget
) -> None:
    run = Film(schedule, kept, seen).run((("text", "none"), ("alone",)))
    assert run.keeper is not None
    each = [kept.runs[film] for layers in run.keeper._kept.values() for kept in layers for film in range(FILMS)]
    assert len({tuple(runs) for runs in each}) > (1 if isinstance(kept.policy, KeyNorm) else 0)


@pytest.mark.parametrize("seen", [fewer_at_later_steps, more_at_later_steps])
def test_a_budget_for_all_of_history_equals_none_bit_for_bit(seen: Seen) -> None:
    without, with_all = (Film(FILM, kept, seen).run().out for kept in (None, budget(50 * FRAME)))
    assert all(torch.equal(a, b) for a, b in zip(without, with_all, strict=True))


@pytest.mark.parametrize("kept", [None, budget(6 * FRAME, FRAME, 3 * FRAME)], ids=["window", "budget"])
def test_to_see_what_the_schedule_allows_is_to_say_nothing(kept: Budget | None) -> None:
    plain = Film(ROLLING, kept, None).run().out
    for seen in (lambda chunk, branch: None, lambda chunk, branch: 99):
        assert all(torch.equal(a, b) for a, b in zip(Film(ROLLING, kept, seen).run().out, plain, strict=True))


@pytest.mark.parametrize(
    ("counts", "calls"), [((None, None, None), 1), ((2, 2, 2), 1), ((9, None, 7), 1), ((1, None, None), 2), ((1, 2, 1), 3), ((1, 1, 2), 2)]
)
def test_neighbouring_branches_that_see_the_same_run_together(monkeypatch: pytest.MonkeyPatch, counts: tuple[int | None, ...], calls: int) -> None:
    seen: list[tuple[int, ...]] = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(tuple(k.shape[:3:2]))
        return module.attention(q, k, v)

    monkeypatch.setattr(cache_module, "attention", counted)
    store = KVStore(KVSizes(1, 1, HEADS, 8, 36), Layout(FILM, FRAME), seen=lambda chunk, branch: counts[BRANCHES.index(branch)])  # type: ignore[arg-type]
    for index in range(3):
        q = torch.randn(3, HEADS, 12, 8)
        seen.clear()
        store.attention(BRANCHES, FILM.at(index, 0))(0, q, q, q, q)
    assert len(seen) == calls
    assert sum(branches for branches, _ in seen) == 3
    assert {length for _, length in seen} == {12 * min(count or 3, 3) for count in counts}


class Noting(Film):
    """Remembers which slots were whose after every chunk."""

    def __init__(self, seen: Seen | None) -> None:
        super().__init__(ROLLING, None, seen)
        self.spans: list[dict[int, tuple[int, int]]] = []

    def _clean(self, chunk: Chunk, groups: tuple[tuple[str, ...], ...]) -> None:
        super()._clean(chunk, groups)
        self.spans.append(dict(self.store.layout.spans))


def test_what_a_later_step_sees_again_is_still_there() -> None:
    """All but the last step of each chunk see their own chunk only; nothing goes but by the window of the schedule."""
    films = [Noting(seen) for seen in (None, lambda chunk, branch: 1 if chunk.step < STEPS - 1 else None)]
    for film in films:
        film.run()
    assert films[0].spans == films[1].spans


def test_a_range_is_within_what_is_held_and_holds_the_chunk_itself() -> None:
    layout = Layout(FINISHING, FRAME)
    for index in range(FINISHING.chunks):
        first, start, _ = layout.begin(index)
        for count in (1, 2, 3, 50):
            limit = layout.range(index, count)
            assert first <= limit.first <= start
            assert limit.oldest == max(FINISHING.oldest(index), index - count + 1)
        assert layout.range(index, 1) == Range(index, start)
        layout.settle(index)
    with pytest.raises(ValueError, match="chunk 6 was to see 0 chunks: a chunk sees at least itself, so use 1 or more"):
        layout.range(5, 0)
