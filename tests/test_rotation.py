"""Rotary positions behind a norm, held to float64: one rounding in 16 bits, the separate operations bit for bit in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flowcache_core.kernels.rotation import normed_rotated, rotate

D = 16
HALVES = [torch.bfloat16, torch.float16]


def phases(tokens: int) -> Tensor:
    angles = 50 * torch.randn(tokens, D // 2, dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles)


def exactly(x: Tensor, weight: Tensor, rope: Tensor | None) -> Tensor:
    """In float64, by 2 x 2 matrices."""
    x = x.double()
    x = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()).unflatten(-1, (-1, D)).transpose(1, 2)
    if rope is None:
        return x
    rope = rope.to(torch.complex128)
    turn = torch.stack([torch.stack([rope.real, -rope.imag], -1), torch.stack([rope.imag, rope.real], -1)], -2)
    return torch.einsum("tpij,bhtpj->bhtpi", turn, x.unflatten(-1, (-1, 2))).flatten(-2)


@pytest.mark.parametrize("tokens", [1, 7, 63, 64, 65, 129])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("turned", [True, False])
def test_norm_and_rotation_round_once_in_16_bits(tokens: int, dtype: torch.dtype, turned: bool) -> None:
    x, weight, rope = torch.randn(2, tokens, 3 * D).to(dtype), torch.randn(3 * D).to(dtype), phases(tokens).to(torch.complex64)
    given = x.clone()
    out = normed_rotated(x, weight, 1e-6, rope if turned else None, D)
    assert out.shape == (2, 3, tokens, D)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exactly(x, weight, rope if turned else None), rtol=0.51 * torch.finfo(dtype).eps, atol=2e-6)
    assert torch.equal(x, given)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_a_token_of_zeros_stays_zero(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 3, 2 * D, dtype=dtype)
    assert not normed_rotated(x, torch.ones(2 * D, dtype=dtype), 1e-6, phases(3).to(torch.complex64), D).any()


def test_large_numbers_do_not_overflow_on_the_way() -> None:
    x = torch.randn(1, 5, 2 * D).to(torch.float16) * 10000
    out = normed_rotated(x, torch.ones(2 * D, dtype=torch.float16), 1e-6, None, D)
    torch.testing.assert_close(out.double(), exactly(x, torch.ones(2 * D), None), rtol=1e-3, atol=1e-6)


def test_in_float32_it_is_the_norm_and_then_the_rotation() -> None:
    x, weight, rope = torch.randn(2, 9, 3 * D), torch.randn(3 * D), phases(9).to(torch.complex64)
    separate = rotate(F.rms_norm(x, (3 * D,), weight, 1e-6).unflatten(-1, (3, D)).transpose(1, 2), rope)
    assert torch.equal(normed_rotated(x, weight, 1e-6, rope, D), separate)
