"""Shift, scale and gate of the noise level, held to float64: with one level for all frames, with one each, with one per token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flowcache_core.kernels.modulation import gated, modulated, normed_modulated

FRAMES = [(1, 1), (1, 3), (2, 3), (1, 129)]
"""Rows of noise levels: those of the batch, and latent frames."""
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(films: int, frames: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = frames if frames == 129 else 5 * frames
    x, y = (3 * torch.randn(2, tokens, 48).to(dtype) for _ in range(2))
    return x, y, *(torch.randn(films, frames, 48).to(dtype) for _ in range(2))


def per_token(row: Tensor, x: Tensor) -> Tensor:
    return row.double().repeat_interleave(x.shape[1] // row.shape[1], 1)


@pytest.mark.parametrize(("films", "frames"), FRAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_rounds_once(films: int, frames: int, dtype: torch.dtype) -> None:
    x, y, gate, _ = inputs(films, frames, dtype)
    out = gated(x, y, gate)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), x.double() + y.double() * per_token(gate, x), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(("films", "frames"), FRAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_modulation_agree_with_float64(films: int, frames: int, dtype: torch.dtype) -> None:
    """1 + scale and, with several noise levels, the norm are rounded on the way."""
    x, _, shift, scale = inputs(films, frames, dtype)
    normed = F.layer_norm(x.double(), (48,), eps=1e-6)
    exact = normed * (1 + per_token(scale, x)) + per_token(shift, x)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(normed_modulated(x, shift, scale, 1e-6).double(), exact, rtol=4 * eps, atol=16 * eps)
    torch.testing.assert_close(modulated(normed.to(dtype), shift, scale).double(), exact, rtol=4 * eps, atol=16 * eps)


def test_in_float32_the_operations_are_the_separate_ones() -> None:
    x, y, shift, scale = inputs(2, 3, torch.float32)
    a, b = (row.repeat_interleave(5, 1) for row in (shift, scale))
    assert torch.equal(gated(x, y, shift), x + y * a)
    assert torch.equal(normed_modulated(x, shift, scale, 1e-6), F.layer_norm(x, (48,), eps=1e-6) * (1 + b) + a)


def test_a_token_of_equal_channels_is_its_shift() -> None:
    x, shift = torch.full((1, 4, 48), 3.0).bfloat16(), torch.randn(1, 1, 48).bfloat16()
    assert torch.equal(normed_modulated(x, shift, torch.randn(1, 1, 48).bfloat16(), 1e-6), shift.expand(1, 4, 48))
