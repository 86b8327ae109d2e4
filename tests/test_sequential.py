"""The KV cache of a film that another sampler makes, chunk after chunk."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flowcache_core.kernels.attention import Kernel, attending
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.policy import KVPolicy
from flowcache_core.kv.scores.even import Even
from flowcache_core.kv.scores.h2o import H2O
from flowcache_core.kv.scores.streaming import StreamingLLM
from flowcache_core.models.causal_wan import HORIZON, CausalWan
from flowcache_core.models.skyreels import rope_table, rotate
from flowcache_core.run.sequential import SequentialCache, SequentialFilm

LAYERS, HEADS, DIM = 2, 1, 128
NETWORK = CausalWan(LAYERS, HEADS * DIM, HEADS)
GRID, FRAME, CHUNK, STEPS = (4, 4), 4, 3, 2
SECOND = 4
"""Latent frames."""
ALL = 1000.0
Attended = list[dict[str, Tensor]]


def film(frames: int, budget: float = ALL, policy: KVPolicy | None = None, given: int = 0, branches: int = 1, chunk: int = CHUNK,
         clean_pass: bool = True, **settings: object) -> SequentialFilm:  # fmt: skip
    compressor = Compressor(policy or StreamingLLM(), budget / SECOND, "seconds", **settings)  # type: ignore[arg-type]
    return SequentialFilm.settled(NETWORK, compressor, frames, chunk, STEPS, GRID, branches=branches, itemsize=4, given=given, clean_pass=clean_pass)


def made(frames: int, count: int = 3, seed: int = 0) -> Tensor:
    """Queries, keys and values of a layer, [count, 1, heads, tokens, D], not yet turned by position."""
    return torch.randn(count, 1, HEADS, frames * FRAME, DIM, generator=torch.Generator().manual_seed(seed))


def attended(settled: SequentialFilm, branches: tuple[str, ...] = ("a",), apart: bool = False,
             watch: Callable[[SequentialCache], None] = lambda cache: None) -> Attended:  # fmt: skip
    """Every chunk's last evaluation of layer 0, by branch, in a run whose noisy evaluations have other keys and values."""
    schedule, out = settled.schedule, list[dict[str, Tensor]]()
    cache = SequentialCache(settled)
    for index in range(schedule.chunks):
        start, count = schedule.span(index)
        levels = [True] if index < schedule.given else [False] * STEPS + [True]
        for step, clean in enumerate(levels):
            if not cache.begin(start, count, clean):
                continue
            heard = {}
            for group in [(one,) for one in branches] if apart else [branches]:
                call = cache.attention(group)
                for layer in reversed(range(LAYERS)):
                    q, k, v = torch.cat([turned(start, count, hash_of(one) + layer, clean, step) for one in group], 1)
                    x = q.transpose(1, 2).flatten(2)
                    result = call(layer, q, k, v, x)
                heard.update(zip(group, result.split(1), strict=True))
            watch(cache)
        out.append(heard)
    cache.free()
    watch(cache)
    return out


def evaluated(cache: SequentialCache, start: int, clean: bool, seed: int = 0) -> Tensor:
    """What the last layer attends to in one evaluation of a chunk."""
    call, out = cache.attention(("a",)), torch.empty(0)
    for layer in range(LAYERS):
        q, k, v = turned(start, CHUNK, seed + layer, clean, 0)
        out = call(layer, q, k, v, q.transpose(1, 2).flatten(2))
    return out


def hash_of(branch: str) -> int:
    return 100 * ord(branch[0])


def turned(start: int, count: int, seed: int, clean: bool, step: int) -> Tensor:
    """q, k, v of a chunk as the network would make them."""
    whole = made(300, seed=seed)[..., start * FRAME : (start + count) * FRAME, :]
    phases = rope_table(start, count, 2, 2)
    q, k = (rotate(x, phases) for x in whole[:2])
    return torch.stack([q, k, whole[2]]) if clean else torch.stack([q, k + step + 1, whole[2] - step - 1])


