"""Column sums of attention as two Triton kernels: the log-sum-exp of every query, then the sums of every key.

No score leaves the registers and nothing is added atomically, so the result is the same every time. Imports triton, so `choice.py` alone imports
this; under TRITON_INTERPRET=1 it also runs on the CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .choice import Capability, interpreted, tile_for


class Tile(NamedTuple):
    """Queries and keys of a tile of scores, warps that share it, and stages of the pipeline that loads its operands."""

    queries: int
    keys: int
    warps: int
    stages: int

    def shared(self, width: int, itemsize: int = 2) -> int:
        """Bytes of shared memory for operands `width` channels wide: what stays, and every stage of what is streamed past it."""
        streamed = max(self.queries, self.keys)
        return (self.queries + self.keys - streamed + self.stages * streamed) * width * itemsize


TILES: dict[Capability, Tile] = {(8, 0): Tile(64, 64, 4, 3), (8, 6): Tile(64, 64, 4, 2), (9, 0): Tile(128, 64, 8, 3), (12, 0): Tile(64, 64, 4, 2)}
"""By compute capability, of what fits the shared memory of a block: 163, 99, 227 and 99 KiB. Not yet measured on a card."""


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether dtype, size and layout are those the kernels are written for. Float32 is not: tensor cores would round it."""
    halves = q.dtype == k.dtype and q.dtype in (torch.bfloat16, torch.float16)
    return halves and k.shape[3] in (16, 32, 64, 128) and q.stride(3) == k.stride(3) == 1


def column_sums(q: Tensor, k: Tensor, largest: bool) -> Tensor:
    """[R, G * H, Q, D], [R, H, N, D] -> float32 [R, H, N]; `largest`: the group's largest logit counts, otherwise its mean attention."""
    batch, heads, n, d = k.shape
    group, count = q.shape[1] // heads, q.shape[2]
    over, share = (group, 1) if largest else (1, group)
    lse = q.new_empty(batch * heads * share, count, dtype=torch.float32)
    out = q.new_empty(batch, heads, n, dtype=torch.float32)
    sizes = (q, k, lse, out, count, n, heads, d**-0.5, *q.stride()[:3], *k.stride()[:3])
    tile = tile_for(TILES, q.device)
    form = {"OVER": over, "SHARE": share, "D": d, "BM": tile.queries, "BN": tile.keys, "UPCAST": interpreted()}  # its bfloat16 is an integer
    launch = {"num_warps": tile.warps, "num_stages": tile.stages}
    _log_sum_exp[(triton.cdiv(count, tile.queries), len(lse))](*sizes, **form, **launch)
    _sums[(triton.cdiv(n, tile.keys), batch * heads)](*sizes, **form, **launch)
    return out


@triton.jit
def _tile(head, size, wanted, row_stride, D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows `wanted` of the head that begins at pointer `head`, zero beyond `size`."""
    where = wanted.to(tl.int64)[:, None] * row_stride + tl.arange(0, D)[None, :]
    x = tl.load(head + where, mask=(wanted < size)[:, None], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _asked(q, one, heads, qr, qh, OVER: tl.constexpr, SHARE: tl.constexpr):
    """Pointer to the first query head of row `one`, which counts over all films and branches and has OVER heads."""
    per_film = heads * SHARE
    return q + one // per_film * qr + one % per_film * OVER * qh


@triton.jit
def _scores(asked, keys, rows, count, scale, qh, qn, OVER: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            UPCAST: tl.constexpr):  # fmt: skip
    """Logits [BM, BN] of OVER query heads from pointer `asked` on, the largest of them. Not unrolled, so the queries of one head after the other go
    through shared memory: those of all of them do not fit."""
    s = tl.full([BM, BN], float("-inf"), tl.float32)
    for g in range(OVER):
        x = _tile(asked + tl.cast(g, tl.int64) * qh, count, rows, qn, D, UPCAST)
        s = tl.maximum(s, tl.dot(x, tl.trans(keys)) * scale)
    return s


@triton.jit
def _log_sum_exp(q, k, lse, out, count, n, heads, scale, qr, qh, qn, kr, kh, kn, OVER: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    rows, one = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1).to(tl.int64)
    mine = one // SHARE
    head, asked = k + mine // heads * kr + mine % heads * kh, _asked(q, one, heads, qr, qh, OVER, SHARE)
    most, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    for start in range(0, n, BN):
        columns = start + tl.arange(0, BN)
        keys = _tile(head, n, columns, kn, D, UPCAST)
        s = _scores(asked, keys, rows, count, scale, qh, qn, OVER, D, BM, BN, UPCAST)
        s = tl.where((columns < n)[None, :], s, float("-inf"))
        higher = tl.maximum(most, tl.max(s, 1))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(s - higher[:, None]), 1)
        most = higher
    tl.store(lse + one * count + rows, most + tl.log(total), mask=rows < count)


@triton.jit
def _sums(q, k, lse, out, count, n, heads, scale, qr, qh, qn, kr, kh, kn, OVER: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr,
          BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    columns, mine = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1).to(tl.int64)
    keys = _tile(k + mine // heads * kr + mine % heads * kh, n, columns, kn, D, UPCAST)
    sums = tl.zeros([BN], tl.float32)
    for member in tl.static_range(SHARE):
        one = mine * SHARE + member
        asked = _asked(q, one, heads, qr, qh, OVER, SHARE)
        for start in range(0, count, BM):
            rows = start + tl.arange(0, BM)
            s = _scores(asked, keys, rows, count, scale, qh, qn, OVER, D, BM, BN, UPCAST)
            norm = tl.load(lse + one * count + rows, mask=rows < count, other=0.0)
            p = tl.where((rows < count)[:, None], tl.exp(s - norm[:, None]), 0.0)
            sums += tl.sum(p, 0)
    tl.store(out + mine * n + columns, sums / SHARE, mask=columns < n)
