"""KV Compressor on causal models that are ComfyUI's own, under its own sampler: the hooks. What they decide, `run/sequential.py` knows.

On the MODEL lie settings, and functions without a state: keys and values of the whole film are not allocated, and self-attention asks
the KV cache dict of its layer for what attends. The rest is made around every run, and gone behind it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_patcher
import comfy.patcher_extension
import torch

from ..flowcache_core.kv.cache import Branches, CachedAttention
from ..flowcache_core.kv.compressor import Compressor
from ..flowcache_core.models.causal_wan import CausalWan
from ..flowcache_core.run.footprint import readable
from ..flowcache_core.run.sequential import SequentialCache, SequentialFilm
from .guidance import conds_of
from .other_nodes import CACHES, COMPILE, MODEL, is_compiled, made_by, require_one_model, require_plain_texts
from .settings_on_model import KV_NODE, compressor_of, with_compressor

SAMPLER, FUNCTION = "Sampler AR Video", "sample_ar_video"
"""The host's node, and the function of the sampler that it makes."""
KINDS = comfy.patcher_extension.WrappersMP
KEY = "flowcache_kv"
ATTEND = "flowcache_attend"
"""Key in the KV cache dict of a layer, during an evaluation: what gives self-attention its attention function."""
OVERRIDE = "optimized_attention_override"
CACHES_MADE = "diffusion_model.init_kv_caches"
NATIVE = ", or connect a causal model of ComfyUI's own, whose file says causal_ar in its metadata"
EXAMPLE = (60, 104)
"""Height and width of a latent frame of 832 x 480 pixels."""
SHORT, LONG = 21, 241
"""Latent frames of 81 frames, and of a minute at 16 a second."""
Options = dict[str, Any]


def is_native(model: Any) -> bool:
    """Whether a MODEL is a causal one of the host's own: its network keeps keys and values for the host's sampler."""
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    return all(hasattr(network, name) for name in ("init_kv_caches", "init_crossattn_caches", "blocks", "dim", "num_heads"))


def network_of(model: Any) -> CausalWan:
    """Raises ValueError for heads of another size than Wan's."""
    network = model.model.diffusion_model
    return CausalWan(len(network.blocks), network.dim, network.num_heads)


def with_native(model: Any, compressor: Compressor) -> Any:
    """A clone of a MODEL that keeps history within the budget. Raises ValueError for what it cannot work with."""
    require_native(model)
    patched = with_compressor(model, compressor)
    layers = network_of(model).layers
    patched.add_object_patch(CACHES_MADE, partial(no_caches, layers))
    for layer in range(layers):
        place = attention_of(layer)
        before = model.get_model_object(place)
        patched.add_object_patch(place, before if _ours(before) else partial(attend_by_cache, before))
    patched.remove_wrappers_with_key(KINDS.OUTER_SAMPLE, KEY)
    patched.add_wrapper_with_key(KINDS.OUTER_SAMPLE, KEY, outer_sample)
    return patched


def planned(network: CausalWan, compressor: Compressor) -> list[str]:
    """What the KV cache would take with the budget and without it, where blocks are as long as in training and the budget is enough for them."""
    lines = []
    for frames in (3, 1):
        with suppress(ValueError):
            short, long = (SequentialFilm.settled(network, compressor, length, frames, 4, EXAMPLE) for length in (SHORT, LONG))
            lines.append(
                f"under {SAMPLER} with {frames} frame{'s' * (frames > 1)} per block, at 832 x 480 in 16 bits: a KV cache of at most "
                f"{readable(long.kv)}; without this node {readable(short.kv_unbounded)} for 81 frames, {readable(long.kv_unbounded)} for a minute"
            )
    return lines


def attention_of(layer: int) -> str:
    return f"diffusion_model.blocks.{layer}.self_attn.forward"


def no_caches(layers: int, batch_size: int, max_seq_len: int, device: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """In place of the host's keys and values of the whole film: only what its sampler counts by."""
    return [{"end": 0} for _ in range(layers)]


def attend_by_cache(before: Callable[..., torch.Tensor], x: torch.Tensor, freqs: torch.Tensor, kv_cache: dict[str, Any] | None = None,
                    transformer_options: Options = {}) -> torch.Tensor:  # noqa: B006 (the host's signature)  # fmt: skip
    """The host's self-attention of one layer, [B, T, C], with the attention that its KV cache dict has for it; without a dict as ever."""
    if kv_cache is None:
        return before(x, freqs, transformer_options=transformer_options)
    return before(x, freqs, transformer_options={**transformer_options, OVERRIDE: kv_cache[ATTEND](x)})


def attention_by(call: CachedAttention, layer: int, hidden: torch.Tensor) -> Callable[..., torch.Tensor]:
    """An attention function as the host's attention takes it: (function, q, k, v, heads), [B, T, heads * D] each."""

    def attend(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return call(layer, q, k, v, hidden).transpose(1, 2).flatten(2)

    return attend


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The host's attention, whichever was chosen when it was started. [B, heads, T or L, D]."""
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, heads=q.shape[1], skip_reshape=True, skip_output_reshape=True)


def outer_sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):  # type: ignore[no-untyped-def]
    """Around every run of the MODEL: settles it before weights are moved, and gives it a KV cache until it ends, however it ends. A sampler of
    this pack has one of its own."""
    if hasattr(sampler, "around"):
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    guider = executor.class_obj
    film = settled(guider, noise, sampler, sigmas, denoise_mask)
    for sentence in film.forecast():
        logging.info(f"FlowCache: {KV_NODE}: {sentence}")
    run, options = NativeRun(film, dtype_of(guider.model_patcher)), guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    for kind, wrapper in ((KINDS.PREPARE_SAMPLING, run.prepare), (KINDS.SAMPLER_SAMPLE, run.sample), (KINDS.APPLY_MODEL, run.evaluate)):
        comfy.patcher_extension.add_wrapper_with_key(kind, KEY, wrapper, guider.model_options, is_model_options=True)
    try:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    finally:
        guider.model_options = options
        run.free()
        logging.info(f"FlowCache: {KV_NODE}: the KV cache took {readable(run.cache.peak)} at its peak")


