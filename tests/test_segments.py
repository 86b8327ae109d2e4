"""Attention by segments: merged it is the attention over all keys."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowcache_core.kernels import segments
from flowcache_core.kernels.attention import attention
from flowcache_core.kernels.segments import attention_with_lse, has_flash, merge, products_with_lse
from flowcache_core.models.skyreels import HEAD_DIM, Rope

WithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
FORMS = (attention_with_lse, products_with_lse)
SPLITS = ([9], [1], [1, 8], [5, 1, 3], [64, 1, 63, 7], [2, 33, 1, 1, 17])


def qkv(queries: int, keys: int, dim: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(2, 3, queries, dim), torch.randn(2, 3, keys, dim), torch.randn(2, 3, keys, dim)
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Reference in float64."""
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


def by_segments(form: WithLse, q: Tensor, k: Tensor, v: Tensor, sizes: list[int]) -> Tensor:
    return merge([form(q, a, b) for a, b in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_merged_segments_equal_full_attention(form: WithLse, sizes: list[int]) -> None:
    q, k, v = qkv(7, sum(sizes))
    torch.testing.assert_close(by_segments(form, q, k, v, sizes).double(), exact(q, k, v)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_in_double_precision_only_double_rounding_is_left(form: WithLse) -> None:
    q, k, v = qkv(7, 30, dtype=torch.float64)
    torch.testing.assert_close(by_segments(form, q, k, v, [11, 1, 18]), exact(q, k, v)[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_merging_adds_no_more_than_two_roundings(form: WithLse, dtype: torch.dtype) -> None:
    q, k, v = qkv(33, 90, 32, dtype)
    out, expected = by_segments(form, q, k, v, [40, 1, 49]), exact(q, k, v)[0]
    assert out.dtype == dtype
    parts = torch.stack([exact(q, a, b)[0].abs() for a, b in zip(k.split([40, 1, 49], 2), v.split([40, 1, 49], 2), strict=True)]).amax(0)
    assert ((out.double() - expected).abs() <= torch.finfo(dtype).eps * parts + 1e-6).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [1, 5, 65])
def test_the_log_sum_exp_is_float32_and_right(form: WithLse, dtype: torch.dtype, keys: int) -> None:
    q, k, v = qkv(9, keys, dtype=dtype)
    out, lse = form(q, k, v)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, dtype, q.shape[:3], torch.float32)
    torch.testing.assert_close(lse.double(), exact(q, k, v)[1], rtol=1e-6, atol=1e-5)


def test_the_forms_agree_in_any_memory_layout() -> None:
    q, k, v = qkv(12, 40)
    q, k, v = q[:, :, 2:11], k.transpose(1, 2).contiguous().transpose(1, 2)[:, :, 5:], v[:, :, 5:]
    for one, other in zip(attention_with_lse(q, k, v), products_with_lse(q, k, v), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("held", [1, 100, 10_000])
def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    q, k, v = qkv(11, 13)
    whole = products_with_lse(q, k, v)
    monkeypatch.setattr(segments, "SCORES_AT_MOST", held)
    for one, other in zip(products_with_lse(q, k, v), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_query_heads_that_share_a_key_head_attend_as_if_each_had_a_copy(form: WithLse, dtype: torch.dtype, kv_heads: int) -> None:
    q = torch.randn(2, 9, 6, 16).transpose(1, 2).to(dtype)
    k, v = torch.randn(2, 2, kv_heads, 30, 16).to(dtype)
    repeated = [x.repeat_interleave(6 // kv_heads, 1) for x in (k, v)]
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    expected, lse = exact(q, *repeated)
    out, total = form(q, k, v)
    assert (out.shape, total.shape) == (q.shape, q.shape[:3])
    torch.testing.assert_close(out.double(), expected, **close)
    torch.testing.assert_close(total.double(), lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention(q, k, v).double(), expected, **close)
    torch.testing.assert_close(by_segments(form, q, k, v, [11, 1, 18]).double(), expected, **close)


def test_query_heads_that_do_not_divide_are_refused() -> None:
    q, k, v = torch.randn(1, 5, 4, 16), *torch.randn(2, 1, 2, 9, 16)
    for form in (attention, *FORMS):
        with pytest.raises(ValueError, match="5 query heads cannot share 2 key heads evenly"):
            form(q, k, v)


def test_a_device_without_flash_attention_is_found_out() -> None:
    assert not has_flash(torch.device("cpu"), torch.float16, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cuda_the_fused_form_equals_the_products(dtype: torch.dtype) -> None:
    q, k, v = (x.cuda() for x in qkv(33, 300, 64, dtype))
    q = torch.cat([q, -q, q.flip(2)], 1)
    (fused, lse), (plain, total) = attention_with_lse(q, k, v), products_with_lse(q, k, v)
    torch.testing.assert_close(lse, total, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(fused, plain, rtol=1e-2, atol=1e-2)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    q, k, v = qkv(5, 12)
    q, k = q * 300, torch.cat([k[:, :, :6] * 30, k[:, :, 6:] * 0.01], 2)
    torch.testing.assert_close(by_segments(attention_with_lse, q, k, v, [6, 6]).double(), exact(q, k, v)[0], rtol=1e-3, atol=1e-3)


def test_the_order_of_segments_does_not_matter() -> None:
    q, k, v = qkv(5, 20)
    parts = [attention_with_lse(q, a, b) for a, b in zip(k.split([3, 10, 7], 2), v.split([3, 10, 7], 2), strict=True)]
    torch.testing.assert_close(merge(parts), merge(parts[::-1]), rtol=1e-6, atol=1e-6)


def turned(x: Tensor, phases: Tensor) -> Tensor:
    """`Rope.turn` in float64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phases.to(torch.complex128)).flatten(-2)


def test_queries_turned_per_segment_equal_keys_turned_anew() -> None:
    """Two segments move along time by -4 and -1 frames; the stored keys stay as they are, the queries turn the other way."""
    rope, grid, moves = Rope(), (2, 3), (-4, -1)
    q, k, v = qkv(6, 30, HEAD_DIM)
    q, starts = rope.turn(q, rope.phases(9, 1, grid)), (0, 6)
    raw = k.split([12, 18], 2)
    stored = [rope.turn(x, rope.phases(start, x.shape[2] // 6, grid)) for x, start in zip(raw, starts, strict=True)]

    moved = [turned(x, rope.phases(start + move, x.shape[2] // 6, grid)) for x, start, move in zip(raw, starts, moves, strict=True)]
    expected, _ = exact(q, torch.cat(moved, 2), v)

    parts = [(rope.turn(q, rope.shift(-move)), x, y) for x, y, move in zip(stored, v.split([12, 18], 2), moves, strict=True)]
    torch.testing.assert_close(merge([attention_with_lse(*part) for part in parts]).double(), expected, rtol=1e-5, atol=1e-5)

    precise = [exact(turned(q, rope.shift(-move)), turned(x, rope.phases(start, x.shape[2] // 6, grid)), y)
               for x, y, start, move in zip(raw, v.split([12, 18], 2), starts, moves, strict=True)]  # fmt: skip
    torch.testing.assert_close(merge(precise), expected, rtol=0, atol=2e-6)
    assert not torch.allclose(exact(q, torch.cat(stored, 2), v)[0], expected, atol=1e-2)
