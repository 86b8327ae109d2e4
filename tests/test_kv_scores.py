"""KV scores: each against the published formula, written out in float64 with all pairs of queries and keys, and what holds for all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowcache_core.kernels.columns import column_sums
from flowcache_core.kernels.similarity import cosine_to_mean, mean_similarity, mean_similarity_but_to_newest
from flowcache_core.kv.policy import KVPolicy, KVView
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.kv.scores.expected import ExpectedAttention, QueryMoments, expected
from flowcache_core.kv.scores.h2o import H2O
from flowcache_core.kv.scores.importance import ImportanceRedundancy
from flowcache_core.kv.scores.key_norm import KeyNorm
from flowcache_core.kv.scores.keydiff import KeyDiff
from flowcache_core.kv.scores.r_kv import RKV
from flowcache_core.kv.scores.random import Random
from flowcache_core.kv.scores.snapkv import SnapKV
from flowcache_core.kv.scores.streaming import StreamingLLM
from flowcache_core.memory import RunMemory
from flowcache_core.models.attention import BlockCausal
from flowcache_core.models.skyreels import HEAD_DIM, Rope, SkyReelsV2

GRID, FRAME, CHUNK = (4, 4), 16, 3
NEW = CHUNK * FRAME
CLOSE = {"rtol": 2e-5, "atol": 1e-6}

Source = Callable[..., KVView]


def view_of(keys: Tensor, values: Tensor, queries: Tensor, tokens: Tensor | None = None, **kw: Any) -> KVView:
    batch, _, n, _ = keys.shape
    tokens = torch.arange(n, device=keys.device).expand(batch, n) if tokens is None else tokens
    rest = {
        "layer": 0,
        "hidden": queries.new_zeros(batch, queries.shape[2], 8),
        "carried": torch.zeros(batch, n, device=keys.device),
        "frame_tokens": FRAME,
        "grid": GRID,
        "rotary": Rope(),
        "memory": RunMemory(),
        "shared": RunMemory(),
    }
    return KVView(keys=keys, values=values, queries=queries, tokens=tokens, new=queries.shape[2], **{**rest, **kw})


def again(view: KVView, **kw: Any) -> KVView:
    """The same view, with a memory of its own."""
    return dataclasses.replace(view, memory=RunMemory(), shared=RunMemory(), **kw)


def random_view(frames: int = 9, heads: int = 2, group: int = 1, lean: float = 0.3) -> KVView:
    """A film and its other branch; what their keys and queries have in common is `lean`; some older slots are gone."""
    n = frames * FRAME
    tokens = torch.stack([torch.cat([torch.randperm(n - NEW)[: n - NEW - 13].sort().values, torch.arange(n - NEW, n)]) for _ in range(2)])
    keys, values = torch.randn(2, 2, heads, tokens.shape[1], HEAD_DIM)
    queries = torch.randn(2, heads * group, NEW, HEAD_DIM)
    return view_of(keys + lean * keys[:, :, :1], values, queries + lean * keys[:, :1, :1], tokens)


@pytest.fixture
def source(make_net: Callable[..., SkyReelsV2], texts: Tensor, noise_of: Callable[..., Tensor]) -> Source:
    """Views of every kind, by name."""

    def captured() -> KVView:
        net, seen = make_net(), list[tuple[Tensor, Tensor, Tensor, Tensor]]()
        for name, p in net.named_parameters():
            if ".self_attn.norm_" in name:  # with even weights all keys of a single head are equally long
                p.uniform_(0.5, 1.5)
        attend = BlockCausal([NEW, 2 * NEW, 3 * NEW])

        def note(layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
            seen.append((q, k, v, x))
            return attend(layer, q, k, v, x)

        net(noise_of(9, side=8), torch.tensor([[0]]), net.text_kv(texts[:1]), note)
        q, k, v, x = seen[1]
        return view_of(k, v, q[:, :, -NEW:], layer=1, hidden=x[:, -NEW:])

    def make(kind: str) -> KVView:
        return {"real": captured, "random": random_view, "grouped": lambda: random_view(group=3)}[kind]()

    return make


# the published formulas, in float64, with every matrix in full


def logits64(view: KVView, last: int) -> Tensor:
    """[B, H, G, W, N]."""
    q, k = view.queries[:, :, -last:].double(), view.keys.double()
    group = q.shape[1] // k.shape[1]
    each = torch.stack([q[:, h] @ k[:, h // group].mT / math.sqrt(q.shape[-1]) for h in range(q.shape[1])], 1)
    return each.view(q.shape[0], k.shape[1], group, *each.shape[2:])


def cosines64(k: Tensor) -> Tensor:
    u = k.double() / (k.double().norm(dim=-1, keepdim=True) + 1e-8)
    c = u @ u.mT
    c.diagonal(dim1=-2, dim2=-1).zero_()
    return c


def mean_attention64(view: KVView, last: int) -> Tensor:
    return logits64(view, last).softmax(-1).mean((2, 3))


def around(x: Tensor, kernel: int, largest: bool) -> Tensor:
    half, n = kernel // 2, x.shape[-1]
    if largest:
        return torch.stack([x[..., max(0, j - half) : j + half + 1].amax(-1) for j in range(n)], -1)
    return torch.stack([x[..., max(0, j - half) : j + half + 1].sum(-1) / kernel for j in range(n)], -1)


def importance64(view: KVView, last: int) -> Tensor:
    return around(logits64(view, last).amax(2).softmax(-1).mean(2), 7, True)


def importance_redundancy64(view: KVView, last: int) -> Tensor:
    return 0.07 * importance64(view, last) - 0.93 * cosines64(view.keys).mean(-2).softmax(-1)


def r_kv64(view: KVView, alike: float = 0.5) -> Tensor:
    c = cosines64(view.keys)
    for one in c.flatten(0, 2):
        if (one > alike).any():
            one[max(j for j, value in enumerate(one.tolist()) if value > alike)] = 0
    return 0.07 * importance64(view, 8) - 0.93 * c.mean(-2).softmax(-1)


def key_diff64(view: KVView) -> Tensor:
    k = view.keys.double()
    return -torch.cosine_similarity(k, (k / k.norm(dim=-1, keepdim=True)).mean(2, keepdim=True), dim=-1)


def rotation64(frame: int, y: int, x: int) -> Tensor:
    """The whole matrix that turns a vector at this position: 22 pairs of channels for time, 21 for height, 21 for width."""
    angles = [p * 10000.0 ** (-2 * i / size) for p, size in ((frame, 44), (y, 42), (x, 42)) for i in range(size // 2)]
    return torch.block_diag(*(torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64) for a in angles))


def expected64(view: KVView, ahead: int = 10) -> Tensor:
    spots = [(y, x) for y in range(GRID[0]) for x in range(GRID[1])]
    place = torch.stack([rotation64(0, *spot) for spot in spots])
    first = int(view.tokens[0, -NEW]) // FRAME
    here = torch.cat([rotation64(first + f, 0, 0) @ place for f in range(CHUNK)])
    to_come = torch.stack([rotation64(first + CHUNK + a, 0, 0) @ place.mean(0) for a in range(ahead)]).mean(0)
    group = view.queries.shape[1] // view.keys.shape[1]
    out = torch.zeros(view.keys.shape[:3], dtype=torch.float64)
    for r in range(len(out)):
        for h, q in enumerate(view.queries[r].double()):
            plain = torch.einsum("tji,tj->ti", here, q)
            mean, sigma = to_come @ plain.mean(0), to_come @ torch.cov(plain.T, correction=0) @ to_come.T
            k = view.keys[r, h // group].double()
            quadratic = torch.einsum("ni,ij,nj->n", k, sigma, k) / HEAD_DIM / 2
            out[r, h // group] += (k @ mean / math.sqrt(HEAD_DIM) + quadratic).softmax(-1) / group
    return out * view.values.double().norm(dim=-1)


PUBLISHED: list[tuple[KVPolicy, Callable[[KVView], Tensor]]] = [
    (ImportanceRedundancy(), lambda view: importance_redundancy64(view, FRAME)),
    (ImportanceRedundancy(queries="token"), lambda view: importance_redundancy64(view, 50)),
    (ImportanceRedundancy(queries="chunk"), lambda view: importance_redundancy64(view, NEW)),
    (RKV(), r_kv64),
    (RKV(alike=0.1), lambda view: r_kv64(view, 0.1)),
    (SnapKV(), lambda view: around(mean_attention64(view, 64), 5, False)),
    (SnapKV(window=20, kernel=3), lambda view: around(mean_attention64(view, 20), 3, False)),
    (H2O(), lambda view: mean_attention64(view, NEW) * NEW + view.carried[:, None].double()),
    (StreamingLLM(), lambda view: view.tokens[:, None].double() - view.tokens[:, None].amax(-1, keepdim=True)),
    (KeyDiff(), key_diff64),
    (KeyNorm(), lambda view: -view.keys.double().norm(dim=-1)),
    (ExpectedAttention(), expected64),
]
NAMED = [f"{policy.name}{i}" for i, (policy, _) in enumerate(PUBLISHED)]
every_policy = pytest.mark.parametrize("policy", [kind() for kind in KV_POLICIES if kind.name != "salience"], ids=lambda policy: policy.name)


@pytest.mark.parametrize("kind", ["real", "random", "grouped"])
@pytest.mark.parametrize(("policy", "formula"), PUBLISHED, ids=NAMED)
def test_a_score_is_the_published_formula_and_keeps_its_slots(
    policy: KVPolicy, formula: Callable[[KVView], Tensor], source: Source, kind: str
) -> None:
    view = source(kind)
    view = again(view, carried=torch.rand(view.tokens.shape))
    score, exact = policy.score(view), formula(view)
    torch.testing.assert_close(score.double(), exact, **CLOSE)
    n = score.shape[-1]
    for keep in (n // 4, n // 2, 3 * n // 4):
        last = exact.topk(keep).values[..., -1:]
        kept = exact.gather(-1, score.topk(keep).indices)
        indistinguishable = 4 * torch.finfo(torch.float32).eps * last.abs()
        assert (kept >= last - indistinguishable).all()
        assert (indistinguishable < 1e-3 * (exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True))).all()


# what holds for all scores


@every_policy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_float32_finite_and_one_per_slot(policy: KVPolicy, dtype: torch.dtype) -> None:
    view = random_view(group=2)
    view = again(view, **{name: getattr(view, name).to(dtype) for name in ("keys", "values", "queries")})
    score = policy.score(view)
    assert score.dtype == torch.float32
    assert score.shape in ((2, 2, view.tokens.shape[1]), (2, 1, view.tokens.shape[1]))
    assert score.isfinite().all()


@every_policy
def test_a_score_asked_twice_is_the_same(policy: KVPolicy) -> None:
    view = random_view()
    assert torch.equal(policy.score(again(view)), policy.score(again(view)))


@every_policy
def test_films_and_branches_do_not_mix(policy: KVPolicy) -> None:
    view = random_view()
    whole = policy.score(again(view))
    for r in range(2):
        alone = {name: getattr(view, name)[r : r + 1] for name in ("keys", "values", "queries", "hidden", "tokens", "carried")}
        torch.testing.assert_close(policy.score(again(view, **alone)), whole[r : r + 1], **CLOSE)


@every_policy
def test_no_score_waits_for_the_device(policy: KVPolicy) -> None:
    view = random_view()
    tensors = {f.name: getattr(view, f.name) for f in dataclasses.fields(view) if isinstance(getattr(view, f.name), Tensor)}
    score = policy.score(again(view, **{name: value.to("meta") for name, value in tensors.items()}))
    assert score.is_meta
    assert score.shape[-1] == view.tokens.shape[1]


@every_policy
def test_a_key_of_length_zero_has_a_score(policy: KVPolicy) -> None:
    view = random_view()
    keys = view.keys.clone()
    keys[:, :, [0, 5]] = 0
    assert policy.score(again(view, keys=keys)).isfinite().all()
    assert policy.score(again(view, keys=torch.zeros_like(keys))).isfinite().all()


@pytest.mark.parametrize(
    "policy",
    [ImportanceRedundancy(kernel=1), SnapKV(kernel=1), H2O(), StreamingLLM(), KeyDiff(), KeyNorm(), ExpectedAttention(), Random()],
    ids=lambda policy: policy.name,
)
def test_permuting_slots_permutes_scores_that_do_not_look_at_neighbours(policy: KVPolicy) -> None:
    view = random_view()
    old = view.tokens.shape[1] - NEW
    order = torch.cat([torch.randperm(old), torch.arange(old, old + NEW)])
    moved = {name: getattr(view, name)[:, order] for name in ("tokens", "carried")} | {
        name: getattr(view, name)[:, :, order] for name in ("keys", "values")
    }
    torch.testing.assert_close(policy.score(again(view, **moved)), policy.score(again(view))[..., order], **CLOSE)


@pytest.mark.parametrize("policy", [RKV, ImportanceRedundancy, SnapKV])
def test_an_even_kernel_is_refused_with_its_odd_neighbours(policy: type[RKV]) -> None:
    with pytest.raises(ValueError, match=r"kernel is 6: .* use 5 or 7"):
        policy(kernel=6)


def test_settings_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lam is 1\.5: it must lie between 0\.0 and 1\.0"):
        ImportanceRedundancy(lam=1.5)
    with pytest.raises(ValueError, match="queries is 'row': use one of token, frame, chunk"):
        ImportanceRedundancy(queries="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ahead is 0"):
        ExpectedAttention(ahead=0)


def test_every_score_has_a_name_of_its_own_and_cannot_change() -> None:
    assert len({policy.name for policy in KV_POLICIES}) == len(KV_POLICIES)
    for kind in KV_POLICIES:
        assert hash(kind()) == hash(kind())
        with pytest.raises(dataclasses.FrozenInstanceError):
            kind().name = "other"


# attention


class Largest(TorchDispatchMode):
    """The most numbers that one tensor held."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("grouped", ["mean", "max"])