def settled(guider: Any, noise: torch.Tensor, sampler: Any, sigmas: torch.Tensor, denoise_mask: Any) -> SequentialFilm:
    """Raises ValueError, with the way out, for a run that cannot be made."""
    model, options = guider.model_patcher, guider.model_options
    require_native(model)
    require_one_model(guider, KV_NODE)
    require_plain_texts(guider, KV_NODE)
    chunk_frames = _chunk_frames(sampler)
    _require(noise, sigmas, denoise_mask)
    initial = options.get("transformer_options", {}).get("ar_config", {}).get("initial_latent")
    if initial is not None:
        _require_start(initial, noise)
    texts = [one["cross_attn"] for one in conds_of(guider) if one.get("cross_attn") is not None]
    compressor = compressor_of(options)
    assert compressor is not None  # the wrapper came with it
    return SequentialFilm.settled(
        network_of(model), compressor, noise.shape[2], chunk_frames, len(sigmas) - 1, tuple(noise.shape[3:]), noise.shape[0], max(len(texts), 1),
        dtype_of(model).itemsize, 0 if initial is None else initial.shape[2], noise.shape[0] * sum(one.shape[1] for one in texts), model.load_device,
    )  # fmt: skip


def dtype_of(model: Any) -> torch.dtype:
    """In what a MODEL will be computed: the host's one may still be as another clone of it wanted."""
    dtype: torch.dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
    return dtype


class NativeRun:
    """One run, computed in `dtype`: its KV cache, and the keys and values of its texts."""

    def __init__(self, film: SequentialFilm, dtype: torch.dtype) -> None:
        self.film, self.dtype, self.cache = film, dtype, SequentialCache(film, plain)
        self._texts: dict[Branches, list[dict[str, Any]]] = {}

    def prepare(self, executor, model, *args, **kwargs):  # type: ignore[no-untyped-def]
        """The host's PREPARE_SAMPLING: what the run will hold is part of its estimate, of one chunk at a time."""
        estimate = model.model.memory_required

        def memory_required(input_shape: Any, cond_shapes: Any = {}) -> Any:  # noqa: B006 (the host's signature)
            batch, channels, frames, *rest = input_shape
            return estimate([batch, channels, min(frames, self.film.longest), *rest], cond_shapes=cond_shapes) + self.film.held

        with _meanwhile(model.model, "memory_required", memory_required):
            return executor(model, *args, **kwargs)

    def sample(self, executor, guider, *args, **kwargs):  # type: ignore[no-untyped-def]
        """The host's SAMPLER_SAMPLE: its sampler brings a start image into the dtype of the weights, which may be one that nobody computes in."""
        with _meanwhile(guider.inner_model, "get_dtype", lambda: self.dtype):
            return executor(guider, *args, **kwargs)

    def evaluate(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **conds):  # type: ignore[no-untyped-def]  # noqa: B006
        """The host's APPLY_MODEL, for some branches side by side: x [branches * films, C, F, h, w] at the noise level t of all of them."""
        state = transformer_options.get("ar_state")
        if state is None:
            raise ValueError(f"{KV_NODE}: the network was evaluated outside of {SAMPLER}: bypass the nodes that call it by themselves")
        self._begin(state, x, t)
        branches = tuple(transformer_options["uuids"])
        call, caches = self.cache.attention(branches), state["kv_caches"]
        for layer, cache in enumerate(caches):
            cache[ATTEND] = partial(attention_by, call, layer)
        texts = self._texts.setdefault(branches, [{"is_init": False} for _ in caches])
        options = {**transformer_options, "ar_state": {**state, "crossattn_caches": texts}}
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **conds)
        finally:
            for cache in caches:
                del cache[ATTEND]

    def _begin(self, state: dict[str, Any], x: torch.Tensor, t: torch.Tensor) -> None:
        """The sampler takes back what an evaluation has counted before it asks for the next: by that one tells these from two branches of one."""
        start, count = (frames * self.film.frame_tokens for frames in (state["start_frame"], x.shape[2]))
        counted = state["kv_caches"][0]["end"]
        if counted == start + count:
            return
        if counted != start:
            raise ValueError(f"{KV_NODE}: an evaluation was left out by a node that skips steps without knowing of chunks; bypass that node")
        self.cache.begin(state["start_frame"], x.shape[2], not bool(t.any()))
        for cache in state["kv_caches"]:
            cache["end"] = start + count

    def free(self) -> None:
        self.cache.free()
        self._texts.clear()


@contextmanager
def _meanwhile(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object, for a while."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        if own is not None:
            setattr(owner, name, own)


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
    if model.model_options.get("context_handler") is not None:
        yield MODEL["context_handler"].split(":")[0]
    if model.additional_models.get("multigpu"):
        yield "texts would be evaluated by copies of the model on other devices, and the KV cache of a run is on one"


def _ours(thing: Any) -> bool:
    return getattr(thing, "func", None) in (no_caches, attend_by_cache)


def _chunk_frames(sampler: Any) -> int:
    if getattr(getattr(sampler, "sampler_function", None), "__name__", "") != FUNCTION:
        raise ValueError(f"{KV_NODE} works with {SAMPLER} on this model: connect that node to the sampler input, or bypass {KV_NODE}")
    frames: int = sampler.extra_options.get("num_frame_per_block", 1)
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
