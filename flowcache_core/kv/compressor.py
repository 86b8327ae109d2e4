"""Settings of a bounded history: how much is kept, what is never given up, by which score, and in how many bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..network import NetworkSizes
from ..sampling.schedule import ChunkSchedule
from ..settings import check, setting
from .cache import Branches, KVCache, KVSizes
from .codec import codec_of
from .layout import Layout
from .packed import PackedCache
from .policy import STORED, Granularity, KVPolicy, Positions, RememberingKVPolicy, Stored, Unit, fitted

BOOKKEEPING = 12
"""Bytes by which the keeper knows a slot: the number of its token, and its last score."""


@dataclass(frozen=True, slots=True)
class Compressor:
    """What KV Compressor puts on a model.

    The budget is for history alone: `sink` + middle + `recent`. The chunks that are being denoised lie beside it.
    """

    policy: KVPolicy
    budget: float = setting(3.0, "How much history is kept, in the unit beside it. Chunks that are being denoised come on top.",
                            low=0.000001, high=100000.0, step=0.5)  # fmt: skip
    unit: Unit = setting("chunks", "What the budget is counted in. GiB: of the keys and values of history, all layers and branches.",
                         options=("chunks", "seconds", "GiB"))  # fmt: skip
    sink: int = setting(1, "Latent frames at the start of the film that are never given up.", low=0, high=1000, advanced=True)
    recent: int = setting(0, "Latest latent frames of history that are never given up. 0: one chunk.", low=0, high=1000, advanced=True)
    granularity: Granularity = setting("token", "What is kept or given up as a whole.", options=("token", "frame", "chunk"), advanced=True)
    dtype: Stored = setting("as computed", "In how many bits history is stored: 16 as computed, 8, or 4.", options=STORED)
    offload: bool = setting(False, "Keep history in the computer's memory and bring it to the GPU a layer at a time.", advanced=True)
    soft: float = setting(0.0, "Share of the budget for what is given up: each of these slots holds the mean of a group of neighbours that go. 0: "
                          "they leave nothing behind.", low=0.0, high=0.5, step=0.01, advanced=True)  # fmt: skip
    positions: Positions = setting("within the window", "How far back history counts as lying that is older than the trained window. within the "
                                   "window: just within it, no farther than the model has learnt. as they are: as far as it is. The help page has "
                                   "what either did to films of a minute.",
                                   options=("within the window", "as they are"), advanced=True)  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        if self.soft and (self.dtype != "as computed" or self.offload):
            raise ValueError(
                f"soft {self.soft:g} puts means into slots of history, which needs it as computed and on the device: "
                "set soft to 0, or dtype to as computed and offload off"
            )

    def budget_for(self, network: NetworkSizes, schedule: ChunkSchedule, grid: tuple[int, int], fps: int, batch: int, itemsize: int,
                   device: torch.device | str = "cpu", temporal: int = 4) -> Budget:  # fmt: skip
        """The budget in slots of the cache. Raises ValueError, with the smallest one that works, for weights of another model, and
        for a dtype that the device cannot hold.

        `grid`: height and width of a latent frame; `batch`: films x branches; `itemsize`: bytes of a number as computed;
        `temporal`: pixel frames per latent frame.
        """
        codec_of(self.dtype).require(device)
        policy = fitted(self.policy, network)
        chunk_frames, frame_tokens = schedule.chunk_frames, network.tokens_per_frame(*grid)
        token_bytes = 2 * network.layers * network.heads * network.head_dim * itemsize * batch
        frame = {"chunks": 1 / chunk_frames, "seconds": temporal / fps, "GiB": frame_tokens * token_bytes / 2**30}[self.unit]
        recent = self.recent or chunk_frames
        least = self.sink + max(recent, chunk_frames)
        frames = self.budget / frame
        if frames < least * (1 - 1e-9):
            raise ValueError(
                f"a budget of {self.budget:g} {self.unit} is {frames:.1f} latent frames, but history needs {least}: "
                f"{self.sink} of the sink and {least - self.sink} of the latest chunk; use {_up(least * frame)} {self.unit} or more"
            )
        whole = {"token": 1, "frame": frame_tokens, "chunk": frame_tokens * chunk_frames}[self.granularity]
        slots = int(frames * frame_tokens + 1e-6)
        slots = max(slots // whole * whole, least * frame_tokens)
        return Budget(slots, self.sink * frame_tokens, recent * frame_tokens, self.granularity, policy, self.dtype, self.offload, self.soft,
                      self.positions)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Budget:
    """`slots` of history per layer; the film's first `sink` tokens and the latest `recent` slots stay."""

    slots: int
    sink: int
    recent: int
    granularity: Granularity
    policy: KVPolicy
    dtype: Stored = "as computed"
    offload: bool = False
    soft: float = 0.0
    positions: Positions = "within the window"

    def cache_of(self, sizes: KVSizes, layout: Layout) -> Callable[[Branches], KVCache]:
        """How the caches of a run are made."""
        if self.dtype == "as computed" and not self.offload:
            return lambda branches: KVCache(branches, sizes)
        codec = codec_of(self.dtype)
        return lambda branches: PackedCache(branches, sizes, layout, codec, self.offload)

    def bytes(self, sizes: KVSizes, branches: int, itemsize: int) -> int:
        """What caches, keeper and policy hold on the device, known before they are made. `itemsize`: bytes of a number as computed."""
        policy = self.policy.holds(sizes, branches) if isinstance(self.policy, RememberingKVPolicy) else 0
        bookkeeping = branches * sizes.films * sizes.layers * min(self.slots, sizes.history) * BOOKKEEPING
        return policy + bookkeeping + self.cache_bytes(sizes, branches, itemsize)

    def cache_bytes(self, sizes: KVSizes, branches: int, itemsize: int) -> int:
        """Of these, what the caches hold."""
        batch, token = branches * sizes.films, 2 * sizes.heads * sizes.head_dim * itemsize
        if self.dtype == "as computed" and not self.offload:
            return batch * sizes.layers * sizes.capacity * token
        codec = codec_of(self.dtype)
        stored = sizes.history * codec.bytes_per_token(sizes.heads, sizes.head_dim, itemsize)
        each = sizes.active * token + codec.bytes_per_layer(sizes.heads, sizes.head_dim)
        return batch * (sizes.layers * each + (1 if self.offload else sizes.layers) * stored + sizes.capacity * token)


def _up(number: float) -> str:
    """Rounded up at the third digit behind the point, so that what is said works."""
    return f"{-(-number * 1000 // 1) / 1000:g}"
