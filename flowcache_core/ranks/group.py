"""One dimension of the devices that make a film: the collectives, and what they send."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class DeviceLost(RuntimeError):
    """Another device of the film has ended, or was silent for too long."""


@dataclass(slots=True)
class Traffic:
    """What one device has sent to others: bytes, collectives, and seconds of the host in them (on CUDA: of their launch alone)."""

    bytes: int = 0
    calls: int = 0
    seconds: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.calls + other.calls, self.seconds + other.seconds)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes - other.bytes, self.calls - other.calls, self.seconds - other.seconds)


@dataclass(frozen=True)
class Group:
    """Devices that share one thing, branches or heads. Without a `handle`: a device alone, which sends nothing."""

    handle: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        return 1 if self.handle is None else dist.get_world_size(self.handle)

    @property
    def rank(self) -> int:
        return 0 if self.handle is None else dist.get_rank(self.handle)

    def exchange(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """`pieces`: one for each device, of one dtype -> what each device had for this one, of these shapes. Raises DeviceLost."""
        if self.size == 1:
            return list(pieces)
        sent, received = [piece.numel() for piece in pieces], [math.prod(shape) for shape in shapes]
        joined = torch.cat([piece.reshape(-1) for piece in pieces])
        out, others = joined.new_empty(sum(received)), sum(sent) - sent[self.rank]
        self._count(others * out.element_size(), lambda: dist.all_to_all_single(out, joined, received, sent, group=self.handle))
        return [part.view(*shape) for part, shape in zip(out.split(received), shapes, strict=True)]

    def gathered(self, mine: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """The devices' parts, in their order, joined along `dim`; `sizes`: of each along it."""
        if self.size == 1:
            return mine
        before, after = mine.shape[:dim], mine.shape[dim + 1 :]
        return torch.cat(self.exchange([mine] * self.size, [(*before, size, *after) for size in sizes]), dim)

    def total(self, x: Tensor) -> Tensor:
        """The sum over the devices. A ring sends every number twice, but for one part in `size` of them."""
        if self.size == 1:
            return x
        out = x.contiguous().clone()
        self._count(ring_bytes(out.nbytes, self.size), lambda: dist.all_reduce(out, group=self.handle))
        return out

    def gather_into(self, out: Tensor, mine: Tensor) -> None:
        """The devices' parts, all of one size, one behind the other."""
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # an older PyTorch
        self._count((self.size - 1) * mine.nbytes, lambda: gather(out, mine, group=self.handle))

    def _count(self, size: int, collective: Callable[[], object]) -> None:
        began = time.perf_counter()
        try:
            collective()
        except RuntimeError as error:
            why = str(error).split(". ")[0]
            raise DeviceLost(
                f"device {dist.get_rank() + 1} of {dist.get_world_size()} stops: another device of this film has ended or is silent ({why})"
            ) from error
        self.traffic.bytes += size
        self.traffic.calls += 1
        self.traffic.seconds += time.perf_counter() - began


def ring_bytes(size: int, devices: int) -> int:
    """Sent by each of so many devices for the sum of `size` bytes."""
    return 2 * size * (devices - 1) // devices


def shares(count: int, devices: int) -> list[int]:
    """As even as whole numbers are; the first devices have one more."""
    return [count // devices + (k < count % devices) for k in range(devices)]
