"""Layer norm of each head, rotary positions in halves, and the place where the result goes, as one Triton kernel: a tensor of its own, or slots of
the KV cache.

A program takes one head of some tokens of one film. The other channel of a pair is read once more, from the cache of the card. Values go to
their slots beside the keys. Imports triton, so `choice.py` alone imports this.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .choice import Capability, interpreted, tile_for
from .rounding_triton import rounded
from .slots_triton import serves_slots, slot_of


class Tile(NamedTuple):
    """Tokens of a program, and warps that share them."""

    tokens: int
    warps: int


TILES: dict[Capability, Tile] = {(8, 0): Tile(16, 4), (9, 0): Tile(16, 4), (12, 0): Tile(16, 4)}
"""By compute capability. Not yet measured on a card."""


def serves(x: Tensor, weight: Tensor, bias: Tensor, rope: Tensor | None, head_dim: int) -> bool:
    """Whether dtypes, sizes and layout are those that the kernel is written for."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    plain = x.dtype in dtypes and all(one.dtype in dtypes and one.is_contiguous() and one.shape == (head_dim,) for one in (weight, bias))
    width = head_dim >= 2 and head_dim & (head_dim - 1) == 0 and x.stride(2) == 1
    turns = rope is None or (rope.dtype == torch.complex64 and rope.shape[0] == x.shape[1] and 2 * rope.shape[1] <= head_dim)
    return plain and width and turns


def serves_write(keys: Tensor, values: Tensor, index: Tensor | None, first: int, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor,
                 rope: Tensor | None) -> bool:  # fmt: skip
    """The same of `write_heads_normed`."""
    return serves(k, weight, bias, rope, keys.shape[3]) and serves_slots(keys, values, index, first, k, v)


def heads_normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float, rope: Tensor | None, head_dim: int) -> Tensor:
    """[B, T, heads * head_dim] -> [B, heads, T, head_dim], a head's tokens side by side, as attention reads them."""
    out = x.new_empty(x.shape[0], x.shape[2] // head_dim, x.shape[1], head_dim)
    _launch(out, out, None, 0, x, x, weight, bias, eps, rope, WRITES_VALUES=False)
    return out


def write_heads_normed(keys: Tensor, values: Tensor, index: Tensor | None, first: int, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor,
                       eps: float, rope: Tensor | None) -> bool:  # fmt: skip
    """[B, T, heads * head_dim] twice -> slots of [B, heads, slots, head_dim] twice."""
    _launch(keys, values, index, first, k, v, weight, bias, eps, rope, WRITES_VALUES=True)
    return True


def _launch(out: Tensor, values: Tensor, index: Tensor | None, first: int, x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, eps: float,
            rope: Tensor | None, WRITES_VALUES: bool) -> None:  # fmt: skip
    films, tokens, width = x.shape
    head_dim, tile = out.shape[3], tile_for(TILES, x.device)
    phases, pairs = (x, 0) if rope is None else (torch.view_as_real(rope).contiguous(), rope.shape[1])  # what is not there is not read
    _norm_rotate[(triton.cdiv(tokens, tile.tokens), width // head_dim, films)](
        out, values, x if index is None else index, x, v, weight, bias, phases, first, tokens, eps, *x.stride()[:2], *v.stride()[:2],
        *out.stride()[:2], *values.stride()[:2], PAIRS=pairs, D=head_dim, INDEXED=index is not None, WRITES_VALUES=WRITES_VALUES,
        BM=tile.tokens, INTERPRETED=interpreted(), num_warps=tile.warps,
    )  # fmt: skip


@triton.jit
def _norm_rotate(out, values, index, x, v_in, weight, bias, phases, first, tokens, eps, xb, xt, vb, vt, ob, oh, yb, yh, PAIRS: tl.constexpr,
                 D: tl.constexpr, INDEXED: tl.constexpr, WRITES_VALUES: tl.constexpr, BM: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    head, film, channel = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.arange(0, D)[None, :]
    there = rows < tokens
    x += film * xb + rows * xt + head * D
    v = tl.load(x + channel, mask=there, other=0.0).to(tl.float32)
    mean = (tl.sum(v, 1) / D)[:, None]
    v -= mean
    scale = 1 / tl.sqrt(tl.sum(v * v, 1) / D + eps)[:, None]
    v = v * scale * (1 + tl.load(weight + channel).to(tl.float32)) + tl.load(bias + channel).to(tl.float32)
    if PAIRS > 0:
        turns, begins = channel < 2 * PAIRS, channel < PAIRS
        other = tl.where(begins, channel + PAIRS, tl.where(turns, channel - PAIRS, channel))
        w = (tl.load(x + other, mask=there, other=0.0).to(tl.float32) - mean) * scale
        w = w * (1 + tl.load(weight + other).to(tl.float32)) + tl.load(bias + other).to(tl.float32)
        phase = phases + 2 * (rows * PAIRS + tl.where(begins, channel, other))
        real = tl.load(phase, mask=there & turns, other=1.0)
        imag = tl.load(phase + 1, mask=there & turns, other=0.0)
        v = v * real + w * tl.where(begins, -imag, imag)
    slots = slot_of(index, first, rows, there, INDEXED)
    tl.store(out + film * ob + head * oh + slots * D + channel, rounded(v, out, INTERPRETED), mask=there)
    if WRITES_VALUES:
        fresh = tl.load(v_in + film * vb + rows * vt + head * D + channel, mask=there, other=0.0)
        tl.store(values + film * yb + head * yh + slots * D + channel, fresh, mask=there)
