"""Grouped-query attention: several query heads share a key head, as if each had a copy of it, and the cache holds one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flowcache_core.kv.cache import KVSizes, KVStore
from flowcache_core.kv.compressor import Budget, Compressor
from flowcache_core.kv.keeper import Keeper
from flowcache_core.kv.layout import Capacity, Layout, capacity
from flowcache_core.kv.policy import KVPolicy
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.kv.scores.even import Even
from flowcache_core.kv.scores.expected import ExpectedAttention, QueryMoments
from flowcache_core.kv.scores.importance import ImportanceRedundancy
from flowcache_core.kv.scores.key_norm import KeyNorm
from flowcache_core.kv.scores.r_kv import RKV
from flowcache_core.models.skyreels import HEAD_DIM, Rope
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.run.footprint import footprint
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.schedule import ChunkSchedule
from tests.test_kv_budget import FRAME, Sparse, budget
from tests.test_kv_scores import again, random_view

HEADS, GROUP, LAYERS, FILMS = 2, 3, 2, 2
BRANCHES = ("a", "b")
SCHEDULE = ChunkSchedule(18, 3, 3, 1, 3)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def passes() -> Iterator[Chunk]:
    """Every step of every chunk and, after its last, its clean pass."""
    for row in SCHEDULE.rows:
        for chunk in row.active:
            yield chunk
            if chunk.step == chunk.steps - 1:
                yield SCHEDULE.at(chunk.index, chunk.steps)


def outputs(kept: Budget | None, waits: bool, repeated: bool) -> list[Tensor]:
    """What attention returns throughout a film of random queries, keys and values; `repeated`: with a copy of the keys per query head."""
    heads, layout = HEADS * (GROUP if repeated else 1), Layout(SCHEDULE, FRAME, kept.slots if kept else None)
    room = capacity(SCHEDULE, FRAME, layout.budget)
    sizes = KVSizes(FILMS, LAYERS, heads, HEAD_DIM, room.total, room.history, room.active)
    keeper = Keeper(kept, SCHEDULE, LAYERS, FILMS, (2, 2), Rope()) if kept else None
    store, out = KVStore(sizes, layout, keeper, kept.cache_of(sizes, layout) if kept else None, lambda index: waits), []
    torch.manual_seed(3)
    for chunk in passes():
        count = chunk.frames * FRAME
        tokens = torch.tensor([1, 4, count - 1]) if waits and chunk.step == 2 else None
        attend = store.attention(BRANCHES, chunk, tokens)
        for layer in range(LAYERS):
            some = count if tokens is None else len(tokens)
            q = torch.randn(len(BRANCHES) * FILMS, some, HEADS * GROUP, HEAD_DIM).transpose(1, 2)
            k, v = torch.randn(2, len(BRANCHES) * FILMS, HEADS, some, HEAD_DIM)
            if repeated:
                k, v = (x.repeat_interleave(GROUP, 1) for x in (k, v))
            out.append(attend(layer, q, k, v, q.transpose(1, 2).flatten(2)))
            assert out[-1].shape == q.shape
        if chunk.committing and chunk.index < SCHEDULE.chunks - 1:
            store.forget(chunk.index)
            store.settle(chunk)
            if keeper:
                keeper.locate()
    return out


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    "kept",
    [None, budget(50 * FRAME), budget(5 * FRAME, FRAME, 3 * FRAME), budget(8 * FRAME, FRAME, 3 * FRAME, Even()),
     budget(6 * FRAME, FRAME, 3 * FRAME, dtype="int8"), budget(6 * FRAME, FRAME, 3 * FRAME, KeyNorm())],
    ids=["plain", "all", "sparse", "even", "int8", "scored"],
)  # fmt: skip
def test_attention_through_the_cache_equals_that_with_a_copy_of_the_keys_per_query_head(kept: Budget | None, waits: bool) -> None:
    for shared, copied in zip(outputs(kept, waits, False), outputs(kept, waits, True), strict=True):
        torch.testing.assert_close(shared, copied, **CLOSE)


EVERY = [kind() for kind in KV_POLICIES if kind.name != "salience"]
LARGEST = (ImportanceRedundancy.name, RKV.name)
"""These take the largest logit of the query heads that share a key head, by their formula; the others the mean."""


@pytest.mark.parametrize("policy", EVERY, ids=lambda policy: policy.name)
def test_a_score_of_grouped_queries_is_the_mean_of_those_with_a_copy_of_the_keys_per_query_head(policy: KVPolicy) -> None:
    view = random_view(heads=HEADS, group=GROUP)
    if policy.name in LARGEST:
        view = again(view, queries=view.queries[:, ::GROUP].repeat_interleave(GROUP, 1))
    copied = again(view, keys=view.keys.repeat_interleave(GROUP, 1), values=view.values.repeat_interleave(GROUP, 1))
    score, each = policy.score(again(view)), policy.score(copied)
    if each.shape[1] > 1:
        each = each.unflatten(1, (HEADS, GROUP)).mean(2)
    torch.testing.assert_close(score, each, **CLOSE)


@pytest.mark.parametrize(
    "width", [HEADS * GROUP * HEAD_DIM, HEADS * HEAD_DIM // 2, 10 * HEADS * GROUP * HEAD_DIM], ids=["filled", "narrower", "wider"]
)
def test_memory_for_queries_counts_query_heads_whatever_the_width(width: int) -> None:
    network = SimpleNamespace(layers=1, heads=HEADS, query_heads=HEADS * GROUP, head_dim=HEAD_DIM, width=width)
    view, policy = random_view(heads=HEADS, group=GROUP), ExpectedAttention()
    policy.score(view)
    moments = view.memory.of(QueryMoments, QueryMoments)
    sizes = KVSizes.of(network, len(view.keys), Capacity(1, 1, 1))  # type: ignore[arg-type]
    assert policy.holds(sizes, 1) == moments.mean.nbytes + moments.covariance.nbytes


def test_the_cache_and_what_is_said_of_it_count_key_heads_and_the_rest_the_width() -> None:
    sizes = {"layers": 4, "heads": HEADS, "head_dim": 16, "text_channels": 10, "tokens_per_frame": lambda h, w: h * w // 4}
    grouped = SimpleNamespace(**sizes, query_heads=HEADS * GROUP, width=40)
    token = 2 * 4 * HEADS * 16 * 2
    kept = Compressor(Sparse(), 40 * token / 2**30, "GiB").budget_for(grouped, SCHEDULE, (4, 4), 24, 1, 2)  # type: ignore[arg-type]
    assert kept.slots == 40
    said = footprint(grouped, SCHEDULE, (16, 4, 4), 2, 8, 2, Chunkwise(replay="residual"))  # type: ignore[arg-type]
    assert said.kv == 2 * capacity(SCHEDULE, FRAME).total * token
    assert said.predictions == 2 * 2 * 9 * FRAME * grouped.width * 2
    assert said.text == 8 * 10 * 2
    plain = SimpleNamespace(**sizes, query_heads=HEADS, width=40)
    room = capacity(SCHEDULE, FRAME, kept.slots)
    assert KVSizes.of(grouped, 1, room) == dataclasses.replace(KVSizes.of(plain, 1, room), group=GROUP)  # type: ignore[arg-type]
