"""Copies between the device and the computer's memory that run beside the computation, ordered by events.

On CUDA they have a stream of their own, and what the host asks for lies in pinned memory: no copy waits, and the host only where it asks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place in a stream: what was given to it before is done when the mark is reached."""

    def synchronize(self) -> None:
        """The host waits for it."""
        ...


class Reached:
    """A mark that has been reached."""

    def synchronize(self) -> None: ...


REACHED = Reached()


@dataclass(slots=True, eq=False)
class Fetched:
    """A tensor on its way to the host, where it is at the `mark`; of a device that copies beside no computation, a tensor of the device."""

    tensor: Tensor
    mark: Mark


class Side:
    """Of any device but CUDA: a copy is done when it returns. `waits`: how often the host has waited for one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.waits = device, 0

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the computer that can be copied to and from without a wait."""
        return torch.empty(shape, dtype=dtype)

    def pages(self, count: int, shape: tuple[int, ...]) -> list[Tensor]:
        """So many pages of it, uint8 of one shape, that last as long as each other."""
        return [self.host(shape, torch.uint8) for _ in range(count)]

    def copy(self, to: Tensor, source: Tensor, after: Mark) -> Mark:
        """Each in one piece. It begins when `after` is reached and all copies before it are done -> the mark of its end."""
        self.waits += self.device.type != "cpu"
        to.copy_(source)
        return REACHED

    def release(self) -> None:
        """Memory of the computer that nobody holds any more goes back to the system."""

    def mark(self) -> Mark:
        """Of what the computation has been given so far."""
        return REACHED

    def wait(self, mark: Mark) -> None:
        """What the computation is given from now on begins when the mark is reached. The host goes on."""

    def fetch(self, tensor: Tensor) -> Fetched:
        """As the computation leaves it at this place; nobody else writes to it."""
        return Fetched(tensor, REACHED)


class CudaSide(Side):
    """A stream for all copies of one owner, in both directions: one after the other, in the order in which they are asked for."""

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def pages(self, count: int, shape: tuple[int, ...]) -> list[Tensor]:
        return [page for some in pieces(count, math.prod(shape)) for page in self.host((some, *shape), torch.uint8)]

    def copy(self, to: Tensor, source: Tensor, after: Mark) -> Mark:
        with torch.cuda.stream(self._stream):
            if isinstance(after, torch.cuda.Event):
                self._stream.wait_event(after)
            to.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def release(self) -> None:
        """PyTorch keeps pinned memory for later, and blocks that a copy still reads: so the copies end first."""
        self._stream.synchronize()
        if hasattr(torch.accelerator, "empty_host_cache"):  # newer versions of PyTorch
            torch.accelerator.empty_host_cache()

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Mark) -> None:
        if isinstance(mark, torch.cuda.Event):
            torch.cuda.current_stream(self.device).wait_event(mark)

    def fetch(self, tensor: Tensor) -> Fetched:
        host = self.host(tuple(tensor.shape), tensor.dtype)
        host.copy_(tensor, non_blocking=True)
        return Fetched(host, self.mark())


def pieces(count: int, size: int) -> list[int]:
    """How many of so many pages of `size` bytes lie in each piece of pinned memory: PyTorch rounds a piece up to a power of two, which would take
    up to twice the memory for each page alone."""
    out: list[int] = []
    while left := count - sum(out):
        out.append(max(range(1, left + 1), key=lambda some: (some * size / power_of_two(some * size), some)))
    return out


def power_of_two(size: int) -> int:
    """The least that is no less."""
    return 1 << max(size - 1, 0).bit_length()


def side_of(device: torch.device) -> Side:
    return CudaSide(device) if device.type == "cuda" else Side(device)


class Inbox:
    """Tensors on their way from one device to the host. Who needs one waits for all that were fetched so far: together they are one wait.

    `waits`: how often the host has.
    """

    def __init__(self) -> None:
        self.waits = 0
        self._under_way: list[Fetched] = []

    def fetch(self, tensor: Tensor) -> Fetched:
        """As the computation leaves it at this place; nobody else writes to it."""
        fetched = side_of(tensor.device).fetch(tensor)
        self._under_way.append(fetched)
        return fetched

    def get(self, fetched: Fetched) -> Tensor:
        """In the computer's memory. The host waits, unless it has since, for what was given to the device before the last `fetch` and for no more."""
        if fetched in self._under_way:
            self.waits += 1
            self._under_way[-1].mark.synchronize()
            for one, arrived in zip(self._under_way, on_host([each.tensor for each in self._under_way]), strict=True):
                one.tensor = arrived
            self._under_way.clear()
        return fetched.tensor


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device in the computer's memory, by one copy."""
    if len(tensors) == 1 or tensors[0].device.type == "cpu":
        return [tensor.cpu() for tensor in tensors]
    whole = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors]).cpu()
    pieces = whole.split([tensor.nbytes for tensor in tensors])
    return [piece.clone().view(tensor.dtype).view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
