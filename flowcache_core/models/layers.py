"""Layers and what follows them as one operation, where they are no more than their weights. What somebody has put in their place is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.head_rotation import heads_normed, one_plus_norm, rotate_halves, wide, write_heads_normed
from ..kernels.linear import Activation, activated, linear
from ..kernels.modulation import gated_normed, modulated, normed_modulated, times_gate
from ..kernels.rotation import normed_rotated, rotate, write_normed_rotated
from ..network import LayerAttention, Slots

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(queries, keys, values, input [B, T, dim]), each but the last [B, heads, T, head_dim] -> [B, heads, T, head_dim]: `Attend` of one layer."""
TEXTBOOK = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
KNOWN = ("torch.nn.modules.linear", "torch.nn.modules.normalization", "comfy.ops")
"""Modules of Python whose layers compute what their name says. Those of ComfyUI do as long as they neither cast nor patch a weight in the call."""
IN_THE_CALL = ("comfy_cast_weights", "weight_function", "bias_function")
"""What ComfyUI sets on a layer whose weights are cast, moved or patched (LoRA on offloaded weights, fp8, GGUF) whenever it is called."""


class OnePlusNorm(nn.Module):
    """Layer norm, in float32 at least, whose weight is stored as its distance from 1."""

    def __init__(self, size: int, eps: float, **kw: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = (nn.Parameter(torch.empty(size, **kw)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return one_plus_norm(x, self.weight, self.bias, self.eps)


def plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether calling a linear layer or a norm is the textbook operation on its own weights, on the device of x, and in its dtype unless the norm
    casts them.

    Not so with hooks, with another forward or another kind of weight, and where gradients are wanted.
    """
    kind, own = type(layer), vars(layer)
    casts = kind is OnePlusNorm
    if not (casts or (isinstance(layer, TEXTBOOK) and kind.forward.__module__ in KNOWN)):
        return False
    if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return False
    weights = own["_parameters"]
    if "weight" not in weights:
        return False
    for name in IN_THE_CALL:
        if own[name] if name in own else getattr(kind, name, None):
            return False
    for weight in (weights["weight"], weights.get("bias")):
        if weight is None:
            continue
        if type(weight) is not nn.Parameter or weight.device != x.device or not (casts or weight.dtype == x.dtype):
            return False
        if torch.is_grad_enabled() and weight.requires_grad:
            return False
    return not (torch.is_grad_enabled() and x.requires_grad)


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


def by_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, heads * head_dim] -> [B, heads, T, head_dim]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def turned(norm: nn.Module, x: Tensor, rope: Tensor | None, head_dim: int) -> Tensor:
    """A norm, and `rope` where there are positions: [B, T, heads * head_dim] -> [B, heads, T, head_dim].

    The norm is an RMS norm over the width, before neighbouring channels are turned (Wan), or a `OnePlusNorm` of each head, before its halves are
    (MAGI-1).
    """
    if isinstance(norm, OnePlusNorm):
        if plain(norm, x):
            return heads_normed(x, norm.weight, norm.bias, norm.eps, rope, head_dim)
        y = norm(by_heads(x, head_dim))
        return (y if rope is None else rotate_halves(y, rope)).to(x)
    if plain(norm, x):
        return normed_rotated(x, norm.weight, norm.eps, rope, head_dim)  # type: ignore[arg-type]
    y = by_heads(norm(x), head_dim)
    return y if rope is None else rotate(y, rope)


def attended(attend: Attention, q: Tensor, norm: nn.Module, k: Tensor, v: Tensor, x: Tensor, rope: Tensor, head_dim: int) -> Tensor:
    """Attention of a layer. q: `turned`; k, v: as projected, [B, T, key heads * head_dim], keys to be `turned`; x: what the layer was given.

    Where `attend` says in which slots keys and values belong, they are written there and nowhere else.
    """
    if isinstance(attend, LayerAttention) and plain(norm, k) and (slots := attend.slots(k)) is not None:
        _write(slots, norm, k, v, rope)
        return attend.look(q, x)
    return attend(q, turned(norm, k, rope, head_dim), by_heads(v, head_dim), x)


def _write(slots: Slots, norm: nn.Module, k: Tensor, v: Tensor, rope: Tensor) -> None:
    """A `plain` norm, and the turn, of k into its slots; v into its own."""
    if isinstance(norm, OnePlusNorm):
        write_heads_normed(slots.keys, slots.values, slots.at, k, v, norm.weight, norm.bias, norm.eps, rope)
    else:
        write_normed_rotated(slots.keys, slots.values, slots.at, k, v, norm.weight, norm.eps, rope)  # type: ignore[arg-type]


def post_normed(norm: OnePlusNorm, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + norm(gate y), in float32 at least: [B, T, d] twice, one gate [B, F, d] per latent frame -> [B, T, d]."""
    if plain(norm, x) and not (torch.is_grad_enabled() and (y.requires_grad or gate.requires_grad)):
        return gated_normed(x, y, gate, norm.weight, norm.bias, norm.eps)
    out: Tensor = norm(times_gate(y, gate)) + wide(x)
    return out.to(x.dtype)


def modulated_norm(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A layer norm without weights, then shift and scale [B, F, d] per latent frame: [B, T, d] -> [B, T, d]."""
    if plain(norm, x):
        return normed_modulated(x, shift, scale, norm.eps)  # type: ignore[arg-type]
    return modulated(norm(x), shift, scale)
