"""The merge of segments of attention as one Triton kernel: every output is read once, and sums stay in registers in float32. Imports triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Queries of a program: with 128 channels some kilobytes of registers, on every card alike."""
MOST = 6


def serves(parts: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether number, dtypes, sizes and layouts are those that the kernel is written for: all outputs alike, with channels side by side."""
    out = parts[0][0]
    alike = all(o.shape == out.shape and o.dtype == out.dtype and o.stride() == out.stride() for o, _ in parts)
    halves = out.dtype in (torch.bfloat16, torch.float16) and all(each.dtype == torch.float32 for _, each in parts)
    return alike and halves and 2 <= len(parts) <= MOST and out.shape[3] in (16, 32, 64, 128, 256) and out.stride(3) == 1


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """As `segments.merge`, of two to six parts."""
    first, _ = parts[0]
    batch, heads, count, d = first.shape
    merged, shares = torch.empty_like(first), torch.stack([lse for _, lse in parts])
    outs = [out for out, _ in parts]
    outs += [first] * (MOST - len(outs))
    grid = (triton.cdiv(count, ROWS), batch * heads)
    _merge[grid](*outs, shares, merged, heads, count, *first.stride()[:3], *merged.stride()[:3], PARTS=len(parts), D=d, BM=ROWS)
    return merged


@triton.jit
def _merge(a, b, c, d, e, f, lse, out, heads, count, xb, xh, xn, yb, yh, yn, PARTS: tl.constexpr, D: tl.constexpr, BM: tl.constexpr):
    rows, one = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1).to(tl.int64)
    inside, row, channels = rows < count, rows.to(tl.int64)[:, None], tl.arange(0, D)[None, :]
    where = one // heads * xb + one % heads * xh + row * xn + channels
    most = tl.full([BM], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        at = (part * tl.num_programs(1) + one) * count + rows
        most = tl.maximum(most, tl.load(lse + at, mask=inside, other=0.0))
    total, mixed = tl.zeros([BM], tl.float32), tl.zeros([BM, D], tl.float32)
    for part in tl.static_range(PARTS):
        at = (part * tl.num_programs(1) + one) * count + rows
        share = tl.exp(tl.load(lse + at, mask=inside, other=0.0) - most)
        source = a
        if part == 1:
            source = b
        elif part == 2:
            source = c
        elif part == 3:
            source = d
        elif part == 4:
            source = e
        elif part == 5:
            source = f
        total += share
        mixed += share[:, None] * tl.load(source + where, mask=inside[:, None], other=0.0).to(tl.float32)
    there = out + one // heads * yb + one % heads * yh + row * yn + channels
    tl.store(there, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
