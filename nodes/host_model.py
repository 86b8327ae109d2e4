"""SkyReels-V2 as a ComfyUI model: loaded, patched, offloaded and guided like any other."""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import torch

from ..flowcache_core.kv.compressor import Budget, Compressor
from ..flowcache_core.models.attention import bidirectional
from ..flowcache_core.models.checkpoint import release_of
from ..flowcache_core.models.quantised import FLOAT8, is_companion
from ..flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from ..flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from ..flowcache_core.policies.protocol import CachePolicy, PartPolicy, TokenPolicy
from ..flowcache_core.run.footprint import Footprint
from ..flowcache_core.run.session import Session
from ..flowcache_core.run.window import WindowSession
from ..flowcache_core.sampling.chunk import Chunk
from .model_files import open_model

KV_NODE, CHUNKWISE_NODE, MOTION_NODE = "KV Compressor", "Chunkwise Cache", "Motion Cache"
OPTIONS = "flowcache"
"""Key in transformer_options under which our settings travel on a MODEL: {"policy": CachePolicy, "kv": Compressor}, both frozen."""
TURN = "flowcache_turn"


@dataclass(frozen=True)
class Expected:
    """A run as it is announced. `frames`: latent frames of its longest evaluation; `held`: what it will hold beside that."""

    frames: int
    held: Footprint
    budget: Budget | None = None


EXPECTED: ContextVar[Expected | None] = ContextVar("flowcache_expected", default=None)
"""Between the announcement of a run and its first step."""


@dataclass(frozen=True)
class ChunkTurn:
    """What the sampler hands to the network for one evaluation: the run and the chunk."""

    session: Session
    chunk: Chunk

    def denoise(self, x: torch.Tensor, context: torch.Tensor, branches: tuple[Any, ...]) -> torch.Tensor:
        return self.session.denoise(x, self.chunk, context, branches)


@dataclass(frozen=True)
class WindowTurn:
    """The same for a bidirectional window: the run and the noise level of every latent frame."""

    session: WindowSession
    sigmas: tuple[float, ...]

    def denoise(self, x: torch.Tensor, context: torch.Tensor, branches: tuple[Any, ...]) -> torch.Tensor:
        return self.session.denoise(x, self.sigmas, context, branches)


@dataclass(frozen=True)
class ChunkLayout:
    """How the model was trained: latent frames per chunk, chunks it can look at together, frames per second, attention.

    `causal`: trained with block-causal attention too; without it, only with attention over the whole window.
    """

    chunk_frames: int
    window: int
    fps: int = 24
    causal: bool = False


class HostNetwork(SkyReelsV2):
    """The network under ComfyUI's calling convention. With a turn it is one step of our sampler, without it a whole film."""

    def __init__(self, config: SkyReelsConfig, dtype: Any = None, device: Any = None, operations: Any = None, **unused: Any) -> None:
        super().__init__(config, operations=operations, device=device, dtype=dtype)

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **unused):  # type: ignore[no-untyped-def, override]
        options = transformer_options or {}
        turn: ChunkTurn | WindowTurn | None = options.get(TURN)
        if turn is not None:
            return turn.denoise(x, context, tuple(options["uuids"]))
        if nodes := nodes_of({"transformer_options": options}):
            raise ValueError(wrong_sampler(nodes))
        t = timestep.floor().view(-1, 1)
        return super().forward(x, t, self.text_kv(context), bidirectional)


class HostModel(comfy.model_base.BaseModel):
    """A flow model of per-chunk noise levels. What a run of AR Chunk Sampler will hold is part of its memory estimate."""

    def __init__(self, model_config: Any, layout: ChunkLayout, device: Any = None) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=HostNetwork)
        self.device = None  # the patcher decides where it lies
        self.layout = layout

    def adapter(self) -> SkyReelsAdapter:
        return SkyReelsAdapter(self.diffusion_model, self.get_dtype_inference())

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        if kwargs.get("cross_attn") is not None:
            out["c_crossattn"] = comfy.conds.CONDRegular(kwargs["cross_attn"])
        return out

    def memory_required(self, input_shape: Any, cond_shapes: Any = {}) -> Any:  # noqa: B006 (the host's signature)
        """Bytes for an evaluation of `input_shape`; before a run of chunks, of one chunk and all that the run will hold."""
        expected = EXPECTED.get()
        if expected is None:
            return super().memory_required(input_shape, cond_shapes)
        return super().memory_required([*input_shape[:2], expected.frames, *input_shape[3:]], cond_shapes) + expected.held.held


