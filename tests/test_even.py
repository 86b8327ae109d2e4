"""Even thinning: the sample is even at every density, and each of its slots counts for those that went."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowcache_core.kv import cache
from flowcache_core.kv.cache import CachedAttention, KVCache, KVSizes
from flowcache_core.kv.compressor import Budget
from flowcache_core.kv.keeper import Keeper, Middle
from flowcache_core.kv.scores.even import Even
from flowcache_core.kv.scores.random import Random
from flowcache_core.models.skyreels import HEAD_DIM, Rope, SkyReelsV2
from flowcache_core.sampling.schedule import ChunkSchedule
from tests.test_kv_budget import FRAME, budget, film
from tests.test_kv_scores import again, random_view

SIDE, FRAMES = 16, 48


def kept_of(share: float, layer: int = 0, first: int = 0) -> Tensor:
    """bool [FRAMES, SIDE, SIDE]: the best `share` of the tokens of a long film."""
    tokens = torch.arange(FRAMES * SIDE * SIDE).view(1, -1) + first * SIDE * SIDE
    view = again(random_view(), tokens=tokens, frame_tokens=SIDE * SIDE, grid=(SIDE, SIDE), layer=layer)
    score = Even().score(view)[0, 0]
    kept = torch.zeros(len(score), dtype=torch.bool)
    kept[score.topk(int(share * len(score))).indices] = True
    return kept.view(FRAMES, SIDE, SIDE)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("first", [0, 100_000])
def test_every_part_of_the_film_keeps_nearly_the_same_share(share: float, first: int) -> None:
    kept = kept_of(share, first=first).double()
    for part in (kept.mean((1, 2)), kept.mean((0, 2)), kept.mean((0, 1))):
        assert (part - share).abs().max() < 0.03
    blocks = kept.unfold(0, 4, 4).unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4, 5))
    by_chance = math.sqrt(share * (1 - share) / 64)
    assert blocks.std() < 0.5 * by_chance


def test_a_sparser_sample_is_part_of_a_denser_one() -> None:
    dense, sparse = kept_of(0.4), kept_of(0.1)
    assert not (sparse & ~dense).any()


def test_layers_keep_different_tokens() -> None:
    one, other = kept_of(0.25, layer=0), kept_of(0.25, layer=1)
    assert int((one & other).sum()) < 0.5 * int(one.sum())


def keeper_of(slots: int, sink: int = FRAME, recent: int = 3 * FRAME, policy: object = None) -> Keeper:
    return Keeper(budget(slots, sink, recent, policy or Even()), ChunkSchedule(90, 3, 2, 2, 2), 1, 1, (2, 2), Rope())


@pytest.mark.parametrize(("chunks", "slots", "each"), [(3, 24, 20 / 8), (4, 24, 4.0), (9, 24, 4.0), (2, 24, 1.0), (4, 16, 1.0)])
def test_what_is_kept_stands_for_what_went_up_to_a_limit(chunks: int, slots: int, each: float) -> None:
    """Of 3 chunks of 12 tokens 4 + 12 are protected; 8 slots stand for the other 20. Where no middle is left nothing stands for it."""
    keeper = keeper_of(slots)
    for index in range(chunks):
        chunk = keeper.schedule.at(index, 2)
        keeper.settle(chunk, 0, min((index + 1) * 12, slots))
    assert math.exp(keeper.middle.weight) == pytest.approx(each)
    assert (keeper.middle.start, keeper.middle.end) == ((FRAME, slots - 3 * FRAME) if each > 1 else (0, 0))


def test_other_scores_stand_for_themselves() -> None:
    keeper = keeper_of(24, policy=Random())
    for index in range(4):
        keeper.settle(keeper.schedule.at(index, 2), 0, min((index + 1) * 12, 24))
    assert keeper.middle == Middle()


@pytest.mark.parametrize("segments", [[], [(0, 5, 4), (5, 6, 2), (6, 15, 1)], [(0, 3, 2)]])
@pytest.mark.parametrize("queries", [1, 30, 100])
def test_a_slot_that_stands_for_three_counts_as_three_copies_of_it(segments: list[tuple[int, int, int]], queries: int) -> None:
    keeper = keeper_of(24)
    attend = CachedAttention(KVCache((0,), KVSizes(1, 1, 1, HEAD_DIM, 36)), slice(0, 1), 0, 0, 0, None, keeper)
    q, k, v = torch.randn(1, 2, queries, HEAD_DIM), *torch.randn(2, 1, 2, 30, HEAD_DIM)
    keeper.middle = Middle(4, 12, math.log(3))
    copies = torch.ones(30, dtype=torch.long)
    copies[4:12] = 3
    turned = k.clone()
    for start, end, farther in segments:
        turned[:, :, start:end] = Rope().turn(k[:, :, start:end], Rope().shift(farther))
    exact = torch.nn.functional.scaled_dot_product_attention(q, turned.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2))
    torch.testing.assert_close(attend._across(keeper, segments, q, k, v), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", [[], [(0, 5, 4), (5, 9, 3), (9, 15, 1)]])
@pytest.mark.parametrize("weight", [0.0, math.log(3)])
@pytest.mark.parametrize(("first", "middle"), [(0, (4, 12)), (5, (5, 12)), (5, (2, 4)), (5, (2, 20))])
def test_one_call_and_segments_agree(
    segments: list[tuple[int, int, int]], weight: float, first: int, middle: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four query heads share two key heads, and what is seen begins within history."""
    keeper = keeper_of(24)
    keeper.middle = Middle(*middle, weight)
    attend = CachedAttention(KVCache((0,), KVSizes(1, 1, 2, HEAD_DIM, 40)), slice(0, 1), 0, 0, 0, None, keeper)
    q, k, v = torch.randn(1, 4, 9, HEAD_DIM), *torch.randn(2, 1, 2, 30, HEAD_DIM)
    segments, outs = [segment for segment in segments if segment[0] >= first], []
    for in_one_call in (True, False):
        monkeypatch.setattr(cache, "in_one_call", lambda *args, chosen=in_one_call: chosen)
        outs.append(attend._across(keeper, segments, q, k, v, first))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_ranges_are_cut_at_the_middle() -> None:
    middle = Middle(4, 12, 0.5)
    assert middle.cut(0, 20) == [(0, 4, 0.0), (4, 12, 0.5), (12, 20, 0.0)]
    assert middle.cut(4, 9) == [(4, 9, 0.5)]
    assert middle.cut(12, 20) == [(12, 20, 0.0)]
    assert Middle().cut(3, 7) == [(3, 7, 0.0)]


