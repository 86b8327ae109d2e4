"""KV Compressor on causal models that are ComfyUI's own, under its own sampler: the hooks. What they decide, `run/sequential.py` knows.

On the MODEL lie settings, and functions without a state: keys and values of the whole film are not allocated, and self-attention asks
the KV cache dict of its layer for what attends. The rest is made around every run, and gone behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
import torch

from ..flowcache_core.kv.compressor import Compressor
from ..flowcache_core.models.causal_wan import FPS, CausalWan
from ..flowcache_core.models.wan_vae import TEMPORAL
from ..flowcache_core.run.footprint import readable
from ..flowcache_core.run.sequential import SequentialFilm
from ..flowcache_core.sampling.prompts import forecast_prompts, require_chunks
from .guidance import conds_of
from .host_attention import OVERRIDE
from .host_model import HostModel
from .native_model import SAMPLER, frames_per_block
from .native_run import ATTEND, NativeRun, no_caches
from .other_nodes import CACHES, COMPILE, MODEL, SKIPPED, is_compiled, made_by, on_guidance, require_one_model, require_plain_texts
from .settings_on_model import KV_NODE, clean_pass_of, compressor_of, with_compressor
from .texts import ChunkConds, by_branch, tokens_of

KINDS, CALLS = comfy.patcher_extension.WrappersMP, comfy.patcher_extension.CallbacksMP
KEY = "flowcache_kv"
CACHES_MADE = "diffusion_model.init_kv_caches"
NATIVE = ", or connect a causal model of ComfyUI's own, whose file says causal_ar in its metadata"
EXAMPLE = (60, 104)
"""Height and width of a latent frame of 832 x 480 pixels."""
SHORT, LONG = 21, 60
"""Latent frames of 81 frames; seconds."""
Options = dict[str, Any]


def is_native(model: Any) -> bool:
    """Whether a MODEL is a causal one of the host's own: its network keeps keys and values for the host's sampler."""
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    return all(hasattr(network, name) for name in ("init_kv_caches", "init_crossattn_caches", "blocks", "dim", "num_heads"))


def require_headroom(model: Any, node: str) -> None:
    """Raises ValueError where a cache of steps is put on a causal model that is the host's alone: its sampler puts fresh noise on the prediction of
    each step, and that is all that the next step is given of it."""
    if is_native(model) and not isinstance(model.model, HostModel):
        raise ValueError(
            f"{node} has nothing to save on this model: it makes a block in about 4 steps, and {SAMPLER} begins every step from the last "
            "prediction and fresh noise, so a step that reuses the last prediction is the schedule without that step. Set fewer steps in the "
            f"scheduler instead; {KV_NODE} leaves out the clean pass that nothing looks back on, and bounds the history"
        )


def network_of(model: Any) -> CausalWan:
    """Raises ValueError for heads of another size than Wan's."""
    network = model.model.diffusion_model
    return CausalWan(len(network.blocks), network.dim, network.num_heads)


def with_native(model: Any, compressor: Compressor, clean_pass: bool = True) -> Any:
    """A clone of a MODEL that keeps history within the budget. `clean_pass`: as in `SequentialFilm`. Raises ValueError for what it cannot work
    with."""
    require_native(model)
    patched = with_compressor(model, compressor, clean_pass)
    _patch_network(patched)
    patched.remove_wrappers_with_key(KINDS.OUTER_SAMPLE, KEY)
    patched.add_wrapper_with_key(KINDS.OUTER_SAMPLE, KEY, outer_sample)
    patched.remove_callbacks_with_key(CALLS.ON_CLONE, KEY)
    patched.add_callback_with_key(CALLS.ON_CLONE, KEY, _cloned)
    return patched


def _patch_network(model: Any) -> None:
    """Puts our functions on a MODEL, around the self-attention of its own network. Those that are there are ours."""
    layers = network_of(model).layers
    model.add_object_patch(CACHES_MADE, partial(init_kv_caches, layers))
    for place in map(attention_of, range(layers)):
        model.object_patches.pop(place, None)
        model.add_object_patch(place, partial(attend_by_cache, model.get_model_object(place)))


