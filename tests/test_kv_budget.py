"""History under a budget: never exceeded, exact where nothing goes, and the same whatever runs beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from flowcache_core.kernels.slots import pool
from flowcache_core.kv.cache import CachedAttention, KVCache, KVSizes
from flowcache_core.kv.compressor import Budget, Compressor
from flowcache_core.kv.evict import select
from flowcache_core.kv.keeper import Keeper
from flowcache_core.kv.layout import Capacity, Layout, capacity
from flowcache_core.kv.policy import KVView, Positions
from flowcache_core.kv.scores.expected import ExpectedAttention, QueryMoments
from flowcache_core.kv.scores.salience import Salience, head_at
from flowcache_core.models.attention import BlockCausal
from flowcache_core.models.skyreels import HEAD_DIM, Rope, SkyReelsV2, rope_table, rotate
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import Motion
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.run.report import RunReport
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler
from tests.driven import Driven

FRAME = 4
"""Tokens of a frame of the small films here."""
NoiseOf = Callable[..., Tensor]


@dataclass(frozen=True)
class Sparse:
    """Scores that scatter over history: a fixed function of the token's number, so that any gap may open."""

    name: ClassVar[str] = "sparse"

    def score(self, view: KVView) -> Tensor:
        assert view.keys.shape[2] == view.tokens.shape[1] == view.carried.shape[1]
        assert view.queries.shape[2] == view.hidden.shape[1] == view.new
        return (view.tokens * 7919 % 101).float()[:, None]


@dataclass(frozen=True)
class Counting:
    """A running count of the chunks a slot has seen: what is carried moves with it."""

    name: ClassVar[str] = "counting"

    def score(self, view: KVView) -> Tensor:
        return (view.carried + 1)[:, None]


def budget(slots: int, sink: int = 0, recent: int = 0, policy: object = None, granularity: str = "token", dtype: str = "as computed",
           offload: bool = False, soft: float = 0.0) -> Budget:  # fmt: skip
    return Budget(slots, sink, recent, granularity, policy or Sparse(), dtype, offload, soft)  # type: ignore[arg-type]


def film(net: SkyReelsV2, texts: Tensor, noise: Tensor, schedule: ChunkSchedule, kept: Budget | None = None, policy: CachePolicy | None = None,
         groups: tuple[tuple[int, ...], ...] = ((0, 1),), watch: Callable[[Session], None] = lambda session: None,
         ) -> tuple[Tensor, RunReport]:  # fmt: skip
    levels, films = flow_sigmas(schedule.steps), len(noise)
    with Session(SkyReelsAdapter(net), schedule, levels, (noise.shape[3], noise.shape[4]), films, policy, budget=kept) as session:
        context = texts.repeat_interleave(films, 0)

        def predict(x: Tensor, chunk: Chunk) -> Tensor:
            out: dict[int, Tensor] = {}
            for group in groups:
                batch = torch.cat([context[films * g : films * (g + 1)] for g in group])
                velocity = session.denoise(x.repeat(len(group), 1, 1, 1, 1), chunk, batch, group)
                out.update(zip(group, velocity.split(films), strict=True))
            watch(session)
            return out[1] + 2 * (out[0] - out[1])

        return sample_chunks(Driven(predict, session), noise, schedule, levels, Euler()), session.report


@pytest.mark.parametrize("ar_step", [0, 2, 4])
@pytest.mark.parametrize("policy", [None, Chunkwise(threshold=0.1, warmup_steps=1), Motion(threshold=0.05)])
def test_keeping_all_equals_no_budget_bit_for_bit(
    net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf, ar_step: int, policy: CachePolicy | None
) -> None:
    schedule = ChunkSchedule(9, 3, 4, ar_step)
    without, _ = film(net, texts, noise_of(9), schedule, None, policy)
    with_all, _ = film(net, texts, noise_of(9), schedule, budget(9 * FRAME), policy)
    assert torch.equal(with_all, without)


