"""Layer norm with modulation, and gate with residual, with a layer norm between or without, as Triton kernels of one pass over the activations.

A program takes one token, whose channels lie in registers. The shift, scale or gate of its latent frame is looked up, never laid out. Imports
triton, so `choice.py` alone imports this.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .choice import Capability, interpreted, tile_for
from .rounding_triton import rounded

WARPS: dict[Capability, int] = {(8, 0): 4, (9, 0): 8, (12, 0): 4}
"""That share a token, by compute capability. Not yet measured on a card."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 2**14
"""Channels of a token that are held in registers."""


def serves(x: Tensor, *rows: Tensor) -> bool:
    """Whether dtypes, sizes and layout are those that the kernels are written for. x: [B, T, d]; rows: [B or 1, F, d] each, F dividing T."""
    return all(row.dtype == x.dtype for row in rows) and _fits(x, *rows)


def serves_post_norm(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """The same of `gated_normed`, whose gate and weights may have other dtypes than x and y."""
    plain = all(one.dtype in DTYPES and one.stride(-1) == 1 for one in (gate, weight, bias))
    return plain and x.dtype == y.dtype and _fits(x, gate) and _fits(y, gate) and weight.shape == bias.shape == (x.shape[2],)


def _fits(x: Tensor, *rows: Tensor) -> bool:
    sizes = x.shape[2] <= WIDEST and all(row.shape[0] in (1, x.shape[0]) and x.shape[1] % row.shape[1] == 0 for row in rows)
    strides = x.stride(2) == 1 and all(row.stride() == rows[0].stride() and row.stride(2) == 1 for row in rows)
    return x.dtype in DTYPES and sizes and strides


def normed_modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift: [B, T, d] and [B or 1, F, d] twice -> [B, T, d]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(_norm_modulate, x, shift, (out, x, shift, scale, eps, *x.stride()[:2]))
    return out


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y gate: [B, T, d] twice and [B or 1, F, d] -> [B, T, d]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(_gate, x, gate, (out, x, y, gate, *x.stride()[:2], *y.stride()[:2]))
    return out


def gated_normed(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x + LayerNorm(y gate) (1 + weight) + bias: [B, T, d] twice, [B or 1, F, d] and [d] twice -> [B, T, d]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(_gate_norm, x, gate, (out, x, y, gate, weight, bias, eps, *x.stride()[:2], *y.stride()[:2]))
    return out


def _launch(kernel: Callable[..., None], x: Tensor, row: Tensor, arguments: tuple[object, ...]) -> None:
    films, tokens, width = x.shape
    film = row.stride(0) if row.shape[0] > 1 else 0
    kernel[(tokens, films)](  # type: ignore[index]
        *arguments, film, row.stride(1), tokens, tokens // row.shape[1], width,
        BLOCK=triton.next_power_of_2(width), INTERPRETED=interpreted(), num_warps=tile_for(WARPS, x.device),
    )  # fmt: skip


@triton.jit
def _norm_modulate(out, x, shift, scale, eps, xb, xt, rb, rt, tokens, per_row, width, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    token, film, channel = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    there, row = channel < width, film * rb + token // per_row * rt
    v = tl.load(x + film * xb + token * xt + channel, mask=there, other=0.0).to(tl.float32)
    v = tl.where(there, v - tl.sum(v, 0) / width, 0.0)
    v /= tl.sqrt(tl.sum(v * v, 0) / width + eps)
    a = 1 + tl.load(scale + row + channel, mask=there, other=0.0).to(tl.float32)
    b = tl.load(shift + row + channel, mask=there, other=0.0).to(tl.float32)
    tl.store(out + (film * tokens + token) * width + channel, rounded(v * a + b, out, INTERPRETED), mask=there)


@triton.jit
def _gate(out, x, y, gate, xb, xt, yb, yt, rb, rt, tokens, per_row, width, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    token, film, channel = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    there, row = channel < width, film * rb + token // per_row * rt
    a = tl.load(x + film * xb + token * xt + channel, mask=there, other=0.0).to(tl.float32)
    b = tl.load(y + film * yb + token * yt + channel, mask=there, other=0.0).to(tl.float32)
    g = tl.load(gate + row + channel, mask=there, other=0.0).to(tl.float32)
    tl.store(out + (film * tokens + token) * width + channel, rounded(a + b * g, out, INTERPRETED), mask=there)


@triton.jit
def _gate_norm(out, x, y, gate, weight, bias, eps, xb, xt, yb, yt, rb, rt, tokens, per_row, width, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    token, film, channel = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    there, row = channel < width, film * rb + token // per_row * rt
    v = tl.load(y + film * yb + token * yt + channel, mask=there, other=0.0).to(tl.float32)
    v *= tl.load(gate + row + channel, mask=there, other=0.0).to(tl.float32)
    v = tl.where(there, v - tl.sum(v, 0) / width, 0.0)
    v /= tl.sqrt(tl.sum(v * v, 0) / width + eps)
    v *= 1 + tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    v += tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    v += tl.load(x + film * xb + token * xt + channel, mask=there, other=0.0).to(tl.float32)
    tl.store(out + (film * tokens + token) * width + channel, rounded(v, out, INTERPRETED), mask=there)