@pytest.mark.parametrize(("n", "queries", "group"), [(1, 1, 1), (7, 65, 1), (129, 63, 2), (64, 5, 3)])
def test_column_sums_add_up_to_the_queries(grouped: Any, n: int, queries: int, group: int) -> None:
    q, k = torch.randn(2, 2 * group, queries, 16) * 4, torch.randn(2, 2, n, 16)
    sums = column_sums(q, k, grouped)
    torch.testing.assert_close(sums.sum(-1), torch.full((2, 2), float(queries)))
    assert (sums >= 0).all()


@pytest.mark.parametrize("grouped", ["mean", "max"])
def test_query_heads_that_agree_count_as_one(grouped: Any) -> None:
    q, k = torch.randn(2, 3, 20, 16), torch.randn(2, 3, 50, 16)
    torch.testing.assert_close(column_sums(q.repeat_interleave(4, 1), k, grouped), column_sums(q, k))


@pytest.mark.parametrize("grouped", ["mean", "max"])
@pytest.mark.parametrize("at_most", [1, 1000, 4000, 10**6])
def test_column_sums_hold_a_bounded_number_of_scores(grouped: Any, at_most: int) -> None:
    q, k = torch.randn(2, 6, 40, 4), torch.randn(2, 3, 90, 4)
    with Largest() as seen:
        sums = column_sums(q, k, grouped, at_most)
    assert seen.numbers <= max(at_most, 2 * 90, q.numel(), k.numel())
    torch.testing.assert_close(sums, column_sums(q, k, grouped), rtol=1e-5, atol=1e-6)


