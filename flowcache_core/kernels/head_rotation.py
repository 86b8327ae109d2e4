"""Queries and keys of MAGI-1: a layer norm of each head, whose weight is stored as its distance from 1, and then rotary positions.

Channel i and i + n of a head form a pair, of n pairs; channels from 2 n on have no position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .choice import by_triton, path_for
from .slots import indexed, put

OPERATION = "norm and rotation of heads"


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def one_plus_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension by 1 + weight and bias, in float32 at least."""
    x = wide(x)
    return F.layer_norm(x, x.shape[-1:], weight.to(x) + 1, bias.to(x), eps)


def rotate_halves(x: Tensor, rope: Tensor) -> Tensor:
    """[..., T, head_dim] by complex phases [T or 1, n], in float32 at least."""
    n, x = rope.shape[-1], wide(x)
    pairs = torch.complex(x[..., :n].contiguous(), x[..., n : 2 * n].contiguous()) * rope
    return torch.cat([pairs.real.type_as(x), pairs.imag.type_as(x), x[..., 2 * n :]], -1)


def heads_normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float, rope: Tensor | None, head_dim: int) -> Tensor:
    """`one_plus_norm` of each head of [B, T, heads * head_dim], weight and bias [head_dim], then `rotate_halves` by phases [T, n]
    -> [B, heads, T, head_dim]. Without `rope`, the norm alone."""
    if path_for(x.device, OPERATION).name == "triton":
        return _opaque(x, weight, bias, eps, rope, head_dim)
    return in_pytorch(x, weight, bias, eps, rope, head_dim)


def in_pytorch(x: Tensor, weight: Tensor, bias: Tensor, eps: float, rope: Tensor | None, head_dim: int) -> Tensor:
    """`heads_normed` without Triton."""
    y = one_plus_norm(x.unflatten(-1, (-1, head_dim)).transpose(1, 2), weight, bias, eps)
    return (y if rope is None else rotate_halves(y, rope)).to(x)


def write_heads_normed(keys: Tensor, values: Tensor, at: slice | Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, eps: float,
                       rope: Tensor | None) -> None:  # fmt: skip
    """Slots `at`, a range or int64 [T], of keys and values [B, heads, slots, head_dim] become `heads_normed` of k, and v as it is.

    k, v: [B, T, heads * head_dim]. As one Triton kernel, keys are never laid down anywhere else.
    """
    if path_for(k.device, OPERATION).name == "triton":
        _write(keys, values, *indexed(at), k, v, weight, bias, eps, rope)
    else:
        write_in_pytorch(keys, values, at, k, v, weight, bias, eps, rope)


def write_in_pytorch(keys: Tensor, values: Tensor, at: slice | Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, eps: float,
                     rope: Tensor | None) -> None:  # fmt: skip
    """`write_heads_normed` without Triton."""
    put(keys, at, in_pytorch(k, weight, bias, eps, rope, keys.shape[3]))
    put(values, at, v.unflatten(-1, (-1, values.shape[3])).transpose(1, 2))


@torch.library.custom_op(
    "flowcache::heads_normed",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? rope, int head_dim) -> Tensor",
)
def _opaque(x: Tensor, weight: Tensor, bias: Tensor, eps: float, rope: Tensor | None, head_dim: int) -> Tensor:
    """`heads_normed` as one operation that torch.compile does not look into; contiguous."""

    def call(kernels: Any) -> Tensor | None:
        serves = kernels.serves(x, weight, bias, rope, head_dim)
        return kernels.heads_normed(x, weight, bias, eps, rope, head_dim) if serves else None

    out = by_triton(OPERATION, "head_rotation_triton", x.device, call)
    return in_pytorch(x, weight, bias, eps, rope, head_dim).contiguous() if out is None else out


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, rope: Tensor | None, head_dim: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2] // head_dim, x.shape[1], head_dim)


@torch.library.custom_op(
    "flowcache::write_heads_normed",
    mutates_args=("keys", "values"),
    schema="(Tensor(a!) keys, Tensor(b!) values, Tensor? index, int first, Tensor k, Tensor v, Tensor weight, Tensor bias, float eps, "
    "Tensor? rope) -> ()",
)
def _write(keys: Tensor, values: Tensor, index: Tensor | None, first: int, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, eps: float,
           rope: Tensor | None) -> None:  # fmt: skip
    """`write_heads_normed` as one operation that torch.compile does not look into. `index`: of the slots; None: from `first` on."""

    def call(kernels: Any) -> bool | None:
        serves = kernels.serves_write(keys, values, index, first, k, v, weight, bias, rope)
        return kernels.write_heads_normed(keys, values, index, first, k, v, weight, bias, eps, rope) if serves else None

    if by_triton(OPERATION, "head_rotation_triton", k.device, call) is None:
        write_in_pytorch(keys, values, slice(first, first + k.shape[1]) if index is None else index, k, v, weight, bias, eps, rope)


@_write.register_fake
def _(keys: Tensor, values: Tensor, index: Tensor | None, first: int, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, eps: float,
      rope: Tensor | None) -> None: ...  # fmt: skip