class HostConfig(comfy.supported_models_base.BASE):
    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}
    sampling_settings = {"shift": 8.0}
    latent_format = comfy.latent_formats.Wan21
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]

    def __init__(self, config: SkyReelsConfig, quantised: bool, operations: Any = None) -> None:
        super().__init__({"config": config})
        self.memory_usage_factor = config.dim / 2222
        self.quant_config = {"mixed_ops": True} if quantised else None
        self.custom_operations = operations


def load(path: Path, name: str, layout: ChunkLayout, disable_dynamic: bool = False) -> Any:
    """A file, any file of a set, or a folder -> ModelPatcher. Raises ValueError, before weights are read, for what does not fit.

    fp8 matrices stay fp8; everything else has the dtype that the host chooses, or computes in. Without a conversion, weights
    stay views of the mapped file.
    """
    file = open_model(path, name)
    quantised = any(key.endswith(".comfy_quant") for key in file.weights)
    host = HostConfig(file.config, quantised, file.operations)
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    stored, supported = comfy.utils.weight_dtype(file.weights), host.supported_inference_dtypes
    if stored in FLOAT8 and not quantised:
        dtype = stored
    else:
        parameters = comfy.utils.calculate_parameters(file.weights)
        dtype = comfy.model_management.unet_dtype(None, parameters, supported, None if quantised else stored)
    cast = comfy.model_management.unet_manual_cast(None if quantised else dtype, device, supported)
    host.set_inference_dtype(dtype, cast)
    model = HostModel(host, layout, None if quantised else torch.device("meta"))
    plain = disable_dynamic or file.patcher is not None
    patcher = (comfy.model_patcher.ModelPatcher if plain else comfy.model_patcher.CoreModelPatcher)(model, load_device=device, offload_device=offload)
    weights = file.weights
    if file.operations is None and not patcher.is_dynamic():
        as_stored = {key for key in weights if is_companion(key, weights) or f"{key.removesuffix('.weight')}.comfy_quant" in weights}
        weights = {k: v if k in as_stored else _placed(k, v, dtype, cast or dtype) for k, v in weights.items()}
    model.load_model_weights(weights, "", assign=True)
    if patcher.is_dynamic():
        _keep_small_weights(model.diffusion_model, cast or dtype)
    elif not comfy.model_management.is_device_cpu(offload):
        model.to(offload)
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, OPTIONS, outer_sample)
    patcher = file.patcher(patcher) if file.patcher else patcher
    patcher.cached_patcher_init = (load, (path, name, layout))
    return patcher


def _placed(key: str, weight: torch.Tensor, dtype: torch.dtype, compute: torch.dtype) -> torch.Tensor:
    """A weight in the dtype it is kept in: fp8 is for the matrices of the blocks alone."""
    if dtype not in FLOAT8:
        return weight.to(dtype)
    matrix = weight.ndim == 2 and key.startswith("blocks.")
    return weight if matrix and weight.dtype in FLOAT8 else weight.to(compute)


def _keep_small_weights(network: torch.nn.Module, compute: torch.dtype) -> None:
    """Dynamic loading casts a weight to the dtype that is noted for it: what an fp8 file keeps wider stays wider."""
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if getattr(module, f"{name}_comfy_model_dtype", None) in FLOAT8 and weight.dtype not in FLOAT8:
                setattr(module, f"{name}_comfy_model_dtype", compute)


def outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):  # type: ignore[no-untyped-def]
    """Around every run of our MODEL, before weights are moved: our sampler checks its plan here, a stock one is refused our settings."""
    around = getattr(sampler, "around", None)
    if around is not None:
        return around(executor, noise, latent_image, sampler, sigmas, *args, **kwargs)
    if nodes := nodes_of(executor.class_obj.model_options):
        raise ValueError(wrong_sampler(nodes))
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def node_of(policy: CachePolicy) -> str:
    """The node that put a policy on a MODEL."""
    return MOTION_NODE if isinstance(policy, TokenPolicy | PartPolicy) else CHUNKWISE_NODE