def test_h2o_is_the_sum_over_the_history() -> None:
    film = torch.randn(3, 2, 3, 4 * NEW, HEAD_DIM)
    carried, expected_sums = torch.zeros(2, 0), torch.zeros(2, 3, 4 * NEW)
    for chunk in range(4):
        start, end = chunk * NEW, (chunk + 1) * NEW
        q, k, v = film[0, :, :, start:end], film[1, :, :, :end], film[2, :, :, :end]
        score = H2O().score(view_of(k, v, q, carried=torch.cat([carried, torch.zeros(2, NEW)], 1)))
        carried = score.mean(1)
        expected_sums[:, :, :end] += column_sums(q, k)
    torch.testing.assert_close(carried, expected_sums.mean(1))
    torch.testing.assert_close(carried.sum(1), torch.full((2,), 4.0 * NEW))


# redundancy


def test_a_copy_raises_the_redundancy_of_its_key_and_ties_with_it() -> None:
    keys = torch.randn(2, 3, 60, 32)
    copied = torch.cat([keys, keys[:, :, 20:21]], 2)
    before, after = mean_similarity(keys), mean_similarity(copied)
    assert (after[..., 20] > before[..., 20]).all()
    torch.testing.assert_close(after[..., 20], after[..., 60], rtol=0, atol=1e-7)


