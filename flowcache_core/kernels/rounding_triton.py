"""How Triton kernels round what they store. Imports triton, so only other kernels import this."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, like, INTERPRETED: tl.constexpr):
    """Float32 in the dtype of pointer `like`, to the nearest even number: the interpreter cuts bfloat16 off, so there the bits are added here."""
    if INTERPRETED and like.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(like.dtype.element_ty)
