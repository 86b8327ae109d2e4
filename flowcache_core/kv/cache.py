"""The KV cache: per layer one buffer for keys and one for values, allocated once, a span of rows for every chunk.

An active chunk writes its own span and attends to one contiguous range that ends with it, so no mask is needed and
nothing is copied: this equals block-causal attention over the whole window.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from ..kernels.attention import attention

Branches = tuple[Hashable, ...]


class KVCache:
    """Keys after rotation, and values, of all layers for `branches` that run side by side in one batch."""

    def __init__(self, branches: Branches, batch: int, layers: int, heads: int, head_dim: int, capacity: int) -> None:
        self.branches, self.batch = branches, batch
        self._shape = (len(branches) * batch, heads, capacity, head_dim)
        self._layers = layers
        self._buffers: list[tuple[Tensor, Tensor]] = []

    @property
    def bytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self._buffers)

    def rows(self, branches: Branches) -> slice | None:
        """Where some of the branches lie next to each other in the batch, or None."""
        for at in range(len(self.branches) - len(branches) + 1):
            if self.branches[at : at + len(branches)] == branches:
                return slice(at * self.batch, (at + len(branches)) * self.batch)
        return None

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if not self._buffers:
            self._buffers = [(like.new_empty(self._shape), like.new_empty(self._shape)) for _ in range(self._layers)]
        return self._buffers[index]

    def adopt(self, other: KVCache) -> None:
        """Copy the branches that another cache holds: the host has begun to batch them differently."""
        for branch in set(self.branches) & set(other.branches):
            mine, theirs = self.rows((branch,)), other.rows((branch,))
            for index, (k, v) in enumerate(other._buffers):
                keys, values = self.layer(index, k)
                keys[mine], values[mine] = k[theirs], v[theirs]

    def free(self) -> None:
        self._buffers.clear()


class CachedAttention:
    """Attention of one chunk: writes rows `start`..`end`, sees rows `first`..`end`. One per call of the network.

    With `tokens`, int64 [n] counted from `start`, it writes these rows only; what it sees stays the same, so the queries of
    refreshed tokens meet the fresh rows and the old ones of their own chunk.
    """

    def __init__(self, cache: KVCache, rows: slice, first: int, start: int, end: int, tokens: Tensor | None = None) -> None:
        self.cache, self.rows, self.first, self.start, self.end = cache, rows, first, start, end
        self.at = None if tokens is None else tokens + start

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        keys, values = (buffer[self.rows] for buffer in self.cache.layer(layer, k))
        if self.at is None:
            keys[:, :, self.start : self.end] = k
            values[:, :, self.start : self.end] = v
        else:
            keys.index_copy_(2, self.at, k)
            values.index_copy_(2, self.at, v)
        return attention(q, keys[:, :, self.first : self.end], values[:, :, self.first : self.end])


class KVStore:
    """The caches of a run; every branch lives in exactly one. Usually one cache; two where the host runs the branches apart."""

    def __init__(self, batch: int, layers: int, heads: int, head_dim: int, capacity: int) -> None:
        self._batch, self._sizes = batch, (layers, heads, head_dim, capacity)
        self._caches: list[KVCache] = []

    @property
    def bytes(self) -> int:
        return sum(cache.bytes for cache in self._caches)

    def of(self, branches: Branches) -> tuple[KVCache, slice]:
        """The cache that holds these branches, in this order, and their rows in it."""
        for cache in self._caches:
            if (rows := cache.rows(branches)) is not None:
                return cache, rows
        fresh = self._new(branches)
        for cache in [c for c in self._caches if set(c.branches) & set(branches)]:
            fresh.adopt(cache)
            if rest := tuple(b for b in cache.branches if b not in branches):
                apart = self._new(rest)
                apart.adopt(cache)
                self._caches.append(apart)
            cache.free()
            self._caches.remove(cache)
        self._caches.append(fresh)
        return fresh, slice(0, len(branches) * self._batch)

    def _new(self, branches: Branches) -> KVCache:
        return KVCache(branches, self._batch, *self._sizes)

    def free(self) -> None:
        for cache in self._caches:
            cache.free()
        self._caches.clear()
