"""What the noise level does to tokens: a shift and a scale behind a layer norm, a gate before the residual. One of each per latent frame."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift: [B, T, d] with one shift and scale [B, F, d] per latent frame, broadcast over the frame's tokens."""
    x, shift, scale = x.unflatten(1, (shift.shape[1], -1)), shift.unsqueeze(2), scale.unsqueeze(2)
    if x.element_size() == 2:
        return torch.addcmul(shift, x, 1 + scale).flatten(1, 2)
    return (x * (1 + scale)).add_(shift).flatten(1, 2)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y gate: [B, T, d] twice, one gate [B, F, d] per latent frame."""
    y, gate = y.unflatten(1, (gate.shape[1], -1)), gate.unsqueeze(2)
    if x.element_size() == 2:
        return torch.addcmul(x.view_as(y), y, gate).flatten(1, 2)
    return (y * gate).flatten(1, 2).add_(x)


def normed_modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm of [B, T, d] without weights, then `modulated`.

    In 16 bits one noise level for all frames is the weight and the bias of the norm, which PyTorch applies in the same pass.
    """
    if x.element_size() == 2 and shift.shape[:2] == (1, 1):
        return F.layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), eps)
    return modulated(F.layer_norm(x, x.shape[-1:], eps=eps), shift, scale)
