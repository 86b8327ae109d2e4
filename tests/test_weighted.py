"""Keys that count for several each, in one call: against float64, in every form, and when it is chosen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowcache_core.kernels import attention as plain
from flowcache_core.kernels import weighted as module
from flowcache_core.kernels.attention import Kernel, attending, attention
from flowcache_core.kernels.weighted import ONE_CALL_FROM, in_one_call, weighted
from tests.test_attention import CLOSE, EDGES, exact, qkv

FORMS = ("products", "fused")
RANGES = ((0, 1), (0, 1000), (2, 5), (60, 65))


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By which form 16-bit tensors of the processor go; others always go by the fused kernel."""
    monkeypatch.setattr(plain, "SCORES_AT_MOST", 2**26 if request.param == "products" else 0)
    return str(request.param)


def copied(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, weight: float) -> Tensor:
    """In float64, with weights on the terms of the sums."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    log_weights = torch.zeros(k.shape[2], dtype=torch.float64)
    log_weights[start:end] = weight
    return (q.double() @ k.mT * q.shape[-1] ** -0.5 + log_weights).softmax(-1) @ v


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("span", RANGES)
@pytest.mark.parametrize(("queries", "keys"), EDGES)
def test_every_form_equals_float64(dtype: torch.dtype, queries: int, keys: int, span: tuple[int, int]) -> None:
    q, k, v = qkv(queries, keys, dtype)
    out = weighted(q, k, v, *span, math.log(3.3))
    assert (out.shape, out.dtype) == (q.shape, dtype)
    torch.testing.assert_close(out.double(), copied(q, k, v, *span, math.log(3.3)), rtol=0, atol=CLOSE[dtype])


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_of_three_is_three_copies(dtype: torch.dtype) -> None:
    q, k, v = qkv(65, 63, dtype)
    copies = torch.ones(63, dtype=torch.long)
    copies[10:40] = 3
    expected = exact(q, k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2))
    torch.testing.assert_close(weighted(q, k, v, 10, 40, math.log(3)).double(), expected, rtol=0, atol=CLOSE[dtype])


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_keys_share_by_their_weights_alone(dtype: torch.dtype) -> None:
    """A seventh of the keys at weight 4, whose values are 1: 4 of 10 parts."""
    q, k, v = qkv(7, 70, dtype)
    v = torch.zeros_like(v)
    v[:, :, 20:30] = 1
    out = weighted(q, torch.zeros_like(k), v, 20, 30, math.log(4)).double()
    torch.testing.assert_close(out, torch.full_like(out, 0.4), rtol=4e-3 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_rounding_takes_nothing_from_the_weight(dtype: torch.dtype) -> None:
    for weight in (math.log(4), math.log(20 / 8), 0.01):
        row = module._row(9, 2, 5, weight, dtype, torch.device("cpu")).double().flatten()
        assert row[3] - row[0] == pytest.approx(weight, rel=3e-5)
        assert row[2:5].eq(row[3]).all()
        assert row[5:].eq(row[0]).all()
        assert row[:2].eq(row[0]).all()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_query_heads_share_a_key_head(heads: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, (_, k, v) = torch.randn(2, 9, 6, 16).to(dtype).transpose(1, 2), qkv(1, 30, dtype, heads, 16)
        out = weighted(q, k, v, 4, 20, 1.2)
        torch.testing.assert_close(out.double(), copied(q, k, v, 4, 20, 1.2), rtol=0, atol=CLOSE[dtype])


def test_without_weights_the_kernel_in_force_attends() -> None:
    q, k, v = qkv(7, 9)
    with attending(Kernel("nothing", lambda q, k, v: torch.zeros_like(q))):
        assert weighted(q, k, v, 2, 5, 0.0).eq(0).all()
        assert weighted(q, k, v, 5, 5, 1.0).eq(0).all()
        assert weighted(q, k, v, 2, 5, 1.0).ne(0).any()
    assert torch.equal(weighted(q, k, v, 0, 0, 0.0), attention(q, k, v))


@pytest.mark.usefixtures("form")
def test_large_scores_neither_overflow_nor_vanish() -> None:
    q, k, v = qkv(5, 12)
    out = weighted(300 * q, 30 * k, v, 3, 9, 1.3)
    torch.testing.assert_close(out.double(), copied(300 * q, 30 * k, v, 3, 9, 1.3), rtol=0, atol=5e-3)
    assert weighted((300 * q).bfloat16(), (30 * k).bfloat16(), v.bfloat16(), 3, 9, 1.3).isfinite().all()


@pytest.mark.parametrize("fewer_keys", [True, False])
def test_the_processor_makes_one_call_of_all_but_the_smallest(fewer_keys: bool) -> None:
    q, k = torch.empty(1, 1, 16, 8), torch.empty(1, 1, ONE_CALL_FROM // 16, 8)
    assert in_one_call(q, k, 1.0, fewer_keys)
    assert not in_one_call(q[:, :, 1:], k, 1.0, fewer_keys)


def test_other_devices_make_one_call_unless_a_fused_kernel_gives_the_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 1, 3, 8, device="meta")
    monkeypatch.setattr(module, "lse_is_fused", lambda q: False)
    assert in_one_call(x, x, 1.0, True)
    assert not in_one_call(x, x, 1.0, False)
    monkeypatch.setattr(module, "lse_is_fused", lambda q: True)
    assert in_one_call(x, x, 0.0, True)
    assert not in_one_call(x, x, 1.0, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("queries", "keys"), EDGES)
def test_on_cuda_a_row_of_weights_equals_float64(dtype: torch.dtype, queries: int, keys: int) -> None:
    q, k, v = (x.cuda() for x in qkv(queries, keys, dtype))
    out = weighted(q, k, v, 2, 60, math.log(3.3))
    expected = copied(*(x.cpu() for x in (q, k, v)), 2, 60, math.log(3.3))
    torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=max(CLOSE[dtype], 2e-3))