def _cloned(model: Any, clone: Any) -> None:
    """The host gives a clone a network of its own where it is for another device, or where texts change weights under dynamic VRAM."""
    if clone.model is not model.model and not any(_unserved(clone)):
        _patch_network(clone)


def trained_of(model: Any) -> dict[str, int]:
    """What a MODEL knows of its training, where it does: latent frames that it sees together, frames per second."""
    layout = getattr(model.model, "layout", None)
    return {"horizon": layout.window * layout.chunk_frames, "fps": layout.fps} if layout else {}


def planned(model: Any, compressor: Compressor) -> list[str]:
    """What the KV cache would take with the budget and without it, where blocks are as long as in training and the budget is enough for them."""
    lines, network, trained = [], network_of(model), trained_of(model)
    minute = LONG * trained.get("fps", FPS) // TEMPORAL + 1
    for frames in (model.model.layout.chunk_frames,) if trained else (3, 1):
        with suppress(ValueError):
            short, long = (SequentialFilm.settled(network, compressor, length, frames, 4, EXAMPLE, **trained) for length in (SHORT, minute))
            lines.append(
                f"under {SAMPLER} with {frames} frame{'s' * (frames > 1)} per block, at 832 x 480 in 16 bits: a KV cache of at most "
                f"{readable(long.kv)}; without this node {readable(short.kv_unbounded)} for 81 frames, {readable(long.kv_unbounded)} for a minute"
            )
    return lines


def attention_of(layer: int) -> str:
    return f"diffusion_model.blocks.{layer}.self_attn.forward"


def init_kv_caches(layers: int, batch_size: int, max_seq_len: int, device: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """In place of the network's own method."""
    return no_caches(layers)


def attend_by_cache(before: Callable[..., torch.Tensor], x: torch.Tensor, freqs: torch.Tensor, kv_cache: dict[str, Any] | None = None,
                    transformer_options: Options = {}) -> torch.Tensor:  # noqa: B006 (the host's signature)  # fmt: skip
    """The host's self-attention of one layer, [B, T, C], with the attention that its KV cache dict has for it; without a dict as ever."""
    if kv_cache is None:
        return before(x, freqs, transformer_options=transformer_options)
    return before(x, freqs, transformer_options={**transformer_options, OVERRIDE: kv_cache[ATTEND](x)})


def outer_sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):  # type: ignore[no-untyped-def]
    """Around every run of the MODEL: settles it before weights are moved, and gives it a KV cache until it ends, however it ends. A sampler of
    this pack has one of its own."""
    if hasattr(sampler, "around"):
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    guider = executor.class_obj
    film, texts = settled(guider, noise, sampler, sigmas, denoise_mask), ChunkConds(guider.conds)
    for sentence in (*film.forecast(), *forecast_prompts(texts.firsts, film.schedule)):
        logging.info(f"FlowCache: {KV_NODE}: {sentence}")
    run, options = NativeRun(film, dtype_of(guider.model_patcher), texts), guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    for kind, wrapper in ((KINDS.PREPARE_SAMPLING, run.prepare), (KINDS.SAMPLER_SAMPLE, run.sample), (KINDS.CALC_COND_BATCH, run.conds),
                          (KINDS.APPLY_MODEL, run.evaluate)):  # fmt: skip
        comfy.patcher_extension.add_wrapper_with_key(kind, KEY, wrapper, guider.model_options, is_model_options=True)
    try:
        return run.finished(executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs))
    finally:
        guider.model_options = options
        run.free()
        for sentence in run.findings():
            logging.info(f"FlowCache: {KV_NODE}: {sentence}")


