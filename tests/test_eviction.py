"""What is left of history after chunks have come and slots have gone: the keys and values that were written, bit for bit and in order,
without a copy of a buffer on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowcache_core.kernels import slots
from flowcache_core.kernels.transfer import Inbox
from flowcache_core.kv import codec
from flowcache_core.kv.cache import CachedAttention, KVCache
from flowcache_core.kv.keeper import Choice, Keeper, side_by_side
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.schedule import ChunkSchedule
from tests.ledger import Peak
from tests.recorded import FRAME, GROUPS, RecordedFilm, budget, exactly

SCHEDULES = {
    "one by one in a window": ChunkSchedule(21, 3, 2, 2, 3),
    "rolling in a window": ChunkSchedule(20, 3, 4, 2, 3),
    "after given frames": ChunkSchedule(17, 3, 2, 2, 2, prefix=4),
    "all chunks together": ChunkSchedule(9, 3, 2, 0),
}
WITHIN_THE_HORIZON = {
    "one by one": ChunkSchedule(21, 3, 2, 2),
    "rolling": ChunkSchedule(20, 3, 4, 2),
    "after given frames": ChunkSchedule(17, 3, 2, 2, prefix=4),
}
batched = pytest.mark.parametrize("groups", GROUPS, ids=["together", "apart", "swapped"])


@batched
@pytest.mark.parametrize("name", SCHEDULES)
def test_without_a_budget_a_chunk_sees_its_window_bit_for_bit(name: str, groups: tuple[tuple[str, ...], ...]) -> None:
    assert RecordedFilm(SCHEDULES[name], None, groups).run(exactly).compared > 50


@batched
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", WITHIN_THE_HORIZON)
def test_under_a_budget_a_chunk_sees_what_was_kept_bit_for_bit(name: str, offload: bool, groups: tuple[tuple[str, ...], ...]) -> None:
    assert RecordedFilm(WITHIN_THE_HORIZON[name], budget(5, offload=offload), groups).run(exactly).compared > 50


@pytest.mark.parametrize("kept", [None, budget(5), budget(5, offload=True)], ids=["window", "budget", "offloaded"])
@pytest.mark.parametrize("seed", range(4))
def test_branches_may_be_batched_anew_at_every_evaluation(kept: object, seed: int) -> None:
    schedule = SCHEDULES["rolling in a window"] if kept is None else WITHIN_THE_HORIZON["rolling"]
    assert RecordedFilm(schedule, kept, regrouped=seed).run(exactly).compared > 50  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [1, 3 * 2 * 128])
@pytest.mark.parametrize("offload", [False, True])
def test_how_much_moves_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch, offload: bool, block: int) -> None:
    monkeypatch.setattr(slots, "BLOCK", block)
    RecordedFilm(WITHIN_THE_HORIZON["rolling"], budget(5, offload=offload)).run(exactly)
    RecordedFilm(SCHEDULES["rolling in a window"]).run(exactly)


@pytest.mark.parametrize(("dtype", "error"), [("fp8", 0.07), ("int8", 0.02), ("int4", 0.3)])
@pytest.mark.parametrize("offload", [False, True])
def test_in_fewer_bits_a_slot_is_as_near_at_the_end_as_at_the_beginning(dtype: str, error: float, offload: bool) -> None:
    def close(seen: Tensor, written: Tensor) -> None:
        assert (seen - written).norm() <= error * written.norm()

    RecordedFilm(WITHIN_THE_HORIZON["rolling"], budget(5, dtype=dtype, offload=offload)).run(close)


@pytest.mark.parametrize("kept", [None, budget(6)], ids=["window", "budget"])
def test_a_chunk_that_becomes_history_needs_no_copy_of_a_buffer(monkeypatch: pytest.MonkeyPatch, kept: object) -> None:
    """Beside a block of slots there are the numbers by which slots are known, a few bytes each."""
    block, most = 2 * 128 * FRAME, []
    monkeypatch.setattr(slots, "BLOCK", block)
    film = RecordedFilm(ChunkSchedule(27, 3, 2, 2, 3 if kept is None else None), kept)  # type: ignore[arg-type]

    def settled(chunk: Chunk) -> None:
        buffers = [buffer for cache in film.store._caches for pair in cache._buffers for buffer in pair]
        with Peak(*buffers) as peak:
            film.store.settle(chunk)
        most.append((peak.most, buffers[0].nbytes))

    film.run(exactly, settled)
    numbers = 0 if kept is None else 2 * 3 * 2 * film.sizes.history * 64
    assert all(peak <= block * 4 + numbers < size / 4 for peak, size in most)
    assert max(peak for peak, _ in most) > 0 or kept is None


def test_what_goes_by_the_chunk_is_not_even_copied_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    film = RecordedFilm(ChunkSchedule(27, 3, 2, 2, 3))
    monkeypatch.setattr(slots, "BLOCK", 1)

    def settled(chunk: Chunk) -> None:
        with Peak(*(buffer for cache in film.store._caches for pair in cache._buffers for buffer in pair)) as peak:
            film.store.settle(chunk)
        assert peak.most == 0

    film.run(exactly, settled)


@pytest.mark.parametrize(
    ("dtype", "offload"), [("fp8", False), ("int8", False), ("int4", False), ("as computed", True), ("fp8", True), ("int8", True), ("int4", True)]
)
def test_history_in_another_form_is_restored_in_one_place_without_a_copy_of_it(monkeypatch: pytest.MonkeyPatch, dtype: str, offload: bool) -> None:
    """What conversion needs beside it is a block, whichever layer is read and however often."""
    monkeypatch.setattr(codec, "BLOCK", 4 * 2 * 128)
    film, places, most = RecordedFilm(WITHIN_THE_HORIZON["one by one"], budget(6, dtype=dtype, offload=offload)), set(), 0
    film.run(lambda *_: None)
    cache = film.store._caches[0]
    held = [tensor for *_, kinds in film.store.held for kind in kinds.values() for tensor in kind]
    scratch = cache.read(0, slice(0, 4), 0, 1)
    for layer in (0, 1, 2, 0, 1, 2):
        with Peak(*held, *scratch, *([cache._history._near] if offload else [])) as peak:  # type: ignore[attr-defined]
            seen = cache.read(layer, slice(0, 4), 0, film.store.layout.total)
        places.add((seen[0].data_ptr(), seen[1].data_ptr()))
        most = max(most, peak.most)
    assert len(places) == 1
    assert most <= 8 * 4 * 2 * 128 < seen[0].nbytes / 2


def test_the_host_asks_for_the_kept_tokens_before_a_slot_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it waits for the choice, and the device goes on moving slots meanwhile."""
    order: list[str] = []

    def noted(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def called(*args: object) -> object:
            order.append(name)
            return real(*args)

        monkeypatch.setattr(owner, name, called)

    for owner, name in ((Keeper, "settle"), (Inbox, "fetch"), (KVCache, "join"), (KVCache, "keep"), (Keeper, "locate")):
        noted(owner, name)
    RecordedFilm(ChunkSchedule(9, 3, 2, 2), budget(4), GROUPS[1]).run(exactly)
    moved = ["join", *["keep"] * 3]
    assert order == ["settle", "settle", "fetch", "join", "join", "locate", "settle", "settle", "fetch", *moved, *moved, "locate"]


@pytest.mark.parametrize("tokens", [None, torch.tensor([0, 3, 7])], ids=["all", "some"])
@pytest.mark.parametrize("kept", [None, budget(5), budget(5, offload=True, dtype="int8")], ids=["window", "budget", "offloaded"])
def test_an_aside_sees_its_own_keys_and_values_and_leaves_the_slots_as_they_were(kept: object, tokens: Tensor | None) -> None:
    film = RecordedFilm(SCHEDULES["rolling in a window"] if kept is None else WITHIN_THE_HORIZON["rolling"], kept)  # type: ignore[arg-type]
    layout, seen = film.store.layout, 0

    def settled(chunk: Chunk) -> None:
        nonlocal seen
        k, v = torch.randn(2, 4, 2, 12 if tokens is None else len(tokens), 128)
        before = [tensor.clone() for *_, held in film.store.held for kind in held.values() for tensor in kind]
        aside = film.store.attention(("a", "b"), film.schedule.at(chunk.index, 1), tokens, aside=True)
        film.attend(aside, 1, k, v)
        at = torch.arange(12) if tokens is None else tokens
        for x, fresh in zip(film.seen, (k, v), strict=True):
            assert torch.equal(x[:, :, aside.end - 12 - aside.first :][:, :, at], fresh)
        after = [tensor for *_, held in film.store.held for kind in held.values() for tensor in kind]
        assert all(torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8)) for one, other in zip(before, after, strict=True))
        seen += layout.kept > 0 or kept is None
        film.store.settle(chunk)

    film.run(lambda *_: None, settled)
    assert seen > 2


def test_an_aside_needs_the_memory_of_its_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CachedAttention, "_ranged", lambda attend, q, keys, values: q)
    film = RecordedFilm(ChunkSchedule(27, 3, 2, 2)).run(lambda *_: None)
    k, v = torch.randn(2, 4, 2, 12, 128)
    aside = film.store.attention(("a", "b"), film.schedule.at(8, 1), aside=True)
    with Peak(*(buffer for pair in aside.cache._buffers for buffer in pair), k, v) as peak:
        aside(0, k, k, v, k)
    assert peak.most == k.nbytes + v.nbytes


def test_choices_of_branches_side_by_side_are_one_choice() -> None:
    one, other = (Choice(torch.tensor([[0, k, 9]]), torch.tensor([[[k, k + 1, k + 2]]]), 1, 1) for k in (3, 5))
    both = side_by_side([one, other])
    assert both is not None
    assert both.pooled is not None
    assert (both.index.tolist(), both.pooled.tolist()) == ([[0, 3, 9], [0, 5, 9]], [[[3, 4, 5]], [[5, 6, 7]]])
    assert (both.first, both.last) == (1, 1)
    assert side_by_side([one]) is one
    assert side_by_side([None, None]) is None
