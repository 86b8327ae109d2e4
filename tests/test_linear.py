"""A linear layer with its activation: the fused product is the two operations with one rounding less."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flowcache_core.kernels.linear import ONE_DNN, activated, has_fused_product, linear

SIZES = [(1, 1, 1), (7, 13, 5), (63, 64, 65), (129, 256, 96)]
needs_bfloat16 = pytest.mark.skipif(not has_fused_product(), reason="oneDNN does not multiply bfloat16 natively here")


@pytest.mark.parametrize(("rows", "n", "m"), SIZES)
@pytest.mark.parametrize("activation", ONE_DNN)
@pytest.mark.parametrize("bias", [True, False])
@needs_bfloat16
def test_the_fused_product_is_right_to_one_rounding(rows: int, n: int, m: int, activation: str, bias: bool) -> None:
    x, weight, shift = torch.randn(2, rows, n).bfloat16(), (torch.randn(m, n) / n**0.5).bfloat16(), torch.randn(m).bfloat16() if bias else None
    exact = activated(F.linear(x.double(), weight.double(), None if shift is None else shift.double()), activation)  # type: ignore[arg-type]
    out = linear(x, weight, shift, activation)  # type: ignore[arg-type]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-3)


@needs_bfloat16
def test_without_an_activation_it_is_the_product_of_pytorch() -> None:
    x, weight, bias = torch.randn(2, 65, 64).bfloat16(), torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16()
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(linear(x.transpose(0, 1), weight, bias), F.linear(x, weight, bias).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_left_to_pytorch(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype), torch.randn(4, dtype=dtype)
    assert torch.equal(linear(x, weight, bias, "gelu-tanh"), F.gelu(F.linear(x, weight, bias), approximate="tanh"))
    assert torch.equal(linear(x, weight, bias, "gelu-erf"), F.gelu(F.linear(x, weight, bias)))
