"""Copies between the device and the computer's memory that run beside the computation, ordered by events.

On CUDA they have a stream of their own, and what the host asks for lies in pinned memory: no copy waits, and the host only where it asks.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Fetched:
    """A tensor on its way to the host."""

    host: Tensor
    mark: Mark

    def get(self) -> Tensor:
        """In the computer's memory. The host waits, for what was given to the device before the tensor was fetched and for no more."""
        self.mark.synchronize()
        return self.host


class Side:
    """Of any device but CUDA: a copy is done when it returns. `waits`: how often the host has waited for one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.waits = device, 0

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the computer that can be copied to and from without a wait."""
        return torch.empty(shape, dtype=dtype)

    def copy(self, to: Tensor, source: Tensor, after: Mark) -> Mark:
        """Each in one piece. It begins when `after` is reached and all copies before it are done -> the mark of its end."""
        self.waits += self.device.type != "cpu"
        to.copy_(source)
        return REACHED

    def mark(self) -> Mark:
        """Of what the computation has been given so far."""
        return REACHED

    def wait(self, mark: Mark) -> None:
        """What the computation is given from now on begins when the mark is reached. The host goes on."""

    def fetch(self, tensor: Tensor) -> Fetched:
        """As the computation leaves it at this place."""
        return Fetched(tensor.cpu(), REACHED)


class CudaSide(Side):
    """A stream for all copies of one owner, in both directions: one after the other, in the order in which they are asked for."""

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy(self, to: Tensor, source: Tensor, after: Mark) -> Mark:
        with torch.cuda.stream(self._stream):
            if isinstance(after, torch.cuda.Event):
                self._stream.wait_event(after)
            to.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Mark) -> None:
        if isinstance(mark, torch.cuda.Event):
            torch.cuda.current_stream(self.device).wait_event(mark)

    def fetch(self, tensor: Tensor) -> Fetched:
        host = self.host(tuple(tensor.shape), tensor.dtype)
        host.copy_(tensor, non_blocking=True)
        return Fetched(host, self.mark())


def side_of(device: torch.device) -> Side:
    return CudaSide(device) if device.type == "cuda" else Side(device)
