"""SwiGLU as one Triton kernel: both halves are read once, and one is written. Imports triton, so `choice.py` alone imports this."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .choice import interpreted
from .rounding_triton import rounded

CHANNELS = 1024
"""Of a program, on every card alike."""


def serves(x: Tensor) -> bool:
    """Whether dtype and layout are those that the kernel is written for."""
    return x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.is_contiguous() and x.shape[-1] % 2 == 0


def swiglu(x: Tensor) -> Tensor:
    """[B, T, 2 n] -> [B, T, n]."""
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    width = out.shape[-1]
    _swiglu[(out.numel() // max(width, 1), triton.cdiv(width, CHANNELS))](out, x, width, BLOCK=CHANNELS, INTERPRETED=interpreted(), num_warps=4)
    return out


@triton.jit
def _swiglu(out, x, width, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there, x = channel < width, x + 2 * row * width + channel
    a = tl.load(x, mask=there, other=0.0).to(tl.float32)
    b = tl.load(x + width, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * width + channel, rounded(a * tl.sigmoid(a) * b, out, INTERPRETED), mask=there)