def test_a_film_under_a_budget_is_the_same_twice_and_whole_where_all_is_kept(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    schedule, noise = ChunkSchedule(15, 3, 3, 2), noise_of(15)

    def under(kept: Budget | None) -> Tensor:
        return film(net, texts, noise, schedule, kept)[0]

    whole = under(None)
    assert torch.equal(under(budget(15 * FRAME, FRAME, 3 * FRAME, Even())), whole)
    thin = under(budget(6 * FRAME, FRAME, 3 * FRAME, Even()))
    assert torch.equal(under(budget(6 * FRAME, FRAME, 3 * FRAME, Even())), thin)


def test_slots_that_count_for_others_are_nearer_to_all_of_them() -> None:
    """A sixth of many alike keys beside as many as remain of another kind, for queries that look at both."""
    keeper = keeper_of(24)
    attend = CachedAttention(KVCache((0,), KVSizes(1, 1, 1, HEAD_DIM, 400)), slice(0, 1), 0, 0, 0, None, keeper)
    q, k, v = torch.randn(1, 2, 50, HEAD_DIM), *torch.randn(2, 1, 2, 400, HEAD_DIM)
    v[:, :, 50:350] += 1
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    slots = torch.cat([torch.arange(50), torch.arange(50, 350, 6), torch.arange(350, 400)])
    errors = []
    for weight in (0.0, math.log(6)):
        keeper.middle = Middle(50, 100, weight)
        errors.append(float((attend._across(keeper, [], q, k[:, :, slots], v[:, :, slots]) - exact).norm()))
    assert errors[1] < 0.7 * errors[0]
