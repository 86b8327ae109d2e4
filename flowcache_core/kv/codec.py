"""How the keys and values of finished chunks are stored: as they were computed, or with fewer bits.

Slots are quantised once, when their chunk becomes history, and never again: what restores a slot lies in the slot, so slots may be
dropped and moved at any time. Reading fills a buffer that the caller owns and uses for one layer after the other; a whole cache
restored at once would save nothing.

A codec is frozen and knows tensors only. The state of one layer is a dict of tensors, [B, H, N, ...] each: B is the
batch, films x branches, H heads, N slots. The one that belongs to no slot, CHANNEL, has N = 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..kernels.slots import blocks, keep

State = dict[str, Tensor]
Which = Literal["k", "v"]
Part = tuple[int, torch.dtype | None]
"""Numbers per slot and head, and their dtype; None is the dtype of computation."""

CHANNEL = "k.channel"
"""float32 [B, H, 1, D]: what keys are divided by before they are quantised; 0 until the first keys are written."""
BLOCK = 2**24
"""Numbers that are converted at a time, so that what lies between stored and restored slots stays small."""
EVEN = 1 / 16
"""Least magnitude of a channel, in terms of the head's mean, that its scale follows: a channel that is silent in the first chunk
and speaks later must not drown the others."""
TINY = torch.finfo(torch.bfloat16).tiny


class Codec(ABC):
    """Scales are bfloat16, so no magnitude is out of their range, and codes are made against the scale as it is stored."""

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    """Whether what is read is bit for bit what was written."""
    evens_keys: ClassVar[bool] = False
    """Whether keys are divided by a scale per channel first."""

    @abstractmethod
    def parts(self, head_dim: int) -> dict[str, Part]:
        """What is stored for a slot, by name. Raises ValueError for a size of heads that does not divide."""

    @abstractmethod
    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """[B, H, n, D] -> the parts, [B, H, n, width] each."""

    @abstractmethod
    def decode(self, parts: dict[str, Tensor], out: Tensor) -> None:
        """Into out [B, H, n, D], rounded to its dtype once."""

    def new(self, batch: int, heads: int, capacity: int, head_dim: int, device: torch.device | str, like: torch.dtype) -> State:
        """Buffers for keys and values of one layer. `batch`: films x branches; `capacity`: slots of the cache; `like`: dtype of computation."""
        state = {
            f"{which}.{name}": torch.empty(batch, heads, capacity, width, dtype=dtype or like, device=device)
            for which in ("k", "v")
            for name, (width, dtype) in self.parts(head_dim).items()
        }
        if self.evens_keys:
            state[CHANNEL] = torch.zeros(batch, heads, 1, head_dim, device=device)
        return state

    def write(self, state: State, which: Which, at: slice, x: Tensor) -> None:
        """x [B, H, n, D] becomes the slots `at`. The first keys that are written fix the scale of the channels."""
        if x.shape[2] == 0:
            return
        channel = state.get(CHANNEL) if which == "k" else None
        if channel is not None:
            channel.copy_(torch.where(channel > 0, channel, channel_scales(x)))
        for start, end in blocks(x, 0, x.shape[2], BLOCK):
            part = x[:, :, start:end]
            for name, value in self.encode(part if channel is None else part / channel).items():
                state[f"{which}.{name}"][:, :, at.start + start : at.start + end] = value

    def read(self, state: State, which: Which, end: int, out: Tensor, start: int = 0) -> Tensor:
        """Slots `start`..`end` into out [B, H, end - start, D] of any floating dtype, which is returned. Nothing else of that size is allocated."""
        channel = state.get(CHANNEL) if which == "k" else None
        for first, last in blocks(out, 0, out.shape[2], BLOCK):
            part = out[:, :, first:last]
            self.decode(
                {name: state[f"{which}.{name}"][:, :, start + first : start + last] for name in self.parts(out.shape[3])},
                part,
            )
            if channel is not None:
                part.mul_(channel)
        return out

    def keep(self, state: State, index: Tensor, slots: int, first: int = 0, last: int = 0) -> None:
        """Of `slots` in use, those of index become the first, in place, as `kernels.slots.keep` has it; codes stay as they are."""
        for name, tensor in state.items():
            if name != CHANNEL:
                keep(tensor, index, slots, first, last)

    def bytes(self, state: State) -> int:
        return sum(tensor.nbytes for tensor in state.values())

    def bytes_per_token(self, heads: int, head_dim: int, itemsize: int) -> int:
        """Of the key and the value of one token in one layer; `itemsize`: bytes of one number in the dtype of computation."""
        return 2 * heads * sum(width * (dtype.itemsize if dtype else itemsize) for width, dtype in self.parts(head_dim).values())

    def bytes_per_layer(self, heads: int, head_dim: int) -> int:
        """What a layer holds for each film and branch besides its slots."""
        return heads * head_dim * torch.float32.itemsize if self.evens_keys else 0

    def require(self, device: torch.device | str) -> None:
        """Raises ValueError where the device cannot hold or convert this dtype: it is tried once on one slot."""
        x = torch.ones(1, 1, 1, 2, device=device)
        try:
            state = self.new(1, 1, 1, 2, device, torch.float32)
            self.write(state, "k", slice(0, 1), x)
            self.read(state, "k", 1, torch.empty_like(x))
        except (RuntimeError, TypeError) as error:
            other = "as computed" if self.name == "int8" else "int8 or as computed"
            why = str(error).splitlines()[0]
            raise ValueError(f"keys and values cannot be kept as {self.name} on {device} ({why}): choose {other}") from error


@dataclass(frozen=True, slots=True)
class AsComputed(Codec):
    """A plain copy in the dtype of computation, which is bfloat16 for most models."""

    name: ClassVar[str] = "as computed"
    lossless: ClassVar[bool] = True

    def parts(self, head_dim: int) -> dict[str, Part]:
        return {"plain": (head_dim, None)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {"plain": x}

    def decode(self, parts: dict[str, Tensor], out: Tensor) -> None:
        out.copy_(parts["plain"])


@dataclass(frozen=True, slots=True)
class Float8(Codec):
    """e4m3 with one scale per token and head. Floating codes follow uneven channels by themselves: a channel scale made it worse."""

    name: ClassVar[str] = "fp8"
    dtype: torch.dtype = torch.float8_e4m3fn

    def parts(self, head_dim: int) -> dict[str, Part]:
        return {"codes": (head_dim, self.dtype), "scale": (1, torch.bfloat16)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        most = torch.finfo(self.dtype).max
        scale = _largest(x, -1).div_(most).clamp_min_(TINY).bfloat16()
        return {"codes": (x / scale.float()).clamp_(-most, most).to(self.dtype), "scale": scale}

    def decode(self, parts: dict[str, Tensor], out: Tensor) -> None:
        out.copy_(parts["codes"]).mul_(parts["scale"].float())


@dataclass(frozen=True, slots=True)
class Int8(Codec):
    """One scale per token and head, 127 codes either side of 0."""

    name: ClassVar[str] = "int8"
    evens_keys: ClassVar[bool] = True

    def parts(self, head_dim: int) -> dict[str, Part]:
        return {"codes": (head_dim, torch.int8), "scale": (1, torch.bfloat16)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        scale = _largest(x, -1).div_(127).clamp_min_(TINY).bfloat16()
        return {"codes": (x / scale.float()).round_().clamp_(-127, 127).to(torch.int8), "scale": scale}

    def decode(self, parts: dict[str, Tensor], out: Tensor) -> None:
        torch.mul(parts["codes"], parts["scale"].float(), out=out)


@dataclass(frozen=True, slots=True)
class Int4(Codec):
    """Least value and step per token, head and group of channels (KIVI, section 3, has the asymmetric form); two codes to a byte.

    From groups of 128 to 64 takes 6 % more bytes, to 32 another 11 % and gains no more by it.
    Where heads do not divide into groups of `group` channels, the largest group that divides both is taken.
    """

    name: ClassVar[str] = "int4"
    evens_keys: ClassVar[bool] = True
    group: int = 64

    def parts(self, head_dim: int) -> dict[str, Part]:
        if head_dim % 2:
            raise ValueError(f"heads of {head_dim} channels cannot be stored as int4, two channels to a byte: choose int8")
        groups = head_dim // math.gcd(head_dim, self.group)
        return {"codes": (head_dim // 2, torch.uint8), "least": (groups, torch.bfloat16), "step": (groups, torch.bfloat16)}

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """The least value is rounded down, so that every value lies within the 15 steps above it."""
        x = x.float().unflatten(-1, (-1, math.gcd(x.shape[3], self.group)))
        low, high = x.aminmax(dim=-1, keepdim=True)
        least = (low - low.abs() * 2**-8).bfloat16()
        step = ((high - least.float()) / 15).clamp_min_(TINY).bfloat16()
        first, second = ((x - least.float()) / step.float()).round_().clamp_(0, 15).to(torch.uint8).chunk(2, -1)
        return {"codes": (first | second << 4).flatten(-2), "least": least.squeeze(-1), "step": step.squeeze(-1)}

    def decode(self, parts: dict[str, Tensor], out: Tensor) -> None:
        least, step = (parts[name].float().unsqueeze(-1) for name in ("least", "step"))
        codes, groups = parts["codes"].unflatten(-1, (least.shape[3], -1)), out.unflatten(-1, (least.shape[3], -1))
        for half, part in zip((codes & 15, codes >> 4), groups.chunk(2, -1), strict=True):
            torch.addcmul(least, half, step, out=part)


CODECS: tuple[Codec, ...] = (AsComputed(), Float8(), Int8(), Int4())


def codec_of(name: str) -> Codec:
    """By its name. Raises ValueError for one that does not exist."""
    for codec in CODECS:
        if codec.name == name:
            return codec
    raise ValueError(f"there is no {name!r} for keys and values: choose one of {', '.join(codec.name for codec in CODECS)}")


def channel_scales(k: Tensor) -> Tensor:
    """Keys [B, H, n, D] -> float32 [B, H, 1, D]: the square root of each channel's largest magnitude over the mean of its head.

    Keys have a few large channels, and queries are often large in the same ones: of no scale, the whole one and its root
    (SmoothQuant, section 4, with alpha 0.5), the root gave the least error of attention, in int8 and in int4.
    """
    most = _largest(k, 2)
    return (most / most.mean(-1, keepdim=True)).nan_to_num(1.0).clamp_min(EVEN).sqrt()


def _largest(x: Tensor, dim: int) -> Tensor:
    low, high = x.aminmax(dim=dim, keepdim=True)
    return torch.maximum(high, -low).float()
