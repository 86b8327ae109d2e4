"""SkyReels-V2 as a ComfyUI model: loaded, patched, offloaded and guided like any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch

from ..flowcache_core.chunk import Chunk
from ..flowcache_core.decision import CachePolicy, TokenPolicy
from ..flowcache_core.models.attention import bidirectional
from ..flowcache_core.models.checkpoint import skyreels_config, without_prefix
from ..flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from ..flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from ..flowcache_core.session import Session

OPTIONS = "flowcache"
"""Key in transformer_options under which our settings travel on a MODEL: {"policy": a frozen dataclass}."""
TURN = "flowcache_turn"


@dataclass(frozen=True)
class Turn:
    """What the sampler hands to the network for one evaluation: the run and the chunk."""

    session: Session
    chunk: Chunk


@dataclass(frozen=True)
class ChunkLayout:
    """How the model was trained: latent frames per chunk, chunks it can look at together, frames per second."""

    chunk_frames: int
    window: int
    fps: int = 24


class HostNetwork(SkyReelsV2):
    """The network under ComfyUI's calling convention. With a Turn it is one chunk of a session, without it a whole film."""

    def __init__(self, config: SkyReelsConfig, dtype: Any = None, device: Any = None, operations: Any = None, **unused: Any) -> None:
        super().__init__(config, operations=operations, device=device, dtype=dtype)

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **unused):  # type: ignore[no-untyped-def, override]
        options = transformer_options or {}
        turn: Turn | None = options.get(TURN)
        if turn is not None:
            return turn.session.denoise(x, turn.chunk, context, tuple(options["uuids"]))
        if (policy := options.get(OPTIONS, {}).get("policy")) is not None:
            node = "Motion Cache" if isinstance(policy, TokenPolicy) else "Chunkwise Cache"
            raise ValueError(f"{node} works with the AR Chunk Sampler: connect that node to the sampler input, or bypass {node}")
        t = timestep.floor().view(-1, 1)
        return super().forward(x, t, self.text_kv(context), bidirectional)


class HostModel(comfy.model_base.BaseModel):
    """A flow model of per-chunk noise levels; the KV cache is part of its memory estimate."""

    def __init__(self, model_config: Any, layout: ChunkLayout, device: Any = None) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=HostNetwork)
        self.layout = layout

    def adapter(self) -> SkyReelsAdapter:
        return SkyReelsAdapter(self.diffusion_model, self.get_dtype_inference())

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        if kwargs.get("cross_attn") is not None:
            out["c_crossattn"] = comfy.conds.CONDRegular(kwargs["cross_attn"])
        return out

    def memory_required(self, input_shape: Any, cond_shapes: Any = {}) -> Any:  # noqa: B006 (the host's signature)
        config: SkyReelsConfig = self.diffusion_model.config
        tokens = input_shape[0] * input_shape[2] * (input_shape[3] // 2) * (input_shape[4] // 2)
        kv = 2 * config.layers * tokens * config.dim * comfy.model_management.dtype_size(self.get_dtype_inference())
        return super().memory_required(input_shape, cond_shapes) + kv


class HostConfig(comfy.supported_models_base.BASE):
    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}
    sampling_settings = {"shift": 8.0}
    latent_format = comfy.latent_formats.Wan21
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]

    def __init__(self, config: SkyReelsConfig) -> None:
        super().__init__({"config": config})
        self.memory_usage_factor = config.dim / 2222


def load(weights: dict[str, torch.Tensor], name: str, layout: ChunkLayout) -> Any:
    """State dict -> ModelPatcher. Raises ValueError before anything is moved when a key or shape does not fit."""
    weights = without_prefix(weights)
    config = skyreels_config(weights, name)
    host = HostConfig(config)
    device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=host.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    host.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, host.supported_inference_dtypes))
    model = HostModel(host, layout)
    offload = comfy.model_management.unet_offload_device()
    patcher = comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=offload)
    if not comfy.model_management.is_device_cpu(offload):
        model.to(offload)
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
    return patcher


def require_ours(model: Any, node: str) -> HostModel:
    """The HostModel in a MODEL. Raises ValueError that names what was connected instead."""
    inner = getattr(model, "model", model)
    if not isinstance(inner, HostModel):
        raise ValueError(
            f"{node} cannot serve a {type(inner).__name__} model: load it with the Load AR Video Model node (SkyReels-V2 diffusion forcing)"
        )
    stacked = [key for kind in getattr(model, "wrappers", {}).values() for key in kind if key in ("easycache", "lazycache")]
    if stacked:
        raise ValueError(f"{node} and {stacked[0]} both decide which steps to skip: bypass one of the two")
    return inner


def policy_of(model_options: dict[str, Any]) -> CachePolicy | None:
    policy: CachePolicy | None = model_options.get("transformer_options", {}).get(OPTIONS, {}).get("policy")
    return policy
