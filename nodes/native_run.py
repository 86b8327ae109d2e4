"""One run of ComfyUI's own sampler on a causal model of its own, with our KV cache and texts: what its hooks are given while it goes on.

What lies on the MODEL, and which runs can be made, `native_kv.py` knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..flowcache_core.kernels.attention import Kernel, attending
from ..flowcache_core.kv.cache import CachedAttention
from ..flowcache_core.run.footprint import readable
from ..flowcache_core.run.sequential import SequentialCache, SequentialFilm
from ..flowcache_core.run.sink import beyond, returned
from ..flowcache_core.sampling.chunk import Chunk
from .host_attention import host_kernel
from .native_model import SAMPLER
from .settings_on_model import KV_NODE
from .texts import ChunkConds

ATTEND = "flowcache_attend"
"""Key in the KV cache dict of a layer, during an evaluation: what gives self-attention its attention function."""
FLOAT = 4
"""Bytes of a number of the film."""
State = dict[str, Any]
"""The host's, of a block: the latent frame with which it begins, and the caches of all layers."""


class NativeRun:
    """One run, computed in `dtype`: its KV cache, and the keys and values of its texts."""

    def __init__(self, film: SequentialFilm, dtype: torch.dtype, texts: ChunkConds) -> None:
        self.film, self.dtype, self.cache, self.texts = film, dtype, SequentialCache(film), texts
        self.kernel: Kernel | None = None
        """By which the newest evaluation attended."""
        self.recached = 0
        """Chunks that were evaluated anew because a prompt changed."""
        self._crossed: dict[tuple[Hashable, ...], list[dict[str, Any]]] = {}
        """Keys and values of texts side by side, by layer."""
        self._index = -1
        self._names = texts.at(0)
        """The present chunk, and the texts that count for it."""
        self._clean: dict[int, torch.Tensor] = {}
        """Clean latents of chunks that may have to be evaluated anew."""
        self._runs = True
        """Whether the present evaluation is needed."""
        self._returned: tuple[str, ...] = ()

    def prepare(self, executor, model, *args, **kwargs):  # type: ignore[no-untyped-def]
        """The host's PREPARE_SAMPLING: what the run will hold is part of its estimate, of one chunk at a time."""
        estimate = model.model.memory_required

        def memory_required(input_shape: Any, cond_shapes: Any = {}) -> Any:  # noqa: B006 (the host's signature)
            batch, channels, frames, *rest = input_shape
            clean = FLOAT * math.prod(input_shape) if self.texts.recached else 0
            return estimate([batch, channels, min(frames, self.film.longest), *rest], cond_shapes=cond_shapes) + self.film.held + clean

        with _meanwhile(model.model, "memory_required", memory_required):
            return executor(model, *args, **kwargs)

    def sample(self, executor, guider, *args, **kwargs):  # type: ignore[no-untyped-def]
        """The host's SAMPLER_SAMPLE: its sampler brings a start image into the dtype of the weights, which may be one that nobody computes in."""
        with _meanwhile(guider.inner_model, "get_dtype", lambda: self.dtype):
            return executor(guider, *args, **kwargs)

    def conds(self, executor, network, conds, x, t, model_options):  # type: ignore[no-untyped-def]
        """The host's CALC_COND_BATCH, for the texts of all branches [each a list]: those that count for the chunk. x [films, C, F, h, w] at t."""
        options = model_options["transformer_options"]
        start, frames = _state(options)["start_frame"], x.shape[2]
        index = self.cache.index(start, frames)
        if index != self._index:
            anew = self._turn_to(index)
            for chunk in anew:
                given = {**model_options, "transformer_options": {**options, "ar_state": self._at(chunk)}}
                clean = self._clean[chunk.index]
                executor(network, self.texts.only(self._names, conds, chunk.start, clean.shape[2]), clean, torch.zeros_like(t), given)
            self.recached += len(anew)
        if any(first > index for first in self.texts.recached) and not bool(t.any()):
            self._clean[index] = x
        return executor(network, self.texts.only(self._names, conds, start, frames), x, t, model_options)

    def _turn_to(self, index: int) -> tuple[Chunk, ...]:
        """The next chunk begins -> chunks that are evaluated anew before it, clean."""
        self._index, self._names = index, self.texts.at(index)
        self._crossed = {texts: caches for texts, caches in self._crossed.items() if self._names.keys() >= set(texts)}
        anew = self.cache.restart() if index in self.texts.recached else ()
        kept = {index - 1, *self.cache.kept, *(chunk.index for chunk in anew)}
        self._clean = {k: x for k, x in self._clean.items() if k in kept}
        return anew

    def _at(self, chunk: Chunk) -> State:
        """As the host's sampler has it when it begins an evaluation of a chunk."""
        return {"start_frame": chunk.start, "kv_caches": no_caches(self.film.network.layers, chunk.start * self.film.frame_tokens)}

    def evaluate(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **conds):  # type: ignore[no-untyped-def]  # noqa: B006
        """The host's APPLY_MODEL, for some branches side by side: x [branches * films, C, F, h, w] at the noise level t of all of them."""
        state = _state(transformer_options)
        if not self._needed(state, x, t):
            return x
        texts = tuple(transformer_options["uuids"])
        call, caches = self.cache.attention(tuple(self._names.get(text, text) for text in texts)), state["kv_caches"]
        for layer, cache in enumerate(caches):
            cache[ATTEND] = partial(attention_by, call, layer)
        crossed = self._crossed.setdefault(texts, [{"is_init": False} for _ in caches])
        options = {**transformer_options, "ar_state": {**state, "crossattn_caches": crossed}}
        self.kernel = host_kernel(transformer_options)
        try:
            with attending(self.kernel):
                return executor(x, t, c_concat, c_crossattn, control, options, **conds)
        finally:
            for cache in caches:
                del cache[ATTEND]

    def _needed(self, state: State, x: torch.Tensor, t: torch.Tensor) -> bool:
        """The sampler takes back what an evaluation has counted before it asks for the next: by that one tells these from two branches of one."""
        start, count = (frames * self.film.frame_tokens for frames in (state["start_frame"], x.shape[2]))
        counted = state["kv_caches"][0]["end"]
        if counted == start:
            self._runs = self.cache.begin(state["start_frame"], x.shape[2], not bool(t.any()))
            for cache in state["kv_caches"]:
                cache["end"] = start + count
        elif counted != start + count:
            raise ValueError(f"{KV_NODE}: an evaluation was left out by a node that skips steps without knowing of chunks; bypass that node")
        return self._runs

    def finished(self, samples: torch.Tensor) -> torch.Tensor:
        """The film as it is handed on: whether it returns to its sink is found here."""
        film = self.film
        if film.budget.sink and beyond(film.schedule):
            self._returned = returned(samples, film.schedule, film.budget.sink // film.frame_tokens)
        return samples

    def findings(self) -> Iterator[str]:
        """What the run has found, in sentences for the log."""
        yield f"the KV cache took {readable(self.cache.peak)} at its peak"
        if self.kernel is not None:
            yield f"attention by {self.kernel.name}"
        if self.recached:
            yield f"where the prompt changed, chunks were evaluated once more, {self.recached} in all"
        yield from self._returned

    def free(self) -> None:
        self.cache.free()
        self._crossed.clear()
        self._clean.clear()


def _state(transformer_options: dict[str, Any]) -> State:
    state: State | None = transformer_options.get("ar_state")
    if state is None:
        raise ValueError(f"{KV_NODE}: the network was evaluated outside of {SAMPLER}: bypass the nodes that call it by themselves")
    return state


def no_caches(layers: int, end: int = 0) -> list[dict[str, Any]]:
    """In place of the host's keys and values of the whole film: only what its sampler counts by."""
    return [{"end": end} for _ in range(layers)]


def attention_by(call: CachedAttention, layer: int, hidden: torch.Tensor) -> Callable[..., torch.Tensor]:
    """An attention function as the host's attention takes it: (function, q, k, v, heads), [B, T, heads * D] each."""

    def attend(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return call(layer, q, k, v, hidden).transpose(1, 2).flatten(2)

    return attend


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