def nodes_of(model_options: dict[str, Any]) -> str:
    """The nodes whose settings a MODEL carries, in words; "" where it carries none."""
    policy, compressor = policy_of(model_options), compressor_of(model_options)
    return " and ".join([*([node_of(policy)] if policy else []), *([KV_NODE] if compressor else [])])


def wrong_sampler(nodes: str) -> str:
    works = "work" if " and " in nodes else "works"
    return f"{nodes} {works} with the AR Chunk Sampler: connect that node to the sampler input, or bypass {nodes}"


def take_expected() -> Expected | None:
    """What was announced. From now on it is held, and no longer to be asked for."""
    expected = EXPECTED.get()
    EXPECTED.set(None)
    return expected


def require_ours(model: Any, node: str) -> HostModel:
    """The HostModel in a MODEL. Raises ValueError that names what was connected instead."""
    inner = getattr(model, "model", model)
    if not isinstance(inner, HostModel):
        raise ValueError(
            f"{node} cannot serve a {type(inner).__name__} model: load it with the Load AR Video Model node (SkyReels-V2 diffusion forcing)"
        )
    _require_fitting_lora(model, inner, node)
    stacked = [key for kind in getattr(model, "wrappers", {}).values() for key in kind if key in ("easycache", "lazycache")]
    if stacked:
        raise ValueError(
            f"{node} works by chunk, and {stacked[0]} skips steps without knowing of chunks, so they cannot work together: bypass one of the two"
        )
    return inner


def with_policy(model: Any, policy: CachePolicy) -> Any:
    """A clone of a ModelPatcher that carries the policy; what an earlier cache node had put there is replaced."""
    return _with(model, policy=policy)


def with_compressor(model: Any, compressor: Compressor) -> Any:
    """A clone of a ModelPatcher that carries the settings of history, in place of earlier ones."""
    return _with(model, kv=compressor)


def policy_of(model_options: dict[str, Any]) -> CachePolicy | None:
    policy: CachePolicy | None = _ours(model_options).get("policy")
    return policy


def compressor_of(model_options: dict[str, Any]) -> Compressor | None:
    compressor: Compressor | None = _ours(model_options).get("kv")
    return compressor


def _with(model: Any, **settings: Any) -> Any:
    """A clone with some of our settings; those of other nodes stay."""
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    patched.model_options["transformer_options"] = {**options, OPTIONS: {**_ours(patched.model_options), **settings}}
    return patched


def _ours(model_options: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = model_options.get("transformer_options", {}).get(OPTIONS, {})
    return settings


def _require_fitting_lora(model: Any, inner: HostModel, node: str) -> None:
    """A LoRA changes a weight by the product of two matrices; both have to fit."""
    wrong = []
    for key, patches in getattr(model, "patches", {}).items():
        shape = tuple(comfy.utils.get_attr(inner, key).shape)
        for lora in (patch[1] for patch in patches if getattr(patch[1], "name", "") == "lora" and patch[3] is None):
            made_for = (lora.weights[0].shape[0], math.prod(lora.weights[1].shape[1:]))
            if lora.weights[3] is None and lora.weights[5] is None and made_for != (shape[0], math.prod(shape[1:])):
                wrong.append((key.removeprefix("diffusion_model."), made_for, shape))
    if wrong:
        key, made_for, shape = wrong[0]
        raise ValueError(
            f"{node}: {len(wrong)} layers of the LoRA do not fit, such as {key}: it is for a matrix of {made_for}, this model has {shape}. "
            f"It was made for another size: use one for {release_of(inner.diffusion_model.config)}, or bypass it"
        )
    if getattr(model, "attachments", {}).get("lora_metadata") and not model.patches:
        raise ValueError(
            f"{node}: none of the LoRA's layers is in this model, so it would change nothing: it was made for another kind of model, or names "
            "its layers in the Diffusers way, which this ComfyUI does not read for Wan models. Bypass it, or use one with original or kohya names"
        )
