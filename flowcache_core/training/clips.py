"""Latents of procedural clips that a network is trained on, and which of their cells move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..models.wan_vae import LATENT_CHANNELS, SPATIAL
from .basis import Basis
from .scenes import Scene, render

POOL, FIRST = 4096, 256
"""Clips at the end of a training, unless it is told otherwise, and at its first step."""
MOST_BEGUN = 8 * POOL
"""Clips that end early, at the end, unless there are more whole ones: many of them are in a batch."""
MOVED = 0.05
"""The mean square change of a unit-variance latent from which a cell moves."""
STANDS_OUT = 1.5
"""The mean square distance from the median of its picture from which a cell shows a sprite."""


@dataclass(frozen=True)
class Beginning:
    """Clips that end early. `frames`: latent ones; `times`: how many of them are in a batch for each that would be whole; `share`: of the batches, at
    step 0 and at the end."""

    frames: int
    times: int
    share: tuple[float, float]


def beginning_at(kinds: Iterable[Beginning], progress: float, draw: float) -> Beginning | None:
    """Of which clips a batch is, None for whole ones. `progress`: of the training, 0 to 1; `draw`: uniform in 0 to 1."""
    for kind in kinds:
        draw -= kind.share[0] + (kind.share[1] - kind.share[0]) * progress
        if draw < 0:
            return kind
    return None


class Clips:
    """Latents of the training clips, drawn when first asked for and kept. The pool grows with the step, so a resumed run sees the same.

    They lie in one tensor: small lasting pieces between large passing ones would tear the heap apart.
    `scene`: index -> what is drawn; `latents`: frames of its latents; `every`: steps after which a pool of `POOL` clips has one more;
    `most`: clips at the end, if not so many; `device`: where they are drawn and lie.
    """

    def __init__(self, basis: Basis, scene: Callable[[int], Scene], latents: int, every: int = 1, most: int = POOL,
                 device: torch.device | None = None) -> None:  # fmt: skip
        self.device = device or torch.device("cpu")
        self.basis, self.scene, self.every, self.most = basis.at(self.device), scene, every, most
        side = scene(0).size // SPATIAL
        self.latents = torch.empty(most, LATENT_CHANNELS, latents, side, side, dtype=torch.float16, device=self.device)
        self.captions: dict[int, str] = {}

    def pool(self, step: int) -> int:
        """How many clips may be picked at `step`."""
        return min(FIRST + step * self.most // (POOL * self.every), self.most)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """-> latents [16, frames, h, w] in half precision, caption."""
        if index not in self.captions:
            scene = self.scene(index)
            self.latents[index] = self._encoded(scene)
            self.captions[index] = scene.caption
        return self.latents[index], self.captions[index]

    def still(self, index: int) -> Tensor:
        """The first picture of a clip as a film that stands still: [16, 1, h, w]."""
        return self._encoded(self.scene(index), frames=1)

    def _encoded(self, scene: Scene, frames: int | None = None) -> Tensor:
        with self.device:
            return self.basis.encode(render(scene, frames=frames).transpose(0, 1) * 2 - 1)


def moving(clean: Tensor) -> Tensor:
    """Latents [B, C, F, h, w] -> [B, 1, F, h, w], 1 where a cell changed since the latent frame before (the first two like the third)."""
    change = clean.diff(dim=2).square().mean(1, keepdim=True)[:, :, 1:]
    return (torch.cat([change[:, :, :1].expand(-1, -1, 2, -1, -1), change], 2) > MOVED).float()


def standing_out(clean: Tensor) -> Tensor:
    """Latents [B, C, F, h, w] -> [B, 1, F, h, w], 1 where a cell is unlike most of its picture, as sprites are, and next to such cells."""
    usual = clean.flatten(3).median(3).values[..., None, None]
    unlike = ((clean - usual).square().mean(1) > STANDS_OUT).float()
    return functional.max_pool2d(unlike, 3, stride=1, padding=1)[:, None]


def velocity_loss(velocity: Tensor, noise: Tensor, clean: Tensor, counts: Tensor, moves: Tensor, emphasis: float) -> Tensor:
    """Mean square error of velocities [B, C, F, h, w] against noise - clean.

    Frames count where `counts` [B, 1, F, 1, 1] is 1, and their cells that move, as `moves` [B, 1, F, h, w] has it, 1 + `emphasis`.
    """
    weight = counts * (1 + emphasis * moves)
    return ((velocity.float() - (noise - clean)).square() * weight).sum() / (weight.sum() * clean.shape[1])
