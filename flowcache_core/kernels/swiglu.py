"""SwiGLU between the two products of a feed-forward layer: the SiLU of one half of the channels times the other half."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .choice import by_triton, path_for

OPERATION = "SwiGLU"


def swiglu(x: Tensor) -> Tensor:
    """[B, T, 2 n] -> [B, T, n]."""
    if path_for(x.device, OPERATION).name == "triton" and not torch.is_grad_enabled():
        return _opaque(x)
    return in_pytorch(x)


def in_pytorch(x: Tensor) -> Tensor:
    """`swiglu` without Triton."""
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


@torch.library.custom_op("flowcache::swiglu", mutates_args=(), schema="(Tensor x) -> Tensor")
def _opaque(x: Tensor) -> Tensor:
    """`swiglu` as one operation that torch.compile does not look into; contiguous."""
    out = by_triton(OPERATION, "swiglu_triton", x.device, lambda kernels: _by(kernels, x))
    return in_pytorch(x) if out is None else out


def _by(kernels: Any, x: Tensor) -> Tensor | None:
    return kernels.swiglu(x) if kernels.serves(x) else None


@_opaque.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
