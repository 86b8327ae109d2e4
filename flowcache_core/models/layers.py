"""Layers and what follows them as one operation, where they are no more than their weights. What somebody has put in their place is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.linear import Activation, activated, linear
from ..kernels.modulation import modulated, normed_modulated
from ..kernels.rotation import normed_rotated, rotate

KNOWN = ("torch.nn.modules.linear", "torch.nn.modules.normalization", "comfy.ops")
"""Modules of Python whose layers compute what their name says. Those of ComfyUI do as long as they neither cast nor patch a weight in the call."""
IN_THE_CALL = ("comfy_cast_weights", "weight_function", "bias_function")
"""What ComfyUI sets on a layer whose weights are cast, moved or patched (LoRA on offloaded weights, fp8, GGUF) whenever it is called."""


def plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether calling a linear layer or a norm is the textbook operation on its own weights, in the dtype and on the device of x.

    Not so with hooks, with another forward or another kind of weight, and where gradients are wanted.
    """
    known = isinstance(layer, nn.Linear | nn.LayerNorm | nn.RMSNorm) and type(layer).forward.__module__ in KNOWN
    if not known or "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    weights = [weight for weight in (getattr(layer, name, None) for name in ("weight", "bias")) if weight is not None]
    learning = torch.is_grad_enabled() and any(one.requires_grad for one in (x, *weights))
    alike = all(type(weight) is nn.Parameter and weight.dtype == x.dtype and weight.device == x.device for weight in weights)
    return alike and not learning and not any(getattr(layer, name, None) for name in IN_THE_CALL)


def projected(layer: nn.Module, x: Tensor, activation: Activation = "none") -> Tensor:
    """A linear layer and its activation: [..., n] -> [..., m]."""
    if plain(layer, x):
        return linear(x, layer.weight, layer.bias, activation)  # type: ignore[arg-type]
    return activated(layer(x), activation)


def fed_forward(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Linear, GELU, linear: [..., d] -> [..., d]."""
    first, gelu, last = layers
    if type(gelu) is not nn.GELU or any(one._forward_hooks or one._forward_pre_hooks or "forward" in vars(one) for one in (layers, gelu)):
        y: Tensor = layers(x)
        return y
    return projected(last, projected(first, x, "gelu-tanh" if gelu.approximate == "tanh" else "gelu-erf"))


def turned(norm: nn.Module, x: Tensor, rope: Tensor | None, head_dim: int) -> Tensor:
    """An RMS norm over the width, and `rope` where there are positions: [B, T, heads * head_dim] -> [B, heads, T, head_dim]."""
    if plain(norm, x):
        return normed_rotated(x, norm.weight, norm.eps, rope, head_dim)  # type: ignore[arg-type]
    y = norm(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return y if rope is None else rotate(y, rope)


def modulated_norm(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A layer norm without weights, then shift and scale [B, F, d] per latent frame: [B, T, d] -> [B, T, d]."""
    if plain(norm, x):
        return normed_modulated(x, shift, scale, norm.eps)  # type: ignore[arg-type]
    return modulated(norm(x), shift, scale)
