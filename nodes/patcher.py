"""A file becomes a ModelPatcher: dtypes, devices and quantised weights, as the host handles them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch
from comfy.cli_args import args

from ..flowcache_core.device import fast_dtype
from ..flowcache_core.models.bundle import preview_of
from ..flowcache_core.models.family import AUTO
from ..flowcache_core.models.quantised import FLOAT8, is_companion
from .around_run import outer_sample
from .host_model import HostConfig, HostModel
from .model_files import open_model
from .native_model import NativeConfig, host_has, native_model
from .settings_on_model import OPTIONS


def load(path: Path, name: str, family: str = AUTO, disable_dynamic: bool = False) -> Any:
    """A file, any file of a set, or a folder -> ModelPatcher. Raises ValueError, before weights are read, for what does not fit.

    `family`: its name, where the user says so; otherwise what the file says.

    fp8 matrices stay fp8, and what our networks ask for in float32 has it; everything else has the dtype that the host chooses, or computes in; on a
    processor a bfloat16 file stays bfloat16 where that is multiplied natively. Without a conversion, weights
    stay views of the mapped file.
    """
    file = open_model(path, name, family)
    quantised = any(key.endswith(".comfy_quant") for key in file.weights)
    native = host_has(file.found.family)
    host = (NativeConfig if native else HostConfig)(file.found, quantised, file.operations, preview_of(file.found.family, path))
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    stored, supported = comfy.utils.weight_dtype(file.weights), host.supported_inference_dtypes
    if stored in FLOAT8 and not quantised:
        dtype = stored
    else:
        parameters = comfy.utils.calculate_parameters(file.weights)
        dtype = comfy.model_management.unet_dtype(None, parameters, supported, None if quantised else stored)
    cast = comfy.model_management.unet_manual_cast(None if quantised else dtype, device, supported)
    if stored == dtype_of_processor(device):
        dtype, cast = stored, None
    logging.info(f"FlowCache: {name} is computed in {str(cast or dtype).removeprefix('torch.')} on {device}")
    host.set_inference_dtype(dtype, cast)
    model = (native_model() if native else HostModel)(host, file.layout, None if quantised else torch.device("meta"))
    model.files = file.files
    plain = disable_dynamic or file.patcher is not None
    patcher = (comfy.model_patcher.ModelPatcher if plain else comfy.model_patcher.CoreModelPatcher)(model, load_device=device, offload_device=offload)
    weights = file.weights
    if file.operations is None and not patcher.is_dynamic():
        as_stored = {key for key in weights if is_companion(key, weights) or f"{key.removesuffix('.weight')}.comfy_quant" in weights}
        wide = set() if native else {key for key, slot in model.diffusion_model.named_parameters() if slot.dtype == torch.float32}
        blocks = file.found.family.blocks
        weights = {
            k: v if k in as_stored else _placed(k, v, torch.float32 if k in wide else dtype, cast or dtype, blocks) for k, v in weights.items()
        }
    model.load_model_weights(weights, "", assign=True)
    if patcher.is_dynamic():
        _keep_small_weights(model.diffusion_model, cast or dtype)
    elif not comfy.model_management.is_device_cpu(offload):
        model.to(offload)
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, OPTIONS, outer_sample)
    patcher = file.patcher(patcher) if file.patcher else patcher
    patcher.cached_patcher_init = (load, (path, name, family))
    return patcher


NAMED = ("fp32_unet", "fp64_unet", "fp16_unet", "bf16_unet", "fp8_e4m3fn_unet", "fp8_e5m2_unet", "fp8_e8m0fnu_unet", "force_fp32", "force_fp16")
"""Options of the host by which somebody has named a dtype."""


def dtype_of_processor(device: torch.device) -> torch.dtype | None:
    """bfloat16 where a processor multiplies it natively: the host would take float32, which needs twice the time and memory. None where the host
    decides: on other devices, and where it was started with a dtype (--fp32-unet)."""
    named = any(getattr(args, name, False) for name in NAMED)
    if named or not comfy.model_management.is_device_cpu(device) or fast_dtype() == torch.float32:
        return None
    return fast_dtype()


def _placed(key: str, weight: torch.Tensor, dtype: torch.dtype, compute: torch.dtype, blocks: str) -> torch.Tensor:
    """A weight in the dtype it is kept in: fp8 is for the matrices of the blocks alone, whose names begin with `blocks`."""
    if dtype not in FLOAT8:
        return weight.to(dtype)
    matrix = weight.ndim == 2 and key.startswith(blocks)
    return weight if matrix and weight.dtype in FLOAT8 else weight.to(compute)


def _keep_small_weights(network: torch.nn.Module, compute: torch.dtype) -> None:
    """Dynamic loading casts a weight to the dtype that is noted for it: what an fp8 file keeps wider stays wider."""
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if getattr(module, f"{name}_comfy_model_dtype", None) in FLOAT8 and weight.dtype not in FLOAT8:
                setattr(module, f"{name}_comfy_model_dtype", compute)