def over(settled: SequentialFilm, kept: Callable[[int], list[int]], weight: Callable[[int], Tensor] | None = None, branch: str = "a") -> list[Tensor]:
    """Attention of every chunk over the history tokens `kept`, which lie as far back as the budget has it, and over itself."""
    within = settled.budget.positions == "within the window"
    out, room, noise = [], HORIZON - settled.schedule.chunk_frames, 0 if settled.clean_pass else STEPS
    for index in range(settled.schedule.chunks):
        start, count = settled.schedule.span(index)
        q, k, v = turned(start, count, hash_of(branch), settled.needs_clean(index), STEPS - 1)
        tokens = torch.tensor(kept(start * FRAME), dtype=torch.long)
        keys, values = made(300, seed=hash_of(branch))[1:, ..., tokens, :]
        starts = [settled.schedule.span(i)[0] for i in range(settled.schedule.chunks)]
        chunk_of = [max(s for s in starts if s <= int(t) // FRAME) for t in tokens]
        nearer = torch.tensor([max(start - s - room, 0) if within else 0 for s in chunk_of])
        places = [rope_table(int(t) // FRAME + int(m), 1, 2, 2)[int(t) % FRAME] for t, m in zip(tokens, nearer, strict=True)]
        phases = torch.stack(places) if places else torch.empty(0, DIM // 2, dtype=torch.complex64)
        keys, values = torch.cat([rotate(keys, phases) + noise, k], 2), values - noise
        bias = torch.zeros(keys.shape[2])
        if weight is not None:
            bias[: len(tokens)] = weight(start * FRAME)
        out.append(F.scaled_dot_product_attention(q, keys, torch.cat([values, v], 2), attn_mask=bias.expand(q.shape[2], -1)))
    return out


@pytest.mark.parametrize("frames", [12, 11, HORIZON])
@pytest.mark.parametrize("policy", [StreamingLLM(), Even(), H2O()])
def test_a_budget_for_everything_is_attention_to_everything(frames: int, policy: KVPolicy) -> None:
    settled = film(frames, policy=policy)
    for got, expected in zip(attended(settled), over(settled, lambda before: list(range(before))), strict=True):
        torch.testing.assert_close(got["a"], expected)


@pytest.mark.parametrize("policy", [StreamingLLM(), H2O()])
def test_without_clean_passes_history_is_that_of_the_last_step(policy: KVPolicy) -> None:
    settled = film(12, policy=policy, clean_pass=False)
    for got, expected in zip(attended(settled), over(settled, lambda before: list(range(before))), strict=True):
        torch.testing.assert_close(got["a"], expected)


@pytest.mark.parametrize(("settings", "left_out", "of"), [({}, 1, 12), ({"given": 1}, 1, 13), ({"given": 1, "clean_pass": False}, 4, 13)])
def test_the_forecast_counts_the_evaluations_that_are_left_out(settings: dict[str, int], left_out: int, of: int) -> None:
    settled, ran = film(12 + settings.get("given", 0), **settings), list[int]()  # type: ignore[arg-type]
    attended(settled, watch=lambda cache: ran.append(1))
    assert len(ran) - 1 == of - left_out
    assert f"left out: {of - left_out} of {of} evaluations" in settled.forecast()[2]


def test_the_attention_in_force_is_used() -> None:
    seen = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v)

    with attending(Kernel("counted", counted)):
        attended(film(9))
    assert seen == [tokens for before in (0, 12, 24) for tokens in [before + 12] * (STEPS + (before < 24)) * LAYERS]


@pytest.mark.parametrize("positions", ["within the window", "as they are"])
def test_sink_and_newest_stay_and_count_as_just_within_the_horizon_or_as_far_as_they_are(positions: str) -> None:
    settled = film(30, 7, sink=1, positions=positions)

    def kept(before: int) -> list[int]:
        tokens = list(range(before))
        return tokens if before <= 7 * FRAME else tokens[:FRAME] + tokens[-6 * FRAME :]

    for got, expected in zip(attended(settled), over(settled, kept), strict=True):
        torch.testing.assert_close(got["a"], expected)


def test_even_thinning_counts_what_is_kept_for_what_went() -> None:
    settled, choices = film(21, 7, Even(), sink=1), list[Tensor]()

    def watch(cache: SequentialCache) -> None:
        choices.extend(kept[0].tokens[0] for kept in cache.keeper._kept.values())

    got = attended(settled, watch=watch)
    # the keeper is told of a chunk when it joins history, which is when the next one begins
    by_chunk = [torch.empty(0, dtype=torch.long), *(choices[(STEPS + 1) * index - 1] for index in range(1, settled.schedule.chunks))]

    def weight(before: int) -> Tensor:
        tokens = by_chunk[before // (CHUNK * FRAME)]
        bias = torch.zeros(len(tokens))
        if len(tokens) < before:
            protected = FRAME + CHUNK * FRAME
            bias[FRAME : len(tokens) - CHUNK * FRAME] = math.log(min((before - protected) / (len(tokens) - protected), 4.0))
        return bias

    expected = over(settled, lambda before: by_chunk[before // (CHUNK * FRAME)].tolist(), weight)
    assert any(len(tokens) == 7 * FRAME for tokens in by_chunk)
    for chunk, right in zip(got, expected, strict=True):
        torch.testing.assert_close(chunk["a"], right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("apart", [False, True])
def test_branches_have_a_history_each(apart: bool) -> None:
    both = attended(film(15, 7, H2O(), branches=2), ("a", "b"), apart)
    for branch in ("a", "b"):
        alone = attended(film(15, 7, H2O()), (branch,))
        for one, other in zip(both, alone, strict=True):
            torch.testing.assert_close(one[branch], other[branch])


def test_nothing_goes_between_the_evaluations_of_a_chunk() -> None:
    kept = []
    attended(film(15, 7), watch=lambda cache: kept.append(cache.store.layout.kept))
    assert kept[:-1] == [tokens for tokens in (0, 12, 24, 28) for _ in range(STEPS + 1)] + [28] * STEPS


@pytest.mark.parametrize("dtype", ["as computed", "fp8", "int8", "int4"])
def test_a_longer_film_needs_no_more_and_what_was_planned_is_what_is_taken(dtype: str) -> None:
    peaks: list[int] = []
    for frames in (21, 201):
        settled, seen = film(frames, 7, dtype=dtype), list[int]()
        attended(settled, watch=lambda cache, seen=seen: seen.append(cache.peak))  # type: ignore[misc]
        peaks.append(seen[-1])
        assert peaks[-1] == settled.budget.cache_bytes(settled.sizes, 1, 4) <= settled.kv
    assert peaks[0] == peaks[1]
    assert settled.kv_unbounded == 201 * FRAME * 2 * LAYERS * HEADS * DIM * 4


def test_frames_that_are_given_are_history_of_their_own() -> None:
    settled = film(10, given=1)
    assert [settled.schedule.span(index) for index in range(settled.schedule.chunks)] == [(0, 1), (1, 3), (4, 3), (7, 3)]
    for got, expected in zip(attended(settled), over(settled, lambda before: list(range(before))), strict=True):
        torch.testing.assert_close(got["a"], expected)


def test_a_branch_that_runs_again_in_an_evaluation_leaves_nothing() -> None:
    def run(again: bool) -> Tensor:
        cache = SequentialCache(film(6))
        for start, clean in [(0, False), (0, True), (3, False)]:
            cache.begin(start, CHUNK, clean)
            first = evaluated(cache, start, clean)
            if again:
                evaluated(cache, start, clean, 100)
        return first

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize(("budget", "again"), [(ALL, [0, 1, 2]), (7, [0, 1, 2]), (6, [0, 1, 2]), (4, [0, 2])])
@pytest.mark.parametrize("dtype", ["as computed", "int8"])
def test_history_that_is_made_anew_is_that_of_a_film_of_the_chunks_that_were_left(budget: float, again: list[int], dtype: str) -> None:
    """Against a cache that has seen no other chunks, and none of them noisy; what was given up before stays so."""
    settled = film(15, budget, sink=1, dtype=dtype)

    def show(cache: SequentialCache, chunks: list[int], seed: int) -> None:
        for index in chunks:
            cache.begin(index * CHUNK, CHUNK, True)
            evaluated(cache, index * CHUNK, True, seed)

    switched, fresh = SequentialCache(settled), SequentialCache(settled)
    show(switched, [0, 1, 2], 0)
    assert [chunk.index for chunk in switched.restart()] == again
    assert switched.store.bytes == 0
    fresh.store.gone = frozenset({0, 1, 2}).difference(again)
    for cache in (switched, fresh):
        show(cache, again, 50)
        cache.begin(9, CHUNK, False)
    assert torch.equal(evaluated(switched, 9, False, 50), evaluated(fresh, 9, False, 50))
    assert switched.kept == fresh.kept


def test_before_the_first_chunk_there_is_nothing_to_make_anew() -> None:
    assert SequentialCache(film(9)).restart() == ()


def test_freed_it_holds_nothing() -> None:
    cache = SequentialCache(film(9, 4))
    cache.begin(0, CHUNK, False)
    q, k, v = turned(0, CHUNK, 0, False, 0)
    cache.attention(("a",))(0, q, k, v, q.transpose(1, 2).flatten(2))
    assert cache.store.bytes > 0
    cache.free()
    assert cache.store.bytes == 0 < cache.peak


@pytest.mark.parametrize(
    ("start", "frames", "sentence"),
    [
        (3, 3, "chunk 1 was not evaluated from its clean latent"),
        (1, 3, "3 latent frames from number 1 on are none of the film's chunks"),
        (3, 2, "2 latent frames from number 3 on are none of the film's chunks"),
    ],
)
def test_a_sampler_that_goes_another_way_is_told(start: int, frames: int, sentence: str) -> None:
    cache = SequentialCache(film(9))
    cache.begin(0, CHUNK, False)
    evaluated(cache, 0, False)
    with pytest.raises(ValueError, match=sentence):
        cache.begin(start, frames, False)


def test_a_text_that_is_left_out_at_the_end_of_a_chunk_is_told() -> None:
    cache = SequentialCache(film(9, branches=2))
    cache.begin(0, 3, False)
    cache.attention(("a", "b"))
    cache.begin(0, 3, True)
    cache.attention(("a",))
    with pytest.raises(ValueError, match="with every text of guidance"):
        cache.begin(3, 3, False)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"budget": 3}, r"a budget of 0\.75 seconds is 3\.0 latent frames, but history needs 4"),
        ({"given": 4}, "4 latent frames are given at the start, and a chunk has 3"),
    ],
)
def test_what_cannot_be_made_is_refused_before_a_run(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        film(9, **settings)  # type: ignore[arg-type]


def test_odd_sizes_and_other_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16 pixels"):
        SequentialFilm.settled(NETWORK, Compressor(StreamingLLM()), 9, 3, 2, (5, 4))
    with pytest.raises(ValueError, match="heads of 128 channels"):
        CausalWan(2, 128, 2)


def test_the_forecast_says_what_the_cache_takes() -> None:
    kept, taken, _ = film(21, 7).forecast()
    assert kept.startswith("history is kept to 28 tokens per layer: 7 latent frames of up to 18")
    assert taken.endswith("MiB without the budget)")
    assert film(9).forecast()[0].startswith("the budget saves nothing here")
