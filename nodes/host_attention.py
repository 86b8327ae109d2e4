"""ComfyUI's own attention as a kernel of the core: what the host was started with, and what another node has set on the MODEL."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.ldm.modules.attention
import torch
from comfy.cli_args import args

from ..flowcache_core.kernels.attention import PYTORCH, Kernel
from .other_nodes import made_by

OVERRIDE = "optimized_attention_override"
"""Key in transformer_options: (function, q, k, v, heads, ...) -> what is attended in its place."""
FLAGS = ("use_sage_attention", "use_flash_attention", "use_pytorch_cross_attention", "use_split_cross_attention", "use_quad_cross_attention")


def host_kernel(options: dict[str, Any]) -> Kernel:
    """The host's attention under these transformer_options."""
    attend = comfy.ldm.modules.attention.optimized_attention
    name = f"ComfyUI's {attend.__name__}"
    if (override := options.get(OVERRIDE)) is not None:
        name = f"{made_by(override)} in place of {name}"
    return Kernel(name, partial(_attend, attend, options))


def kernel_on(device: torch.device, options: dict[str, Any]) -> Kernel:
    """The same; but on the processor the core's own, which is made for it, unless somebody has chosen one."""
    chosen = options.get(OVERRIDE) is not None or any(getattr(args, flag, False) for flag in FLAGS)
    return PYTORCH if device.type == "cpu" and not chosen else host_kernel(options)


def _attend(attend: Any, options: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = attend(q, k, v, heads=q.shape[1], skip_reshape=True, skip_output_reshape=True, transformer_options=options)
    return out
