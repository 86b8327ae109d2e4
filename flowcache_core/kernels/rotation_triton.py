"""RMS norm over the width, rotary positions and the place where the result goes, as one Triton kernel: a tensor of its own, or slots of the KV cache.

A program takes some tokens of one film and goes twice through their channels: once for the sum of squares, once to scale, turn and store. The
second time they come from the cache of the card. Values go to their slots beside the keys. Imports triton, so `choice.py` alone imports this.
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


TILES: dict[Capability, Tile] = {(8, 0): Tile(4, 4), (9, 0): Tile(4, 8), (12, 0): Tile(4, 4)}
"""By compute capability. Not yet measured on a card."""


def serves(x: Tensor, weight: Tensor, rope: Tensor | None, head_dim: int) -> bool:
    """Whether dtypes, sizes and layout are those that the kernel is written for."""
    plain = x.dtype in (torch.bfloat16, torch.float16, torch.float32) and weight.dtype == x.dtype and weight.is_contiguous()
    width = head_dim >= 2 and head_dim & (head_dim - 1) == 0 and x.stride(2) == 1
    return plain and width and (rope is None or (rope.dtype == torch.complex64 and rope.shape == (x.shape[1], head_dim // 2)))


def serves_write(keys: Tensor, values: Tensor, index: Tensor | None, first: int, k: Tensor, v: Tensor, weight: Tensor, rope: Tensor | None) -> bool:
    """The same of `write_normed_rotated`."""
    return serves(k, weight, rope, keys.shape[3]) and serves_slots(keys, values, index, first, k, v)


def normed_rotated(x: Tensor, weight: Tensor, eps: float, rope: Tensor | None, head_dim: int) -> Tensor:
    """[B, T, heads * head_dim] -> [B, heads, T, head_dim], a head's tokens side by side, as attention reads them."""
    out = x.new_empty(x.shape[0], x.shape[2] // head_dim, x.shape[1], head_dim)
    _launch(out, out, None, 0, x, x, weight, eps, rope, WRITES_VALUES=False)
    return out


def write_normed_rotated(keys: Tensor, values: Tensor, index: Tensor | None, first: int, k: Tensor, v: Tensor, weight: Tensor, eps: float,
                         rope: Tensor | None) -> bool:  # fmt: skip
    """[B, T, heads * head_dim] twice -> slots of [B, heads, slots, head_dim] twice."""
    _launch(keys, values, index, first, k, v, weight, eps, rope, WRITES_VALUES=True)
    return True


def _launch(out: Tensor, values: Tensor, index: Tensor | None, first: int, x: Tensor, v: Tensor, weight: Tensor, eps: float, rope: Tensor | None,
            WRITES_VALUES: bool) -> None:  # fmt: skip
    films, tokens, width = x.shape
    head_dim, tile = out.shape[3], tile_for(TILES, x.device)
    phases = x if rope is None else torch.view_as_real(rope).contiguous()  # what is not there is not read
    _norm_rotate[(triton.cdiv(tokens, tile.tokens), films)](
        out, values, x if index is None else index, x, v, weight, phases, first, tokens, eps, *x.stride()[:2], *v.stride()[:2],
        *out.stride()[:2], *values.stride()[:2], HEADS=width // head_dim, D=head_dim, TURN=rope is not None, INDEXED=index is not None,
        WRITES_VALUES=WRITES_VALUES, BM=tile.tokens, INTERPRETED=interpreted(), num_warps=tile.warps,
    )  # fmt: skip


@triton.jit
def _norm_rotate(out, values, index, x, v_in, weight, phases, first, tokens, eps, xb, xt, vb, vt, ob, oh, yb, yh, HEADS: tl.constexpr,
                 D: tl.constexpr, TURN: tl.constexpr, INDEXED: tl.constexpr, WRITES_VALUES: tl.constexpr, BM: tl.constexpr,
                 INTERPRETED: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    film, channel = tl.program_id(1).to(tl.int64), tl.arange(0, D)[None, :]
    there = rows < tokens
    x += film * xb + rows * xt + channel
    squares = tl.zeros([BM], tl.float32)
    for head in range(HEADS):
        v = tl.load(x + head * D, mask=there, other=0.0).to(tl.float32)
        squares += tl.sum(v * v, 1)
    scale = (1 / tl.sqrt(squares / (HEADS * D) + eps))[:, None]
    if TURN:
        phase = tl.load(phases + rows * D + channel, mask=there, other=0.0)
        real, imag = tl.split(tl.reshape(phase, [BM, D // 2, 2]))
    slots = slot_of(index, first, rows, there, INDEXED)
    out += film * ob + slots * D + channel
    if WRITES_VALUES:
        v_in += film * vb + rows * vt + channel
        values += film * yb + slots * D + channel
    for head in range(HEADS):
        v = tl.load(x + head * D, mask=there, other=0.0).to(tl.float32) * scale
        v *= tl.load(weight + head * D + channel).to(tl.float32)
        if TURN:
            even, odd = tl.split(tl.reshape(v, [BM, D // 2, 2]))
            v = tl.interleave(even * real - odd * imag, even * imag + odd * real)
        tl.store(out + tl.cast(head, tl.int64) * oh, rounded(v, out, INTERPRETED), mask=there)
        if WRITES_VALUES:
            tl.store(values + tl.cast(head, tl.int64) * yh, tl.load(v_in + head * D, mask=there, other=0.0), mask=there)
