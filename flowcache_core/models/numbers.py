"""Whether the numbers of a network are numbers. Looked at when its first output is none."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def finite(x: Tensor) -> bool:
    """Whether all elements are numbers. Waits for the device."""
    return bool(torch.isfinite(x.float() if x.itemsize == 1 else x).all())


def damaged(network: object) -> list[str]:
    """Names of the weights that hold NaN or infinity, in their order in the network."""
    named = network.named_parameters() if isinstance(network, nn.Module) else ()
    plain = ((name, weight.detach()) for name, weight in named if weight.is_floating_point() and not weight.is_meta)
    return [name for name, weight in plain if type(weight) is Tensor and not finite(weight)]


def not_numbers(network: object, dtype: torch.dtype) -> str:
    """Why the network's output is not made of numbers, and what helps. `dtype`: of the output."""
    problem, names = "the first output of the network holds NaN or infinity, and so would the film", damaged(network)
    if not names:
        kind = str(dtype).removeprefix("torch.")
        return f"{problem}. All weights are numbers: in {kind} something became too large, or the text holds it; use a file in bf16, or another text"
    more = f", and so do {len(names) - 1} more weights" if len(names) > 1 else ""
    return f"{problem}: {names[0]} holds such values{more}. The file is damaged, or a LoRA is: download it again, or bypass the LoRA"
