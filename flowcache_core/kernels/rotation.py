"""Rotary positions: queries and keys turned by their place, alone or with the norm over their whole width ahead of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .choice import by_triton, path_for
from .slots import indexed, put

OPERATION = "norm and rotation of queries and keys"


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """[B, heads, T, head_dim] by complex phases [T, head_dim / 2]; neighbouring channels form a pair."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).type_as(x)


def normed_rotated(x: Tensor, weight: Tensor, eps: float, rope: Tensor | None, head_dim: int) -> Tensor:
    """RMS norm over the width [B, T, heads * head_dim], weight [heads * head_dim], then `rotate` -> [B, heads, T, head_dim].

    Without `rope`, the norm alone.
    """
    if path_for(x.device, OPERATION).name == "triton":
        return _opaque(x, weight, eps, rope, head_dim)
    return in_pytorch(x, weight, eps, rope, head_dim)


def in_pytorch(x: Tensor, weight: Tensor, eps: float, rope: Tensor | None, head_dim: int) -> Tensor:
    """`normed_rotated` without Triton."""
    if x.device.type == "cpu" and x.element_size() == 2:
        return in_float32(x, weight, eps, rope, head_dim)
    y = F.rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return y if rope is None else rotate(y, rope)


def in_float32(x: Tensor, weight: Tensor, eps: float, rope: Tensor | None, head_dim: int) -> Tensor:
    """The same with one rounding, at the end, and few passes: on a processor PyTorch puts the norm together from eight operations."""
    wide = x.float()
    power = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    wide = (wide * power.add_(eps).rsqrt_()).mul_(weight.float()).unflatten(-1, (-1, head_dim))
    if rope is not None:
        torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(rope.unsqueeze(-2))
    return wide.to(x.dtype).transpose(1, 2)


def write_normed_rotated(keys: Tensor, values: Tensor, at: slice | Tensor, k: Tensor, v: Tensor, weight: Tensor, eps: float,
                         rope: Tensor | None) -> None:  # fmt: skip
    """Slots `at`, a range or int64 [T], of keys and values [B, heads, slots, head_dim] become `normed_rotated` of k, and v as it is.

    k, v: [B, T, heads * head_dim]. As one Triton kernel, keys are never laid down anywhere else.
    """
    if path_for(k.device, OPERATION).name == "triton":
        _write(keys, values, *indexed(at), k, v, weight, eps, rope)
    else:
        write_in_pytorch(keys, values, at, k, v, weight, eps, rope)


def write_in_pytorch(keys: Tensor, values: Tensor, at: slice | Tensor, k: Tensor, v: Tensor, weight: Tensor, eps: float,
                     rope: Tensor | None) -> None:  # fmt: skip
    """`write_normed_rotated` without Triton."""
    put(keys, at, in_pytorch(k, weight, eps, rope, keys.shape[3]))
    put(values, at, v.unflatten(-1, (-1, values.shape[3])).transpose(1, 2))


@torch.library.custom_op(
    "flowcache::normed_rotated", mutates_args=(), schema="(Tensor x, Tensor weight, float eps, Tensor? rope, int head_dim) -> Tensor"
)
def _opaque(x: Tensor, weight: Tensor, eps: float, rope: Tensor | None, head_dim: int) -> Tensor:
    """`normed_rotated` as one operation that torch.compile does not look into; contiguous."""

    def call(kernels: Any) -> Tensor | None:
        return kernels.normed_rotated(x, weight, eps, rope, head_dim) if kernels.serves(x, weight, rope, head_dim) else None

    out = by_triton(OPERATION, "rotation_triton", x.device, call)
    return in_pytorch(x, weight, eps, rope, head_dim).contiguous() if out is None else out


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, eps: float, rope: Tensor | None, head_dim: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2] // head_dim, x.shape[1], head_dim)


@torch.library.custom_op(
    "flowcache::write_normed_rotated",
    mutates_args=("keys", "values"),
    schema="(Tensor(a!) keys, Tensor(b!) values, Tensor? index, int first, Tensor k, Tensor v, Tensor weight, float eps, Tensor? rope) -> ()",
)
def _write(keys: Tensor, values: Tensor, index: Tensor | None, first: int, k: Tensor, v: Tensor, weight: Tensor, eps: float,
           rope: Tensor | None) -> None:  # fmt: skip
    """`write_normed_rotated` as one operation that torch.compile does not look into. `index`: of the slots; None: from `first` on."""

    def call(kernels: Any) -> bool | None:
        serves = kernels.serves_write(keys, values, index, first, k, v, weight, rope)
        return kernels.write_normed_rotated(keys, values, index, first, k, v, weight, eps, rope) if serves else None

    if by_triton(OPERATION, "rotation_triton", k.device, call) is None:
        write_in_pytorch(keys, values, slice(first, first + k.shape[1]) if index is None else index, k, v, weight, eps, rope)


@_write.register_fake
def _(keys: Tensor, values: Tensor, index: Tensor | None, first: int, k: Tensor, v: Tensor, weight: Tensor, eps: float,
      rope: Tensor | None) -> None: ...  # fmt: skip