def test_of_keys_that_repeat_each_other_the_newest_is_the_least_redundant() -> None:
    keys = torch.randn(1, 2, 40, 64)
    keys[:, :, [11, 37]] = keys[:, :, 4:5] * torch.tensor([0.5, 2.0]).view(2, 1)
    spared = mean_similarity_but_to_newest(keys, 0.5)
    assert (spared[..., 37] < spared[..., 11] - 0.9 / 40).all()
    assert (spared[..., 37] < spared[..., 4] - 0.9 / 40).all()
    score = RKV(lam=0.0).score(view_of(keys, keys, keys[:, :, -16:]))
    assert (score[..., 37] > score[..., [4, 11]].amax(-1)).all()


def test_a_key_of_length_zero_is_alike_to_none() -> None:
    keys = torch.randn(1, 2, 50, 64) + 1
    keys[:, :, 9] = 0
    assert (mean_similarity(keys)[..., 9] == 0).all()
    assert (mean_similarity_but_to_newest(keys, 0.5)[..., 9] == 0).all()


def test_a_threshold_that_nothing_reaches_leaves_the_linear_form() -> None:
    keys = torch.randn(2, 3, 60, 32)
    torch.testing.assert_close(mean_similarity_but_to_newest(keys, 1.0), mean_similarity(keys), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("similarity", [mean_similarity, lambda k, *bound: mean_similarity_but_to_newest(k, 0.3, *bound)], ids=["linear", "pairs"])
@pytest.mark.parametrize("at_most", [1, 700])
def test_keys_are_compared_in_bounded_memory(similarity: Callable[..., Tensor], at_most: int) -> None:
    keys = torch.randn(1, 2, 80, 4) + 0.5
    with Largest() as seen:
        blockwise = similarity(keys, at_most)
    assert seen.numbers <= max(at_most, keys.numel())
    torch.testing.assert_close(blockwise, similarity(keys), rtol=1e-5, atol=1e-7)


class Reads(TorchDispatchMode):
    """How many numbers of a tensor operations have read, and the most that one tensor held that they made."""

    def __init__(self, of: Tensor) -> None:
        super().__init__()
        self.of, self.numbers, self.largest = of.untyped_storage().data_ptr(), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != self.of and func is not torch.ops.aten.new_zeros.default:
            self.numbers += sum(one.numel() for one in args if isinstance(one, Tensor) and one.untyped_storage().data_ptr() == self.of)
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("similarity", [mean_similarity, cosine_to_mean])
def test_linear_redundancy_reads_a_key_twice_and_compares_no_pairs(similarity: Callable[..., Tensor]) -> None:
    keys = torch.randn(2, 3, 200, 8).bfloat16()
    with Reads(keys) as seen:
        similarity(keys, 2 * 3 * 8 * 50)
    assert seen.numbers == 2 * keys.numel()
    assert seen.largest <= 2 * 3 * 8 * 50 < 200 * 200


# expectation


def test_moments_added_chunk_by_chunk_are_those_of_all_queries() -> None:
    parts = [torch.randn(2, 3, count, 8) * (1 + i) + i for i, count in enumerate((48, 16, 32))]
    moments, whole = QueryMoments(), torch.cat(parts, 2)
    for part in parts:
        moments.add(part)
    assert moments.count == 96
    torch.testing.assert_close(moments.mean, whole.mean(2))
    for r in range(2):
        for h in range(3):
            torch.testing.assert_close(moments.covariance[r, h], torch.cov(whole[r, h].T, correction=0))


def test_expected_attention_remembers_the_queries_of_earlier_chunks() -> None:
    view, policy = random_view(), ExpectedAttention()
    first = policy.score(view)
    moments = view.memory.of(QueryMoments, QueryMoments)
    assert moments.count == NEW
    later = policy.score(dataclasses.replace(view, queries=torch.randn_like(view.queries)))
    assert moments.count == 2 * NEW
    assert not torch.allclose(first, later)


def test_expected_attention_does_not_depend_on_when_the_film_begins() -> None:
    view, rope, policy, frames = random_view(), Rope(), ExpectedAttention(), 517
    moved = {name: rope.turn(getattr(view, name), rope.shift(frames)) for name in ("keys", "queries")}
    score = policy.score(again(view, tokens=view.tokens + frames * FRAME, **moved))
    torch.testing.assert_close(score, policy.score(again(view)), rtol=1e-3, atol=1e-6)


def test_expected_attention_is_what_a_normal_distribution_of_queries_gives() -> None:
    """E exp(q.k / sqrt(D)) over normal queries, estimated from many of them."""
    factor = torch.randn(1, 1, 16, 16, dtype=torch.float64) / 4
    mean, k = torch.randn(1, 1, 16), torch.randn(1, 1, 40, 16)
    q = mean.double() + torch.randn(1, 1, 100_000, 16, dtype=torch.float64) @ factor.mT
    mass = (q @ k.double().mT / 4).exp().mean(2)
    score = expected(k, mean, (factor @ factor.mT).float())
    torch.testing.assert_close(score.double(), mass / mass.sum(-1, keepdim=True), rtol=0.05, atol=1e-5)


def test_expectation_is_taken_in_bounded_memory() -> None:
    mean, root = torch.randn(1, 4, 8), torch.randn(1, 4, 8, 8)
    k = torch.randn(1, 2, 200, 8)
    with Largest() as seen:
        blockwise = expected(k, mean, root @ root.mT, 640)
    assert seen.numbers <= 2 * 2 * 200
    torch.testing.assert_close(blockwise, expected(k, mean, root @ root.mT))


# order and chance


def test_the_newest_tokens_score_highest_however_long_the_film() -> None:
    view = random_view()
    late = again(view, tokens=view.tokens + 2**33)
    score = StreamingLLM().score(late)
    assert (score.diff() < 0).sum() == 0
    assert (score.diff() > 0).all()
    assert (score[..., -1] == 0).all()


def test_chance_gives_a_token_the_same_number_whichever_slots_lie_beside_it() -> None:
    view, policy = random_view(), Random(7)
    score = policy.score(view)
    fewer = torch.arange(0, view.tokens.shape[1], 3)
    assert torch.equal(policy.score(again(view, tokens=view.tokens[:, fewer])), score[..., fewer])


def test_chance_is_even_and_differs_by_layer_and_seed() -> None:
    tokens = torch.arange(20_000).view(1, -1)
    view = random_view()
    draws = [Random(seed).score(again(view, tokens=tokens, layer=layer))[0, 0] for seed, layer in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for draw in draws:
        counts = torch.histc(draw, 20, 0, 1)
        assert (counts - 1000).square().sum() / 1000 < 43.8  # chi-squared, 19 degrees of freedom, one in a thousand
    far = torch.corrcoef(torch.stack([*draws, draws[0].roll(1), draws[0].roll(64)])) - torch.eye(6)
    assert far.abs().max() < 0.03
