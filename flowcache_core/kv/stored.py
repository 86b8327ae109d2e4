"""Where the history of a packed cache lies: on the device, or in the computer's memory, a page per layer, and one more on the device.

An evaluation goes through the layers in order. Once a layer is restored from the page on the device, the page is free, and the next
layer's is on its way while the network attends. What is stored of a slot, in all films and branches, lies in one piece, and so do
the first n slots of a page: every copy is a single one between pinned and device memory, of what is in use and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.slots import keep
from ..kernels.transfer import REACHED, Mark, side_of
from .codec import CHANNEL, Codec, State, Which
from .keeper import Choice

BOTH: tuple[Which, Which] = ("k", "v")
WORDS = (torch.int32, torch.int16)


@dataclass(frozen=True, slots=True)
class StoredSizes:
    """`batch`: films x branches; `slots`: of history at most; `dtype`: of computation."""

    layers: int
    batch: int
    heads: int
    slots: int
    head_dim: int
    dtype: torch.dtype


class Stored(Protocol):
    """The history of all layers in a codec's form."""

    @property
    def bytes(self) -> int:
        """On the device."""
        ...

    @property
    def whole(self) -> int:
        """Bytes of all slots, wherever they lie."""
        ...

    @property
    def waits(self) -> int:
        """How often the host has waited for a copy while the run went on."""
        ...

    def at_hand(self, layer: int, slots: int) -> AbstractContextManager[State]:
        """One layer on the device, of which the first `slots` slots are read within."""
        ...

    def write(self, layer: int, at: slice, fresh: tuple[Tensor, Tensor]) -> None:
        """Keys and values [B, H, n, D] become the slots `at`."""
        ...

    def keep(self, layer: int, choice: Choice, slots: int) -> None:
        """Of the first `slots` slots those of `choice` stay."""
        ...

    def states(self) -> list[State]:
        """Of every layer, for the host to read and write: it waits for all copies."""
        ...

    def free(self) -> None:
        """Nothing is on its way any more when what comes next is computed."""
        ...


class OnDevice:
    """A buffer per layer and part."""

    waits = 0

    def __init__(self, codec: Codec, sizes: StoredSizes, device: torch.device) -> None:
        shape = sizes.batch, sizes.heads, sizes.slots, sizes.head_dim
        self._codec, self._states = codec, [codec.new(*shape, device, sizes.dtype) for _ in range(sizes.layers)]

    @property
    def bytes(self) -> int:
        return self.whole

    @property
    def whole(self) -> int:
        return sum(self._codec.bytes(state) for state in self._states)

    def at_hand(self, layer: int, slots: int) -> AbstractContextManager[State]:
        return nullcontext(self._states[layer])

    def write(self, layer: int, at: slice, fresh: tuple[Tensor, Tensor]) -> None:
        for which, x in zip(BOTH, fresh, strict=True):
            self._codec.write(self._states[layer], which, at, x)

    def keep(self, layer: int, choice: Choice, slots: int) -> None:
        self._codec.keep(self._states[layer], choice.index, slots, choice.first, choice.last)

    def states(self) -> list[State]:
        return self._states

    def free(self) -> None:
        self._states = []


class Pages:
    """History in the computer's memory. A page is uint8 [slots, batch, bytes of a slot].

    Every copy waits for what the computation has done with the page on the device by then, and the computation for the last copy
    before it touches that page again. The host waits for neither.
    """

    def __init__(self, codec: Codec, sizes: StoredSizes, device: torch.device) -> None:
        self._codec, self._sizes, self._side = codec, sizes, side_of(device)
        shape = sizes.slots, sizes.batch, codec.bytes_per_token(sizes.heads, sizes.head_dim, sizes.dtype.itemsize)
        self._home = self._side.pages(sizes.layers, shape)
        self._near = torch.empty(shape, dtype=torch.uint8, device=device)
        self._holds: tuple[int, int] = 0, 0
        """Of which layer the page on the device has how many slots."""
        channel = sizes.batch, sizes.heads, 1, sizes.head_dim
        self._channels = [torch.zeros(channel, device=device) for _ in range(sizes.layers)] if codec.evens_keys else []
        self._copied: Mark = REACHED

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self._near, *self._channels))

    @property
    def whole(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._home, *self._channels))

    @property
    def waits(self) -> int:
        return self._side.waits

    @contextmanager
    def at_hand(self, layer: int, slots: int) -> Iterator[State]:
        """What it is read for is given to the device within; behind it the next layer is asked for."""
        self._fetch(layer, slots)
        self._side.wait(self._copied)
        yield self._state(self._near, layer)
        self._fetch((layer + 1) % len(self._home), slots)

    def write(self, layer: int, at: slice, fresh: tuple[Tensor, Tensor]) -> None:
        self._side.wait(self._copied)
        for which, x in zip(BOTH, fresh, strict=True):
            self._codec.write(self._state(self._near, layer), which, at, x)
        self._holds = self._holds[0], min(self._holds[1], at.start)
        self._send(layer, at)

    def keep(self, layer: int, choice: Choice, slots: int) -> None:
        """What is stored of a slot moves as one piece, whatever its parts."""
        stay = choice.index.shape[1]
        self._fetch(layer, slots)
        self._side.wait(self._copied)
        keep(_wide(self._near).transpose(0, 1).unsqueeze(1), choice.index, slots, choice.first, choice.last)
        self._holds = layer, stay
        self._send(layer, slice(choice.first, stay))
        if layer == len(self._home) - 1:
            self._fetch(0, stay)

    def states(self) -> list[State]:
        self._copied.synchronize()
        self._holds = 0, 0
        return [self._state(home, layer) for layer, home in enumerate(self._home)]

    def free(self) -> None:
        self._side.wait(self._copied)
        self._home, self._channels = [], []
        del self._near
        self._side.release()

    def _fetch(self, layer: int, slots: int) -> None:
        if self._holds[0] != layer or self._holds[1] < slots:
            self._holds = layer, slots
            self._copied = self._side.copy(self._near[:slots], self._home[layer][:slots], self._side.mark())

    def _send(self, layer: int, at: slice) -> None:
        self._copied = self._side.copy(self._home[layer][at], self._near[at], self._side.mark())

    def _state(self, data: Tensor, layer: int) -> State:
        """A page's parts, [B, H, N, ...] each; those of the widest numbers come first, so that all lie where such numbers may."""
        sizes, state, start = self._sizes, State(), 0
        parts = {f"{which}.{name}": part for which in BOTH for name, part in self._codec.parts(sizes.head_dim).items()}
        typed = {name: (width, dtype or sizes.dtype) for name, (width, dtype) in parts.items()}
        for name, (width, dtype) in sorted(typed.items(), key=lambda part: -part[1][1].itemsize):
            end = start + sizes.heads * width * dtype.itemsize
            state[name] = data[:, :, start:end].view(dtype).unflatten(2, (sizes.heads, width)).permute(1, 2, 0, 3)
            start = end
        return {**state, **({CHANNEL: self._channels[layer]} if self._channels else {})}


def _wide(data: Tensor) -> Tensor:
    """The same bytes in words as long as divide them: fewer numbers to move."""
    return next((data.view(word) for word in WORDS if data.shape[2] % word.itemsize == 0), data)
