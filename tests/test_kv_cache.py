"""The KV cache: what a chunk sees through it, how branches lie in it, what it costs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from flowcache_core.kv.cache import CachedAttention, KVCache, KVSizes, KVStore
from flowcache_core.kv.layout import Layout
from flowcache_core.models.adapter import Call
from flowcache_core.models.attention import BlockCausal, bidirectional
from flowcache_core.models.skyreels import HEAD_DIM, SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas, timestep
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler, Solver, UniPC
from tests.driven import Driven

TOKENS = 4
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def store_of(*sizes: int) -> KVStore:
    return KVStore(KVSizes(*sizes), Layout(ChunkSchedule(6, 3, 2), 1))


def qkv(tokens: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, batch, 2, tokens, 16)
    return q, k, v


@pytest.mark.parametrize("frames", [9, 8, 7])
@pytest.mark.parametrize("window", [None, 1, 2])
def test_block_causal_attention_over_a_film_equals_chunks_against_the_cache(
    net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor], frames: int, window: int | None
) -> None:
    x, text, sigma = noise_of(frames), net.text_kv(texts[:1]), 0.6
    schedule, adapter = ChunkSchedule(frames, 3, 50, 50, window), SkyReelsAdapter(net)
    ends = [sum(schedule.span(k)) * TOKENS for k in range(schedule.chunks)]
    whole = net(x, torch.tensor([[timestep(sigma)]]), text, BlockCausal(ends, window))

    cache = KVCache(("a",), KVSizes(1, adapter.layers, adapter.heads, adapter.head_dim, frames * TOKENS))
    for k in range(schedule.chunks):
        start, count = schedule.span(k)
        oldest = max(0, k - (window or schedule.chunks) + 1) * 3
        attend = CachedAttention(cache, slice(None), oldest * TOKENS, start * TOKENS, (start + count) * TOKENS)
        part, _ = adapter.forward(Call(x[:, :, start : start + count], sigma, Chunk(k, start, count, 0, 50), text, 24), attend)
        torch.testing.assert_close(part, whole[:, :, start : start + count], **CLOSE)


def test_one_chunk_of_everything_is_bidirectional() -> None:
    q, k, v = qkv(12)
    torch.testing.assert_close(BlockCausal([12])(0, q, k, v, q), bidirectional(0, q, k, v, q), **CLOSE)


def test_block_causal_attention_equals_attention_under_a_mask() -> None:
    (q, k, v), ends, window = qkv(10), [3, 6, 8, 10], 2
    chunk = torch.tensor([sum(t >= e for e in ends) for t in range(10)])
    distance = chunk[:, None] - chunk[None, :]
    mask = (distance >= 0) & (distance < window)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(BlockCausal(ends, window)(0, q, k, v, q), expected, **CLOSE)


def test_no_chunk_sees_the_future(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    x, text, t = noise_of(9), net.text_kv(texts[:1]), torch.tensor([[500]])
    later = x.clone()
    later[:, :, 6:] += 1
    a, b = (net(film, t, text, BlockCausal([12, 24, 36])) for film in (x, later))
    assert torch.equal(a[:, :, :6], b[:, :, :6])
    assert not torch.allclose(a[:, :, 6:], b[:, :, 6:])


@pytest.mark.parametrize("ar_step", [0, 2, 6])
@pytest.mark.parametrize(("frames", "solver"), [(9, Euler()), (8, UniPC())])
def test_skipping_idle_chunks_is_exact(
    cached: Callable[..., tuple[Tensor, object]],
    dense: Callable[..., Tensor],
    noise_of: Callable[..., Tensor],
    ar_step: int,
    frames: int,
    solver: Solver,
) -> None:
    schedule = ChunkSchedule(frames, 3, 6, ar_step)
    film, _ = cached(noise_of(frames), schedule, solver)
    torch.testing.assert_close(film, dense(noise_of(frames), schedule, solver), rtol=1e-4, atol=1e-4)


def sample_branches(net: SkyReelsV2, texts: Tensor, noise: Tensor, groups: Callable[[Chunk], tuple[tuple[int, ...], ...]]) -> Tensor:
    """A guided film; `groups` says which branches share a batch at a chunk and step."""
    schedule, sigmas = ChunkSchedule(noise.shape[2], 3, 4, 2), flow_sigmas(4)
    with Session(SkyReelsAdapter(net), schedule, sigmas, (4, 4)) as session:

        def predict(x: Tensor, chunk: Chunk) -> Tensor:
            out: dict[int, Tensor] = {}
            for group in groups(chunk):
                velocity = session.denoise(x.repeat(len(group), 1, 1, 1, 1), chunk, texts[list(group)], group)
                out.update(zip(group, velocity.split(1), strict=True))
            return out[1] + 3 * (out[0] - out[1])

        return sample_chunks(Driven(predict, session), noise, schedule, sigmas, Euler())


@pytest.mark.parametrize(
    "groups",
    [
        lambda chunk: ((0,), (1,)),
        lambda chunk: ((1, 0),),
        lambda chunk: ((0, 1),) if chunk.step < 2 else ((0,), (1,)),
        lambda chunk: ((0,), (1,)) if chunk.step < 2 else ((0, 1),),
        lambda chunk: ((0, 1),) if chunk.step % 2 else ((1, 0),),
    ],
    ids=["apart", "swapped", "parting", "joining", "swapping"],
)
def test_how_branches_are_batched_changes_nothing(
    net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor], groups: Callable[[Chunk], tuple[tuple[int, ...], ...]]
) -> None:
    together = sample_branches(net, texts, noise_of(6), lambda chunk: ((0, 1),))
    torch.testing.assert_close(sample_branches(net, texts, noise_of(6), groups), together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("late", [lambda chunk: chunk.index > 0, lambda chunk: chunk.index > 0 or (chunk.step > 1 and not chunk.committing)],
                         ids=["from the second chunk on", "from the third step on"])  # fmt: skip
def test_a_branch_without_history_is_refused_and_one_that_begins_late_in_the_first_chunk_is_not(
    net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor], late: Callable[[Chunk], bool]
) -> None:
    schedule, sigmas = ChunkSchedule(6, 3, 4, 4), flow_sigmas(4)
    sees_all = late(schedule.at(0, 3))
    with Session(SkyReelsAdapter(net), schedule, sigmas, (4, 4)) as session:

        def predict(x: Tensor, chunk: Chunk) -> Tensor:
            branches = (0, 1) if late(chunk) else (0,)
            out = session.denoise(x.repeat(len(branches), 1, 1, 1, 1), chunk, texts[list(branches)], branches)
            return out[:1]

        refused = pytest.raises(
            ValueError, match=r"chunk 2 is guided by a branch that did not run for chunk 1, on which it looks back: .* or set cfg to 1"
        )
        with nullcontext() if sees_all else refused:
            sample_chunks(Driven(predict, session), noise_of(6), schedule, sigmas, Euler())


@pytest.mark.parametrize("given", [0, 3])
def test_a_branch_that_sees_no_other_chunk_needs_no_history(given: int) -> None:
    schedule = ChunkSchedule(6, 3, 2, 2, prefix=given)
    for seen in (lambda chunk, branch: 1 if branch == "alone" else None, None):
        store = KVStore(KVSizes(1, 1, 1, 4, 6), Layout(schedule, 1), seen=seen)
        store.attention(("text",), schedule.at(0, 2))
        store.attention(("text",), schedule.at(1, 0))
        with nullcontext() if seen else pytest.raises(ValueError, match="did not run for chunk 1"):
            store.attention(("text", "alone"), schedule.at(1, 0))


def test_films_of_a_batch_do_not_mix(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    schedule, sigmas = ChunkSchedule(6, 3, 4, 2), flow_sigmas(4)

    def film(noise: Tensor) -> Tensor:
        n = len(noise)
        with Session(SkyReelsAdapter(net), schedule, sigmas, (4, 4), films=n) as session:
            context = texts.repeat_interleave(n, 0)

            def predict(x: Tensor, chunk: Chunk) -> Tensor:
                cond, uncond = session.denoise(x.repeat(2, 1, 1, 1, 1), chunk, context, (0, 1)).chunk(2)
                return uncond + 3 * (cond - uncond)

            return sample_chunks(Driven(predict, session), noise, schedule, sigmas, Euler())

    noise = noise_of(6, batch=2)
    torch.testing.assert_close(film(noise), torch.cat([film(n) for n in noise.split(1)]), rtol=1e-4, atol=1e-4)


def test_branches_lie_in_the_batch_in_their_order_and_only_side_by_side() -> None:
    cache = KVCache(("a", "b", "c"), KVSizes(2, 1, 1, 4, 8))
    assert cache.batch_of(("a", "b", "c")) == slice(0, 6)
    assert cache.batch_of(("b",)) == slice(2, 4)
    assert cache.batch_of(("b", "c")) == slice(2, 6)
    assert cache.batch_of(("c", "b")) is None
    assert cache.batch_of(("a", "c")) is None
    assert cache.batch_of(("d",)) is None


def test_a_cache_adopts_the_branches_it_shares_with_another() -> None:
    q, k, v = qkv(4)
    old, new = KVCache(("b",), KVSizes(1, 2, 2, 16, 4)), KVCache(("a", "b"), KVSizes(1, 2, 2, 16, 4))
    for layer in range(2):
        CachedAttention(old, slice(None), 0, 0, 4)(layer, q, k + layer, v, q)
    new.adopt(old)
    for layer in range(2):
        keys, values = new.layer(layer, k)
        assert torch.equal(keys[1:2], k + layer)
        assert torch.equal(values[1:2], v)


def test_a_chunk_writes_its_own_span_only() -> None:
    cache = KVCache(("a",), KVSizes(1, 1, 2, 16, 8))
    keys, values = cache.layer(0, torch.empty(0))
    keys.fill_(7)
    values.fill_(7)
    q, k, v = qkv(3)
    CachedAttention(cache, slice(None), 0, 2, 5)(0, q, k, v, q)
    assert torch.equal(keys[:, :, 2:5], k)
    assert torch.equal(values[:, :, 2:5], v)
    outside = torch.cat([keys[:, :, :2], keys[:, :, 5:], values[:, :, :2], values[:, :, 5:]], 2)
    assert (outside == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_two_buffers_per_layer_and_freeing_gives_them_back(dtype: torch.dtype) -> None:
    batch, layers, heads, dim, capacity = 2, 3, 2, 16, 10
    store = store_of(batch, layers, heads, dim, capacity)
    assert store.bytes == 0
    cache, mine = store.of(("a", "b"))
    assert store.bytes == 0
    like = torch.empty(0, dtype=dtype)
    cache.layer(0, like)
    assert store.bytes == 2 * layers * 2 * batch * heads * capacity * dim * like.element_size()
    assert len(cache.layer(1, like)[0][mine]) == 2 * batch
    store.free()
    assert store.bytes == 0
    assert cache.bytes == 0


def test_a_session_reports_the_bytes_of_its_cache(cached: Callable[..., tuple[Tensor, object]], noise_of: Callable[..., Tensor]) -> None:
    _, report = cached(noise_of(6), ChunkSchedule(6, 3, 2, 1))
    assert report.kv_peak_bytes == 2 * 2 * 6 * TOKENS * HEAD_DIM * 4  # type: ignore[attr-defined]


def test_joining_two_caches_frees_the_old_ones() -> None:
    store, like = store_of(1, 1, 1, 4, 8), torch.empty(0)
    for branch in ("a", "b"):
        store.of((branch,))[0].layer(0, like)
    apart = store.bytes
    store.of(("a", "b"))[0].layer(0, like)
    assert store.bytes == apart


@pytest.mark.parametrize(
    "groups",
    [
        (("a", "b"), ("b", "a"), ("a",), ("b",), ("a", "b")),
        (("a",), ("b",), ("a", "b"), ("b",), ("a",), ("b", "a")),
        (("a", "b", "c"), ("a", "c"), ("b",), ("a", "b", "c")),
        (("a", "b"), ("c",), ("b", "c"), ("a",), ("a", "b")),
    ],
)
def test_what_one_batch_of_branches_wrote_every_other_batch_reads(groups: tuple[tuple[str, ...], ...]) -> None:
    store, like = store_of(1, 1, 1, 4, 8), torch.empty(0)
    written: dict[str, int] = {}
    for turn, group in enumerate(groups):
        cache, mine = store.of(group)
        keys = cache.layer(0, like)[0][mine]
        assert [int(keys[i, 0, 0, 0]) for i, branch in enumerate(group) if branch in written] == [written[b] for b in group if b in written]
        keys.fill_(turn)
        written.update(dict.fromkeys(group, turn))