def settled(guider: Any, noise: torch.Tensor, sampler: Any, sigmas: torch.Tensor, denoise_mask: Any) -> SequentialFilm:
    """Raises ValueError, with the way out, for a run that cannot be made."""
    model, options = guider.model_patcher, guider.model_options
    require_native(model)
    require_one_model(guider, KV_NODE)
    require_plain_texts(guider, KV_NODE, noise.shape[2])
    chunk_frames = _chunk_frames(sampler)
    _require(noise, sigmas, denoise_mask)
    initial = options.get("transformer_options", {}).get("ar_config", {}).get("initial_latent")
    if initial is not None:
        _require_start(initial, noise)
    texts = [tokens for some in by_branch(conds_of(guider)) if (tokens := tokens_of(some))]
    compressor = compressor_of(options)
    assert compressor is not None  # the wrapper came with it
    film = SequentialFilm.settled(
        network_of(model), compressor, noise.shape[2], chunk_frames, len(sigmas) - 1, tuple(noise.shape[3:]), noise.shape[0], max(len(texts), 1),
        dtype_of(model).itemsize, 0 if initial is None else initial.shape[2], noise.shape[0] * sum(texts), model.load_device, clean_pass_of(options),
        **trained_of(model),
    )  # fmt: skip
    require_chunks(ChunkConds(guider.conds).firsts, film.schedule)
    return film


def dtype_of(model: Any) -> torch.dtype:
    """In what a MODEL will be computed: the host's one may still be as another clone of it wanted."""
    dtype: torch.dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
    return dtype


def require_native(model: Any) -> None:
    """Raises ValueError for the first thing on a MODEL that cannot work with this node, and says from where it comes."""
    if why := next(_unserved(model), None):
        raise ValueError(f"{KV_NODE}: {why}; bypass that node")


def _unserved(model: Any) -> Iterator[str]:
    keys = [key for kind in model.wrappers.values() for key, some in kind.items() if some]
    yield from (f"{key} skips steps without knowing of chunks, so they cannot work together" for key in CACHES if key in keys)
    if COMPILE in keys or any(map(is_compiled, (model.model.diffusion_model, *model.object_patches.values()))):
        yield "the model goes through torch.compile (TorchCompileModel and its like), which would not see the KV cache of a run"
    places = [CACHES_MADE, *map(attention_of, range(len(model.model.diffusion_model.blocks)))]
    for name, patch in model.object_patches.items():
        if not _ours(patch) and any(f"{place}.".startswith(f"{name}.") for place in places):
            yield f"{name} of the network was replaced by {made_by(patch)}"
    options = model.model_options
    if skips := [made_by(one) for one in on_guidance(options) if made_by(one).startswith(SKIPPED)]:
        yield f"{skips[0]} would change nothing: under {SAMPLER} no block of a network is skipped (under AR Chunk Sampler it is)"
    for one in options.get("transformer_options", {}).get("patches_replace", {}).get("dit", {}).values():
        yield f"{made_by(one)} would change nothing: under {SAMPLER} no block of a network is replaced (under AR Chunk Sampler it is)"
    if options.get("context_handler") is not None:
        yield MODEL["context_handler"].split(":")[0]
    if model.additional_models.get("multigpu"):
        yield "texts would be evaluated by copies of the model on other devices, and the KV cache of a run is on one"


def _ours(thing: Any) -> bool:
    return getattr(thing, "func", None) in (init_kv_caches, attend_by_cache)


def _chunk_frames(sampler: Any) -> int:
    frames = frames_per_block(sampler)
    if frames is None:
        raise ValueError(f"{KV_NODE} works with {SAMPLER} on this model: connect that node to the sampler input, or bypass {KV_NODE}")
    return frames


def _require(noise: torch.Tensor, sigmas: torch.Tensor, denoise_mask: Any) -> None:
    if noise.ndim != 5:
        raise ValueError(f"{KV_NODE} needs a video latent [batch, channels, frames, height, width], got {tuple(noise.shape)}")
    if denoise_mask is not None:
        raise ValueError(f"{KV_NODE}: {SAMPLER} cannot keep a part of the latent: take the noise mask off it, or use ARVideoI2V for a start image")
    if len(sigmas) < 2 or float(sigmas[-1]) != 0:
        last = f"these end in {float(sigmas[-1]):.4f}" if len(sigmas) > 1 else "there is none"
        raise ValueError(f"{KV_NODE}: {SAMPLER} needs noise levels that end in 0, {last}: do not split the sigmas, and set at least one step")


def _require_start(initial: torch.Tensor, noise: torch.Tensor) -> None:
    if initial.shape[0] != noise.shape[0]:
        raise ValueError(f"{KV_NODE}: {SAMPLER} makes one film at a time from a start image, not {noise.shape[0]}: set batch_size to 1")
