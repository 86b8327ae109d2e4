"""What the noise level does to tokens: a shift and a scale behind a layer norm, a gate before the residual. One of each per latent frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .choice import by_triton, path_for

MODULATION, GATE = "norm and modulation", "gate and residual"


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


def normed_modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm of [B, T, d] without weights, then `modulated`."""
    if path_for(x.device, MODULATION).name == "triton":
        return _normed_modulated(x, shift, scale, eps)
    return in_pytorch(x, shift, scale, eps)


def in_pytorch(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`normed_modulated` without Triton. In 16 bits one noise level for all frames is weight and bias of the norm, applied in the same pass."""
    if x.element_size() == 2 and shift.shape[:2] == (1, 1):
        return F.layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), eps)
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


@_gated.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_normed_modulated.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
