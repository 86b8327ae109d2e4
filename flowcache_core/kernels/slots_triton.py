"""How Triton kernels find the slots of the KV cache that they write. Imports triton, so only other kernels import this."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def serves_slots(keys: Tensor, values: Tensor, index: Tensor | None, first: int, k: Tensor, v: Tensor) -> bool:
    """Whether dtypes, sizes and layout are such that a kernel may write k and v [B, T, heads * head_dim] into [B, heads, slots, head_dim]."""
    alike = keys.dtype == values.dtype == k.dtype == v.dtype and keys.shape == values.shape and k.shape == v.shape and v.stride(2) == 1
    films, heads, count, d = keys.shape
    rows = all(buffer.stride()[2:] == (d, 1) for buffer in (keys, values)) and k.shape == (films, k.shape[1], heads * d)
    fits = first + k.shape[1] <= count if index is None else index.shape == (k.shape[1],) and index.dtype == torch.int64 and index.is_contiguous()
    return alike and rows and fits


@triton.jit
def slot_of(index, first, rows, there, INDEXED: tl.constexpr):
    """Of tokens `rows`, int64 [BM, 1], the slots: those that `index` lists, or one after the other from `first` on."""
    slots = rows + first
    if INDEXED:
        slots = tl.load(index + rows, mask=there, other=0)
    return slots