@pytest.mark.parametrize("sides", [(4, 6), (6, 4)])
def test_a_picture_need_not_be_square(net: SkyReelsV2, texts: Tensor, sides: tuple[int, int]) -> None:
    schedule, noise, frame, located = ChunkSchedule(15, 3, 3, 3, 3), torch.randn(1, 16, 15, *sides), 6, list[Tensor]()

    def watch(session: Session) -> None:
        located.extend(one.tokens for layers in session._kv.keeper._kept.values() for one in layers)  # type: ignore[union-attr]

    assert torch.equal(film(net, texts, noise[:, :, :9], replace(schedule, frames=9), budget(9 * frame))[0],
                       film(net, texts, noise[:, :, :9], replace(schedule, frames=9))[0])  # fmt: skip
    film(net, texts, noise, schedule, budget(5 * frame, frame, 3 * frame, granularity="frame"), watch=watch)
    counts = [torch.bincount(tokens[0] // frame) for tokens in located]
    assert max(len(tokens[0]) for tokens in located) == 5 * frame
    assert all(set(count.tolist()) <= {0, frame} for count in counts)


@pytest.mark.parametrize("kept", [36, 20])
def test_history_in_another_place_equals_history_beside_the_chunks(net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf, kept: int) -> None:
    schedule = ChunkSchedule(15, 3, 3, 2, 3)
    here, _ = film(net, texts, noise_of(15), schedule, budget(kept, FRAME, 3 * FRAME))
    there, _ = film(net, texts, noise_of(15), schedule, budget(kept, FRAME, 3 * FRAME, offload=True))
    assert torch.equal(here, there)


def test_soft_eviction_leaves_means_of_neighbours_in_order(net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf) -> None:
    def watch(session: Session) -> None:
        for layers in session._kv.keeper._kept.values():  # type: ignore[union-attr]
            assert all((kept.tokens.diff(dim=1) > 0).all() and kept.tokens.shape[1] <= 6 * FRAME for kept in layers)

    soft = budget(6 * FRAME, FRAME, 3 * FRAME, soft=0.2)
    left, _ = film(net, texts, noise_of(15), ChunkSchedule(15, 3, 3, 2, 3), soft, watch=watch)
    hard, _ = film(net, texts, noise_of(15), ChunkSchedule(15, 3, 3, 2, 3), budget(6 * FRAME, FRAME, 3 * FRAME))
    assert not torch.equal(left, hard)
    slots = torch.arange(12.0).view(1, 1, 6, 2)
    pool(slots, torch.tensor([[[0, 1, 2], [3, 4, 5]]]))
    assert slots[0, 0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    slots[0, 0, 0] = 9
    pool(slots, torch.tensor([[[0, 1, 2]]]))
    assert slots[0, 0, 1].tolist() == [5.0, pytest.approx(17 / 3)]


@pytest.mark.parametrize(("dtype", "error"), [("fp8", 0.05), ("int8", 0.02), ("int4", 0.3)])
@pytest.mark.parametrize("groups", [((0, 1),), ((0,), (1,))])
def test_fewer_bits_change_a_film_little(
    net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf, dtype: str, error: float, groups: tuple[tuple[int, ...], ...]
) -> None:
    schedule = ChunkSchedule(15, 3, 3, 2, 3)
    exact, _ = film(net, texts, noise_of(15), schedule, budget(6 * FRAME, FRAME, 3 * FRAME))
    packed, _ = film(net, texts, noise_of(15), schedule, budget(6 * FRAME, FRAME, 3 * FRAME, dtype=dtype), groups=groups)
    assert 0 < float((packed - exact).norm() / exact.norm()) < error


@pytest.mark.parametrize("dtype", ["as computed", "fp8", "int8", "int4"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_run_holds_what_its_budget_said(net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf, dtype: str, offload: bool) -> None:
    schedule, kept = ChunkSchedule(15, 3, 2, 1, 3), budget(6 * FRAME, FRAME, 3 * FRAME, dtype=dtype, offload=offload)
    _, report = film(net, texts, noise_of(15), schedule, kept)
    room = capacity(schedule, FRAME, kept.slots)
    assert report.kv_peak_bytes == kept.cache_bytes(KVSizes(1, 2, 1, HEAD_DIM, room.total, room.history, room.active), 2, 4)


def test_what_is_known_of_a_slot_is_counted(net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf) -> None:
    schedule, kept = ChunkSchedule(15, 3, 2, 1, 3), budget(6 * FRAME, FRAME, 3 * FRAME)
    held: list[int] = []

    def watch(session: Session) -> None:
        every = (one for layers in session._kv.keeper._kept.values() for one in layers)  # type: ignore[union-attr]
        held.append(sum(one.tokens.nbytes + one.carried.nbytes for one in every))

    film(net, texts, noise_of(15), schedule, kept, watch=watch)
    room = capacity(schedule, FRAME, kept.slots)
    sizes = KVSizes(1, 2, 1, HEAD_DIM, room.total, room.history, room.active)
    assert kept.bytes(sizes, 2, 4) - kept.cache_bytes(sizes, 2, 4) == max(held) > 0


def test_what_a_policy_remembers_is_counted(net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf) -> None:
    schedule, kept = ChunkSchedule(15, 3, 2, 1, 3), budget(6 * FRAME, FRAME, 3 * FRAME, ExpectedAttention())
    held: list[int] = []

    def watch(session: Session) -> None:
        every = (one.memory.find(QueryMoments) for layers in session._kv.keeper._kept.values() for one in layers)  # type: ignore[union-attr]
        held.append(sum(moments.mean.nbytes + moments.covariance.nbytes for moments in every if moments))

    film(net, texts, noise_of(15), schedule, kept, watch=watch)
    room = capacity(schedule, FRAME, kept.slots)
    sizes = KVSizes(1, 2, 1, HEAD_DIM, room.total, room.history, room.active)
    plain = budget(6 * FRAME, FRAME, 3 * FRAME).bytes(sizes, 2, 4)
    assert kept.bytes(sizes, 2, 4) - plain == max(held) > 0
    head = budget(6 * FRAME, FRAME, 3 * FRAME, Salience())
    assert head.bytes(sizes, 2, 4) - plain == sum(tensor.nbytes for tensor in head_at("").state_dict().values())


@pytest.mark.parametrize("granularity", ["token", "frame", "chunk"])
@pytest.mark.parametrize(("frames", "ar_step"), [(30, 4), (26, 2), (10, 3)])
def test_a_budget_is_never_exceeded_and_its_slots_are_in_order(
    net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf, frames: int, ar_step: int, granularity: str
) -> None:
    schedule, slots = ChunkSchedule(frames, 3, 4, ar_step, 4), 6 * FRAME
    sink, recent = FRAME, 3 * FRAME
    seen: list[int] = []

    def watch(session: Session) -> None:
        keeper = session._kv.keeper
        assert keeper is not None
        for layers in keeper._kept.values():
            for kept in layers:
                assert kept.tokens.shape[1] <= slots
                assert (kept.tokens.diff(dim=1) > 0).all()
                if kept.tokens.shape[1] == slots:
                    assert (kept.tokens[:, :sink] == torch.arange(sink)).all()
                    newest = int(kept.tokens[0, -1])
                    assert (kept.tokens[:, -recent:] == torch.arange(newest - recent + 1, newest + 1)).all()
        seen.append(session._kv.bytes)

    _, report = film(net, texts, noise_of(frames), schedule, budget(slots, sink, recent, granularity=granularity), watch=watch)
    assert len(set(seen)) == 1
    assert all(counts.sum() <= slots for counts in report.history.frames)
    assert report.kv_peak_bytes == 2 * 2 * 2 * capacity(schedule, FRAME, slots).total * HEAD_DIM * 4


def test_a_longer_film_needs_no_more_memory(net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf) -> None:
    peaks = []
    for frames in (12, 48):
        _, report = film(net, texts, noise_of(frames), ChunkSchedule(frames, 3, 2, 2, 3), budget(6 * FRAME, FRAME, 3 * FRAME))
        peaks.append(report.kv_peak_bytes)
    assert peaks[0] == peaks[1]
    assert capacity(ChunkSchedule(300, 3, 2, 2, 3), FRAME) == capacity(ChunkSchedule(30, 3, 2, 2, 3), FRAME)


@pytest.mark.parametrize("groups", [((0,), (1,)), ((1, 0),)])
def test_how_branches_are_batched_changes_nothing(net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf, groups: tuple[tuple[int, ...], ...]) -> None:
    schedule, kept = ChunkSchedule(18, 3, 3, 2, 3), budget(5 * FRAME, FRAME, 3 * FRAME)
    together, _ = film(net, texts, noise_of(18), schedule, kept)
    apart, _ = film(net, texts, noise_of(18), schedule, kept, groups=groups)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)


def test_films_of_a_batch_do_not_mix(net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf) -> None:
    schedule, kept, noise = ChunkSchedule(18, 3, 3, 3, 3), budget(5 * FRAME, FRAME, 3 * FRAME), noise_of(18, batch=2)
    both, _ = film(net, texts, noise, schedule, kept)
    torch.testing.assert_close(both, torch.cat([film(net, texts, one, schedule, kept)[0] for one in noise.split(1)]), rtol=1e-4, atol=1e-4)


def noted(session: Session) -> set[str]:
    """The books in which the keeper has something."""
    return {name for name, book in vars(session._kv.keeper).items() if isinstance(book, dict) and book}


@pytest.mark.parametrize("policy", [None, Chunkwise(threshold=0.1, warmup_steps=1), Motion(threshold=0.05)])
def test_two_runs_are_equal_and_an_interrupt_leaves_nothing(net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf, policy: CachePolicy | None) -> None:
    schedule, kept = ChunkSchedule(15, 3, 4, 4, 3), budget(5 * FRAME, FRAME, 3 * FRAME)
    first, _ = film(net, texts, noise_of(15), schedule, kept, policy)
    sessions: list[Session] = []

    def stop(session: Session) -> None:
        sessions.append(session)
        if noted(session) == {"_kept", "_segments", "_lengths", "_shifts"}:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        film(net, texts, noise_of(15), schedule, kept, policy, watch=stop)
    assert sessions[-1]._kv.bytes == 0
    assert not noted(sessions[-1])
    assert torch.equal(film(net, texts, noise_of(15), schedule, kept, policy)[0], first)


def test_a_window_drops_what_nobody_sees_and_the_film_stays_the_same(net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf) -> None:
    schedule = ChunkSchedule(15, 3, 4, 4, 2)
    rolled, report = film(net, texts, noise_of(15), schedule)
    assert report.kv_peak_bytes == 2 * 2 * 2 * 6 * FRAME * HEAD_DIM * 4
    net_, text = SkyReelsAdapter(net), net.text_kv(texts)
    t = torch.tensor([[0]])
    x = rolled.repeat(2, 1, 1, 1, 1)
    whole = net(x, t, text, BlockCausal([12 * (k + 1) for k in range(5)], 2))
    with Session(net_, schedule, flow_sigmas(4), (4, 4)) as session:
        for index in range(5):
            chunk = schedule.at(index, 4)
            part = session.denoise(x[:, :, chunk.start : chunk.start + 3], chunk, texts, (0, 1))
            torch.testing.assert_close(part, whole[:, :, chunk.start : chunk.start + 3], rtol=1e-4, atol=1e-5)
            session.commit(chunk)


def test_what_is_carried_moves_with_its_slot(net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf) -> None:
    schedule = ChunkSchedule(18, 3, 2, 2, 3)

    def watch(session: Session) -> None:
        for layers in session._kv.keeper._kept.values():  # type: ignore[union-attr]
            for kept in layers:
                if kept.tokens.shape[1]:
                    newest = kept.tokens[:, -1:] // 12
                    assert torch.equal(kept.carried.long(), newest - kept.tokens // 12 + 1)

    film(net, texts, noise_of(18), schedule, budget(8 * FRAME, FRAME, 3 * FRAME, Counting()), watch=watch)


@pytest.mark.parametrize("positions", ["within the window", "as they are"])
def test_history_beyond_the_horizon_counts_as_just_within_it_or_as_far_as_it_is(
    net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf, positions: Positions
) -> None:
    """Against keys of the far chunk rotated anew, or as they were, in one dense attention."""
    layers: list[tuple[Tensor, ...]] = []
    schedule, clean = ChunkSchedule(12, 3, 2, 2, 2), noise_of(12)
    with Session(SkyReelsAdapter(net), schedule, flow_sigmas(2), (4, 4), budget=replace(budget(9 * FRAME), positions=positions)) as session:
        for index in range(4):
            chunk = schedule.at(index, 2)
            attend = session._kv.attention((0,), chunk)
            call = attend.__call__

            def spy(layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor, call: Callable[..., Tensor] = call) -> Tensor:
                out = call(layer, q, k, v, x)
                layers.append((q, k, v, out))
                return out

            adapter = session.adapter
            from flowcache_core.models.adapter import Call

            adapter.forward(Call(clean[:, :, chunk.start : chunk.start + 3], 0.0, chunk, net.text_kv(texts[:1]), 24), spy)
            session.commit(chunk)
    nearest = 9 - 3 if positions == "within the window" else 0
    for layer in range(2):
        parts = layers[layer::2]
        q, k, _, out = parts[3]
        keys = [
            rotate(rotate(part[1], rope_table(3 * i, 3, 2, 2).conj()), rope_table(max(3 * i, nearest), 3, 2, 2)) for i, part in enumerate(parts[:3])
        ]
        expected = torch.nn.functional.scaled_dot_product_attention(q, torch.cat([*keys, k], 2), torch.cat([p[2] for p in parts], 2))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_turned_queries_and_a_turned_copy_of_the_keys_are_the_same(net: SkyReelsV2) -> None:
    keeper = Keeper(budget(36), ChunkSchedule(12, 3, 2, 2, 2), 1, 1, (2, 2), Rope())
    attend = CachedAttention(KVCache((0,), KVSizes(1, 1, 1, HEAD_DIM, 36)), slice(0, 1), 0, 0, 0, None, keeper)
    q, k, v = torch.randn(3, 1, 1, 36, HEAD_DIM)
    segments = [(0, 5, 4), (5, 6, 2), (6, 20, 1)]
    whole = attend._across(keeper, segments, q, k, v)
    for token in range(0, 36, 7):
        torch.testing.assert_close(attend._across(keeper, segments, q[:, :, token : token + 1], k, v), whole[:, :, token : token + 1])


def test_a_shift_of_queries_is_a_shift_of_keys() -> None:
    rope, (q, k) = Rope(), torch.randn(2, 1, 1, 8, HEAD_DIM, dtype=torch.float32)
    turned = rope.turn(q, rope.shift(-5)) @ k.transpose(-1, -2)
    torch.testing.assert_close(turned, q @ rope.turn(k, rope.shift(5)).transpose(-1, -2), rtol=1e-4, atol=1e-4)


def test_select_keeps_the_best_and_of_equals_the_newer() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    none = torch.zeros_like(scores, dtype=torch.bool)
    assert select(scores, 2, none).tolist() == [[0, 3], [3, 4]]
    protected = none.clone()
    protected[:, 1] = True
    assert select(scores, 2, protected).tolist() == [[0, 1], [1, 4]]
    assert select(scores, 5, none).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert select(scores, 0, none).shape == (2, 0)


@pytest.mark.parametrize("score", [math.inf, math.nan, -math.inf])
def test_no_score_takes_the_place_of_a_protected_slot(score: float) -> None:
    scores, protected = torch.full((1, 6), score), torch.tensor([[True, False, False, False, False, True]])
    assert select(scores, 2, protected).tolist() == [[0, 5]]
    assert select(scores, 3, protected, torch.arange(6)[None] // 2, 3).tolist()[0][::2] == [0, 5]


def test_slots_of_a_group_stay_or_go_together() -> None:
    scores = torch.tensor([[9.0, -9.0, 1.0, 1.5, 0.0, 3.0]])
    groups = torch.tensor([[0, 0, 4, 4, 5, 5]])
    assert select(scores, 2, torch.zeros(1, 6, dtype=torch.bool), groups, 6).tolist() == [[4, 5]]
    assert select(scores, 4, torch.zeros(1, 6, dtype=torch.bool), groups, 6).tolist() == [[2, 3, 4, 5]]


def test_in_which_order_the_slots_of_a_frame_are_added_up_decides_nothing() -> None:
    """On CUDA it is another one every time. Of frames alike the newer stays."""
    torch.manual_seed(0)
    none, frames = torch.zeros(1, 4080, dtype=torch.bool), torch.arange(4080)[None] // 2040
    for _ in range(5):
        frame = torch.rand(2040).softmax(0)
        scores = torch.cat([frame, frame[torch.randperm(2040)]])[None]
        assert select(scores, 2040, none, frames, 2).tolist() == [list(range(2040, 4080))]


@pytest.mark.parametrize("kept", [None, 20])
def test_the_book_keeping_of_slots_fits_its_own_forecast(kept: int | None) -> None:
    for frames, prefix, ar_step, window in ((17, 4, 5, 3), (30, 0, 2, 4), (9, 0, 0, None), (40, 0, 6, 2)):
        schedule = ChunkSchedule(frames, 3, 6, ar_step, window, prefix)
        room, layout = capacity(schedule, FRAME, kept), Layout(schedule, FRAME, kept)
        for index in range(schedule.chunks):
            first, start, end = layout.begin(index)
            assert 0 <= first <= start < end <= room.total
            before, after = layout.settle(index)
            assert after <= before <= max(room.total, room.history)
            assert kept is None or after <= kept


def test_the_last_chunk_needs_no_room_in_history() -> None:
    assert capacity(ChunkSchedule(9, 3, 6, 6), FRAME) == Capacity(9 * FRAME, 6 * FRAME, 9 * FRAME)
    assert capacity(ChunkSchedule(9, 3, 6, 6), FRAME, 9 * FRAME) == Capacity(9 * FRAME, 6 * FRAME, 3 * FRAME)


@pytest.mark.parametrize("groups", [((0, 1),), ((0,), (1,))])
def test_the_report_says_what_history_takes(net: SkyReelsV2, texts: Tensor, noise_of: NoiseOf, groups: tuple[tuple[int, ...], ...]) -> None:
    _, report = film(net, texts, noise_of(15), ChunkSchedule(15, 3, 2, 2), budget(5 * FRAME, FRAME, 3 * FRAME), groups=groups)
    token = 2 * 2 * 2 * HEAD_DIM * 4
    assert report.history.bytes == [token * FRAME * frames for frames in (3, 5, 5, 5)] == [token * count for count in report.history.tokens]


SCHEDULE = ChunkSchedule(30, 3, 6, 6, 5)


@pytest.mark.parametrize(("settings", "slots"), [({"budget": 3.0}, 36), ({"budget": 1.5, "unit": "seconds"}, 36), ({"budget": 2.5}, 30)])
def test_a_budget_in_chunks_or_seconds(net: SkyReelsV2, settings: dict[str, object], slots: int) -> None:
    assert Compressor(Sparse(), **settings).budget_for(SkyReelsAdapter(net), SCHEDULE, (4, 4), 24, 2, 4).slots == slots  # type: ignore[arg-type]


@pytest.mark.parametrize(("temporal", "frames"), [(2, 18), (4, 9), (8, 4.5)])
def test_a_budget_in_seconds_counts_the_pixel_frames_of_a_latent_frame(net: SkyReelsV2, temporal: int, frames: float) -> None:
    kept = Compressor(Sparse(), 1.5, "seconds").budget_for(SkyReelsAdapter(net), SCHEDULE, (4, 4), 24, 2, 4, temporal=temporal)
    assert kept.slots == frames * FRAME


def test_a_budget_in_gib_counts_all_layers_and_branches(net: SkyReelsV2) -> None:
    token = 2 * 2 * HEAD_DIM * 2 * 4
    assert Compressor(Sparse(), 40 * token / 2**30, "GiB").budget_for(SkyReelsAdapter(net), SCHEDULE, (4, 4), 24, 2, 4).slots == 40


@pytest.mark.parametrize("unit", ["chunks", "seconds", "GiB"])
def test_too_small_a_budget_is_refused_with_the_smallest_that_works(net: SkyReelsV2, unit: str) -> None:
    adapter = SkyReelsAdapter(net)
    with pytest.raises(ValueError, match=r"use \S+ \S+ or more") as error:
        Compressor(Sparse(), 0.01 if unit != "GiB" else 1e-5, unit, sink=2).budget_for(adapter, SCHEDULE, (4, 4), 24, 2, 4)  # type: ignore[arg-type]
    least = float(str(error.value).split("use ")[1].split()[0])
    assert Compressor(Sparse(), least, unit, sink=2).budget_for(adapter, SCHEDULE, (4, 4), 24, 2, 4).slots >= 5 * FRAME  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"budget": 0.0}, {"sink": -1}, {"recent": -2}, {"granularity": "row"}, {"unit": "bytes"},
                                      {"soft": 0.6}, {"dtype": "int3"}])  # fmt: skip
def test_settings_outside_their_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must lie between|use one of"):
        Compressor(Sparse(), **settings)  # type: ignore[arg-type]
