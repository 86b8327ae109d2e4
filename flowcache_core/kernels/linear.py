"""A linear layer, with or without its activation, by whichever form is fastest on the device at hand."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["none", "gelu-tanh", "gelu-erf"]
ONE_DNN: dict[Activation, tuple[str, str]] = {"none": ("none", ""), "gelu-tanh": ("gelu", "tanh"), "gelu-erf": ("gelu", "none")}
"""As the fused product of oneDNN names an activation and its form."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """activation(x weight^T + bias): [..., n], [m, n], [m] -> [..., m].

    PyTorch's own product first lays the bias over the whole output on a processor. In bfloat16 there one product of oneDNN takes bias and
    activation along and rounds once; the weight stays as it is. No gradient passes through that form. torch.compile fuses by itself.
    """
    halves = x.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16
    if halves and not torch.compiler.is_compiling() and has_fused_product():
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, ONE_DNN[activation][0], [], ONE_DNN[activation][1])
        return fused
    return activated(F.linear(x, weight, bias), activation)


def activated(y: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "none":
            return y
        case "gelu-tanh":
            return F.gelu(y, approximate="tanh")
        case "gelu-erf":
            return F.gelu(y)


@cache
def has_fused_product() -> bool:
    """Whether oneDNN multiplies bfloat16 natively here, and this PyTorch has the operator that inductor calls it by. Tried once."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x = torch.zeros(1, 2, dtype=torch.bfloat16)
    try:
        torch.ops.mkldnn._linear_pointwise(x, x, None, "gelu", [], "tanh")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True
