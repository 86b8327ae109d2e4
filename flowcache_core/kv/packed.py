"""A KV cache whose history is stored in fewer bits, or in the computer's memory: the same slots, read one layer at a time.

History lies in the codec's form, the active chunks as they are computed. To attend, one layer's history is restored into a
buffer that all layers share. A chunk is quantised once, when it joins history; slots that move keep their codes.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ..kernels.slots import move_up
from ..network import Slots
from .cache import Branches, Held, KVCache, KVSizes
from .codec import CHANNEL, Codec
from .keeper import Choice
from .layout import Layout
from .stored import BOTH, OnDevice, Pages, Stored, StoredSizes

At = TypeVar("At", slice, Tensor, slice | Tensor)


class PackedCache(KVCache):
    """`layout`: the run's book-keeping, which knows where history ends; `offload`: keep history in the computer's memory."""

    def __init__(self, branches: Branches, sizes: KVSizes, layout: Layout, codec: Codec, offload: bool) -> None:
        super().__init__(branches, sizes)
        self.layout, self.codec, self.offload = layout, codec, offload
        self._stored: Stored | None = None
        self._scratch: tuple[Tensor, Tensor] | None = None

    @property
    def bytes(self) -> int:
        shared = sum(t.nbytes for t in self._scratch or ())
        return super().bytes + shared + (self._stored.bytes if self._stored else 0)

    @property
    def waits(self) -> int:
        return self._stored.waits if self._stored else 0

    def history_bytes(self, kept: int) -> int:
        return self._stored.whole * kept // max(self.sizes.history, 1) if self._stored else 0

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the active chunks [branches x films, heads, active slots, head_dim]."""
        if not self._buffers:
            sizes, batch = self.sizes, len(self.branches) * self.sizes.films
            whole = (batch, sizes.heads, sizes.capacity, sizes.head_dim)
            active = (batch, sizes.heads, sizes.active, sizes.head_dim)
            history = StoredSizes(sizes.layers, batch, sizes.heads, sizes.history, sizes.head_dim, like.dtype)
            self._stored = (Pages if self.offload else OnDevice)(self.codec, history, like.device)
            self._scratch = like.new_empty(whole), like.new_empty(whole)
            self._buffers = [(like.new_empty(active), like.new_empty(active)) for _ in range(sizes.layers)]
        return self._buffers[index]

    def write(self, layer: int, batch: slice, at: slice | Tensor, k: Tensor, v: Tensor) -> None:
        super().write(layer, batch, self._behind_history(at), k, v)

    def slots(self, layer: int, batch: slice, at: slice | Tensor, like: Tensor) -> Slots:
        return super().slots(layer, batch, self._behind_history(at), like)

    def own(self, layer: int, batch: slice, at: slice, like: Tensor) -> tuple[Tensor, Tensor]:
        return super().own(layer, batch, self._behind_history(at), like)

    def copied(self, layer: int, batch: slice, at: slice | Tensor) -> tuple[Tensor, Tensor]:
        return super().copied(layer, batch, self._behind_history(at))

    def read(self, layer: int, batch: slice, first: int, end: int) -> tuple[Tensor, Tensor]:
        assert self._scratch is not None
        kept = self.layout.kept
        keys, values = (scratch[batch] for scratch in self._scratch)
        if kept:
            self._restore(layer, batch, keys[:, :, :kept], values[:, :, :kept])
        for out, active in zip((keys, values), self._buffers[layer], strict=True):
            out[:, :, kept:end] = active[batch, :, : end - kept]
        return keys[:, :, first:end], values[:, :, first:end]

    def _restore(self, layer: int, batch: slice, keys: Tensor, values: Tensor) -> None:
        kept = keys.shape[2]
        with self._history.at_hand(layer, kept) as state:
            mine = {name: tensor[batch] for name, tensor in state.items()}
            for which, out in zip(BOTH, (keys, values), strict=True):
                self.codec.read(mine, which, kept, out)

    def join(self, before: int, count: int, after: int) -> None:
        """The first `count` active slots become slots `before`.. of history; the `after` active slots behind them move up."""
        for layer, (keys, values) in enumerate(self._buffers):
            self._history.write(layer, slice(before, before + count), (keys[:, :, :count], values[:, :, :count]))
            for buffer in (keys, values):
                move_up(buffer, 0, count, after)

    def keep(self, layer: int, choice: Choice, before: int, after: int) -> None:
        self._history.keep(layer, choice, before)

    def adopt(self, other: KVCache) -> None:
        super().adopt(other)
        if isinstance(other, PackedCache) and other._stored:
            self.syncs += self.offload
            states, theirs = self._history.states(), other._stored.states()
            for branch in set(self.branches) & set(other.branches):
                to, source = self.batch_of((branch,)), other.batch_of((branch,))
                for state, old in zip(states, theirs, strict=True):
                    for name in state:
                        state[name][to] = old[name][source]

    def held(self, kept: int, active: int) -> Held:
        states = self._stored.states() if self._stored else []
        parts = {name: [state[name] for state in states] for name in (states[0] if states else ())}
        return {**super().held(0, active), **{name: each if name == CHANNEL else [t[:, :, :kept] for t in each] for name, each in parts.items()}}

    def hold(self, held: Held, device: torch.device) -> None:
        super().hold(held, device)
        for layer, state in enumerate(self._stored.states() if self._stored else ()):
            for name, tensor in state.items():
                slots = held[name][layer]
                tensor[:, :, : slots.shape[2]].copy_(slots)

    def free(self) -> None:
        super().free()
        if self._stored:
            self._stored.free()
        self._stored = self._scratch = None

    def _behind_history(self, at: At) -> At:
        """Slots of the cache in terms of the buffers here."""
        kept = self.layout.kept
        return slice(at.start - kept, at.stop - kept) if isinstance(at, slice) else at - kept

    @property
    def _history(self) -> Stored:
        assert self._stored is not None
        return self._stored
