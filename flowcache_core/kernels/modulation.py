"""What the noise level does to tokens: a shift and a scale behind a layer norm, a gate before the residual, with a layer norm between these two
or without. One of each per latent frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .choice import by_triton, path_for
from .head_rotation import one_plus_norm, wide

FEW = 8
"""Noise levels of one call that are gone through one by one."""
MODULATION, GATE, POST_NORM = "norm and modulation", "gate and residual", "gate, norm and residual"


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift: [B, T, d] with one shift and scale [B, F, d] per latent frame, broadcast over the frame's tokens."""
    x, shift, scale = x.unflatten(1, (shift.shape[1], -1)), shift.unsqueeze(2), scale.unsqueeze(2)
    if x.element_size() == 2:
        return torch.addcmul(shift, x, 1 + scale).flatten(1, 2)
    return (x * (1 + scale)).add_(shift).flatten(1, 2)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y gate: [B, T, d] twice, one gate [B or 1, F, d] per latent frame."""
    if path_for(x.device, GATE).name == "triton" and not torch.is_grad_enabled():
        return _gated(x, y, gate)
    return gated_in_pytorch(x, y, gate)


def gated_in_pytorch(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`gated` without Triton."""
    y, gate = y.unflatten(1, (gate.shape[1], -1)), gate.unsqueeze(2)
    if x.element_size() == 2:
        return torch.addcmul(x.view_as(y), y, gate).flatten(1, 2)
    return (y * gate).flatten(1, 2).add_(x)


def gated_normed(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x + `one_plus_norm` of y gate, in float32 at least: [B, T, d] twice, one gate [B or 1, F, d] per latent frame, weight and bias [d]."""
    if path_for(x.device, POST_NORM).name == "triton":
        return _gated_normed(x, y, gate, weight, bias, eps)
    return gated_normed_in_pytorch(x, y, gate, weight, bias, eps)


def gated_normed_in_pytorch(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`gated_normed` without Triton."""
    return (one_plus_norm(times_gate(y, gate), weight, bias, eps) + wide(x)).to(x.dtype)


def times_gate(y: Tensor, gate: Tensor) -> Tensor:
    """[B, T, d] times one gate [B or 1, F, d] per latent frame, in float32 at least."""
    return (wide(y).unflatten(1, (gate.shape[1], -1)) * gate.unsqueeze(2)).flatten(1, 2)


def normed_modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm of [B, T, d] without weights, then `modulated`."""
    if path_for(x.device, MODULATION).name == "triton":
        return _normed_modulated(x, shift, scale, eps)
    return in_pytorch(x, shift, scale, eps)


def in_pytorch(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`normed_modulated` without Triton. In 16 bits a noise level that all films share is weight and bias of the norm, which rounds once."""
    if x.element_size() == 2 and shift.shape[0] == 1 and shift.shape[1] <= FEW:
        each = zip(x.chunk(shift.shape[1], 1), 1 + scale[0], shift[0], strict=True)
        parts = [F.layer_norm(part, x.shape[-1:], weight, bias, eps) for part, weight, bias in each]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return modulated(F.layer_norm(x, x.shape[-1:], eps=eps), shift, scale)


@torch.library.custom_op("flowcache::gated", mutates_args=(), schema="(Tensor x, Tensor y, Tensor gate) -> Tensor")
def _gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`gated` as one operation that torch.compile does not look into; contiguous."""

    def call(kernels: Any) -> Tensor | None:
        return kernels.gated(x, y, gate) if kernels.serves(x, gate) and kernels.serves(y, gate) else None

    out = by_triton(GATE, "modulation_triton", x.device, call)
    return gated_in_pytorch(x, y, gate).contiguous() if out is None else out


@torch.library.custom_op("flowcache::normed_modulated", mutates_args=(), schema="(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor")
def _normed_modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`normed_modulated` as one operation that torch.compile does not look into; contiguous."""

    def call(kernels: Any) -> Tensor | None:
        return kernels.normed_modulated(x, shift, scale, eps) if kernels.serves(x, shift, scale) else None

    out = by_triton(MODULATION, "modulation_triton", x.device, call)
    return in_pytorch(x, shift, scale, eps).contiguous() if out is None else out


@torch.library.custom_op(
    "flowcache::gated_normed", mutates_args=(), schema="(Tensor x, Tensor y, Tensor gate, Tensor weight, Tensor bias, float eps) -> Tensor"
)
def _gated_normed(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`gated_normed` as one operation that torch.compile does not look into; contiguous."""

    def call(kernels: Any) -> Tensor | None:
        serves = kernels.serves_post_norm(x, y, gate, weight, bias)
        return kernels.gated_normed(x, y, gate, weight, bias, eps) if serves else None

    out = by_triton(POST_NORM, "modulation_triton", x.device, call)
    return gated_normed_in_pytorch(x, y, gate, weight, bias, eps).contiguous() if out is None else out


@_gated_normed.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_gated.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_normed_modulated.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
