"""Frames that a film is given instead of generated: which they are, and how the network is shown them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .noise import TRAIN_STEPS


@dataclass(frozen=True, slots=True)
class GivenNoise:
    """Light noise on given first frames, as the network sees them; the frames of the film stay as they are.

    SkyReels-V2 calls it addnoise_condition: timestep 20 of 1000 when a film is extended, so that small errors of the given
    frames are not copied on. `level`: timestep, 0 (clean) .. 1000; `seed` makes it repeatable.
    """

    level: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.level < TRAIN_STEPS:
            raise ValueError(f"addnoise_condition {self.level} lies outside 0..{TRAIN_STEPS - 1}: 20 is the published value, 0 leaves frames clean")

    @property
    def sigma(self) -> float:
        return self.level / TRAIN_STEPS

    def start(self) -> torch.Generator:
        """The random numbers of one run."""
        return torch.Generator().manual_seed((self.seed + 1) % 2**63)

    def rng(self, index: int) -> torch.Generator:
        """The random numbers of one chunk, for solvers that add noise: they depend on no other chunk. `index`: among those that are generated.

        The seeds are those of ComfyUI's sampler of autoregressive films: 1000 apart, and a step adds 1.
        """
        return torch.Generator().manual_seed((self.seed + 1000 * index) % 2**64)

    def show(self, given: Tensor, rng: torch.Generator) -> Tensor:
        """(1 - sigma) * given + sigma * fresh noise; latents of any shape."""
        if not self.level:
            return given
        fresh = torch.randn(given.shape, generator=rng, pin_memory=given.is_cuda).to(given, non_blocking=True)
        return (1 - self.sigma) * given + self.sigma * fresh


CLEAN = GivenNoise()


def given_frames(mask: Tensor) -> tuple[int, int]:
    """A denoise mask [B, C, F, h, w] (1 generate, 0 keep) -> latent frames given at the start and at the end.

    Raises ValueError for a mask that keeps a part of a frame, or frames in the middle: what is denoised together must carry
    one noise level.
    """
    low, high = mask.amin((0, 1, 3, 4)), mask.amax((0, 1, 3, 4))
    torn = [k for k, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)) if not (a == b and a in (0.0, 1.0))]
    if torn:
        stretched = any(a == b for k in torn for a, b in [(float(low[k]), float(high[k]))])
        why = "; a latent that was cut after frames were given to it has the old mask, stretched: put Set Latent Noise Mask behind the cut"
        raise ValueError(
            f"the noise mask keeps a part of latent frame {torn[0]}: whole frames are kept or generated; make the mask 0 or 1 all over a "
            f"frame{why if stretched else ''}"
        )
    keep = [a == 0 for a in low.tolist()]
    if all(keep):
        raise ValueError(f"the noise mask keeps all {len(keep)} latent frames: at least one must be left to generate")
    start, end = keep.index(False), keep[::-1].index(False)
    if any(keep[start : len(keep) - end]):
        middle = start + keep[start:].index(True)
        raise ValueError(f"the noise mask keeps latent frame {middle}, between frames to generate: only first and last frames of a film can be kept")
    return start, end
