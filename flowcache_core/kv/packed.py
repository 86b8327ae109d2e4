"""A KV cache whose history is stored in fewer bits, or in the computer's memory: the same slots, read one layer at a time.

History lies in the codec's form, the active chunks as they are computed. To attend, one layer's history is restored into a
buffer that all layers share. A chunk is quantised once, when it joins history; slots that move keep their codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import Branches, Held, KVCache, KVSizes
from .codec import CHANNEL, Codec, State, Which
from .keeper import Choice
from .layout import Layout

BOTH: tuple[Which, Which] = ("k", "v")


class PackedCache(KVCache):
    """`layout`: the run's book-keeping, which knows where history ends; `offload`: keep history in pinned memory of the host."""

    def __init__(self, branches: Branches, sizes: KVSizes, layout: Layout, codec: Codec, offload: bool) -> None:
        super().__init__(branches, sizes)
        self.layout, self.codec, self.offload = layout, codec, offload
        self._states: list[State] = []
        self._scratch: tuple[Tensor, Tensor] | None = None

    @property
    def bytes(self) -> int:
        shared = sum(t.nbytes for t in self._scratch or ())
        return super().bytes + shared + (0 if self.offload else sum(self.codec.bytes(state) for state in self._states))

    def history_bytes(self, kept: int) -> int:
        return sum(self.codec.bytes(state) for state in self._states) * kept // max(self.sizes.history, 1)

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the active chunks [branches x films, heads, active slots, head_dim]."""
        if not self._buffers:
            sizes, batch = self.sizes, len(self.branches) * self.sizes.films
            whole = (batch, sizes.heads, sizes.capacity, sizes.head_dim)
            active = (batch, sizes.heads, sizes.active, sizes.head_dim)
            self._scratch = like.new_empty(whole), like.new_empty(whole)
            self._buffers = [(like.new_empty(active), like.new_empty(active)) for _ in range(sizes.layers)]
            home = torch.device("cpu") if self.offload else like.device
            self._states = [self.codec.new(batch, sizes.heads, sizes.history, sizes.head_dim, home, like.dtype) for _ in range(sizes.layers)]
            if self.offload and like.device.type == "cuda":
                self._states = [{name: t.pin_memory() for name, t in state.items()} for state in self._states]
        return self._buffers[index]

    def write(self, layer: int, batch: slice, at: slice | Tensor, k: Tensor, v: Tensor) -> None:
        kept = self.layout.kept
        super().write(layer, batch, slice(at.start - kept, at.stop - kept) if isinstance(at, slice) else at - kept, k, v)

    def own(self, layer: int, batch: slice, at: slice, like: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.layout.kept
        return super().own(layer, batch, slice(at.start - kept, at.stop - kept), like)

    def read(self, layer: int, batch: slice, first: int, end: int) -> tuple[Tensor, Tensor]:
        assert self._scratch is not None
        kept, state = self.layout.kept, self._of(layer, batch)
        whole = self._scratch[0][batch], self._scratch[1][batch]
        if self.offload:
            state = {name: t if t.shape[2] == 1 else t[:, :, :kept] for name, t in state.items()}
            state = {name: t.to(whole[0].device, non_blocking=True) for name, t in state.items()}
        for out, active, which in zip(whole, self._buffers[layer], BOTH, strict=True):
            if kept:
                self.codec.read(state, which, kept, out[:, :, :kept])
            out[:, :, kept:end] = active[batch, :, : end - kept]
        return whole[0][:, :, first:end], whole[1][:, :, first:end]

    def join(self, before: int, count: int, after: int) -> None:
        """The first `count` active slots become slots `before`.. of history; the `after` active slots behind them move up."""
        for state, pair in zip(self._states, self._buffers, strict=True):
            for which, buffer in zip(BOTH, pair, strict=True):
                fresh = buffer[:, :, :count]
                self.codec.write(state, which, slice(before, before + count), self._home(fresh))
                buffer[:, :, :after] = buffer[:, :, count : count + after].clone()

    def keep(self, layer: int, batch: slice, choice: Choice, before: int, after: int) -> None:
        self.codec.keep(self._of(layer, batch), self._home(choice.index), before)

    def adopt(self, other: KVCache) -> None:
        super().adopt(other)
        if isinstance(other, PackedCache):
            for branch in set(self.branches) & set(other.branches):
                mine, theirs = self.batch_of((branch,)), other.batch_of((branch,))
                for state, old in zip(self._states, other._states, strict=True):
                    for name in state:
                        state[name][mine] = old[name][theirs]

    def held(self, kept: int, active: int) -> Held:
        states = {name: [state[name] for state in self._states] for name in (self._states[0] if self._states else ())}
        return {**super().held(0, active), **{name: each if name == CHANNEL else [t[:, :, :kept] for t in each] for name, each in states.items()}}

    def hold(self, held: Held) -> None:
        super().hold(held)
        for layer, state in enumerate(self._states):
            for name, tensor in state.items():
                slots = held[name][layer]
                tensor[:, :, : slots.shape[2]].copy_(slots)

    def free(self) -> None:
        super().free()
        self._states.clear()
        self._scratch = None

    def _home(self, fresh: Tensor) -> Tensor:
        """History in the place where it is kept; on the way to the computer's memory the host waits."""
        self.syncs += self.offload
        return fresh.cpu() if self.offload else fresh

    def _of(self, layer: int, batch: slice) -> State:
        return {name: tensor[batch] for name, tensor in self._states[layer].items()}
