"""Networks of released sizes with random weights, and the films that they are measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.bundle import Bundle
from ..models.causal_wan_checkpoint import KREA, SMALL
from ..models.causal_wan_family import KREA_REALTIME, SELF_FORCING
from ..models.family import ChunkLayout, Family
from ..models.layers import OnePlusNorm
from ..models.magi import MagiConfig
from ..models.magi_family import MAGI_DISTILLED
from ..models.skyreels import SkyReelsConfig
from ..models.skyreels_family import SKYREELS
from ..run.generate import Job


@dataclass(frozen=True)
class Geometry:
    """A released model, and the film that it is measured on. `words`: text tokens of a branch, as a released model pads them."""

    family: Family
    config: Any
    job: Job
    words: int = 512
    every: int = 1
    """How many rows apart `bench model` runs, so that all arms, or those that docs/gpu.md names, take some minutes on a large card."""
    smoke: bool = False
    """Whether it is of no released size, and only shows that a bench works."""

    @property
    def layout(self) -> ChunkLayout:
        return self.family.layout

    def frames_of(self, seconds: float) -> int:
        """Pixel frames of a film of at least so many seconds in whole chunks."""
        return self.family.frames.nearest(math.ceil(seconds * self.layout.fps), self.layout.chunk_frames)[1]

    def shortened(self, layers: int) -> Geometry:
        """The same with fewer layers."""
        return replace(self, config=replace(self.config, layers=layers))


def _job(family: Family, frames: int, steps: int, size: int, width: int = 0, **changes: Any) -> Job:
    return Job.usual(family, "", frames=frames, steps=steps, size=size, width=width, **changes)


GEOMETRIES = {
    "skyreels-1.3b": Geometry(SKYREELS, SkyReelsConfig(1536, 8960, 30, fps=True), _job(SKYREELS, 97, 50, 544, 960), every=4),
    "skyreels-14b": Geometry(SKYREELS, SkyReelsConfig(5120, 13824, 40), _job(SKYREELS, 97, 50, 544, 960), every=20),
    "magi-4.5b": Geometry(MAGI_DISTILLED, MagiConfig(3072, 12288, 34, 8), _job(MAGI_DISTILLED, 168, 64, 544, 960), 800, every=12),
    "magi-24b": Geometry(
        MAGI_DISTILLED, MagiConfig(6144, 16384, 48, 8, channels=32, gated=True), _job(MAGI_DISTILLED, 168, 16, 544, 960), 800, every=8
    ),
    "self-forcing": Geometry(SELF_FORCING, SkyReelsConfig(*SMALL), _job(SELF_FORCING, 177, 4, 480, 832)),
    "krea-14b": Geometry(KREA_REALTIME, SkyReelsConfig(*KREA), _job(KREA_REALTIME, 177, 4, 480, 832)),
    "smoke": Geometry(SKYREELS, SkyReelsConfig(128, 256, 3, text_dim=64, fps=True), _job(SKYREELS, 37, 6, 32, ar_step=1), 16, smoke=True),
    "smoke-magi": Geometry(
        MAGI_DISTILLED, MagiConfig(128, 256, 3, 2, 16, text_dim=64, caption=64), _job(MAGI_DISTILLED, 48, 8, 32), 16, 2, smoke=True
    ),
    "smoke-causal": Geometry(SELF_FORCING, SkyReelsConfig(128, 256, 3, text_dim=64), _job(SELF_FORCING, 33, 4, 32), 16, smoke=True),
}  # fmt: skip
"""Those whose name begins with `smoke` only show that a bench works, on any machine."""


@dataclass(frozen=True)
class Sized(Bundle):
    """A network of random weights; every text is as long as a released model pads it."""

    words: int = 512

    def text(self, prompt: str) -> Tensor:
        """-> random [1, words, text_dim] in the network's dtype and place."""
        drawn = torch.randn(1, self.words, self.network.config.text_dim, generator=torch.Generator().manual_seed(len(prompt)))
        return drawn.to(self.like)

    @classmethod
    def of(cls, geometry: Geometry, network: Any = None) -> Sized:
        """Without a VAE."""
        return cls(geometry.family, network, None, geometry.layout, geometry.words)


def sized(geometry: Geometry, layers: int, dtype: torch.dtype, device: torch.device | str) -> Sized:
    """With so many layers, in memory."""
    network = geometry.family.network(geometry.shortened(layers).config, device="meta", dtype=dtype).to_empty(device=device)
    randomise(network)
    return Sized.of(geometry, network.requires_grad_(False))


def randomise(network: nn.Module) -> None:
    """Weights that keep the size of what passes: normal by fan-in, and one for the scales of norms, however they are stored."""
    like = next(network.parameters())
    rng = torch.Generator(like.device).manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.ndim == 1 and name.endswith("weight"):
            nn.init.ones_(weight)
        else:
            nn.init.normal_(weight, std=0.02 if weight.ndim == 1 else weight[0].numel() ** -0.5, generator=rng)
    for module in network.modules():
        if isinstance(module, OnePlusNorm):
            nn.init.zeros_(module.weight)
