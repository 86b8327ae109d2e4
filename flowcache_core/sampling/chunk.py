"""The unit of everything: latent frames that are denoised together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk at one step. `start` and `frames` count latent frames; `step` runs from 0; the commit pass has `step` == `steps`.

    `held`: how many of its last frames are given (the end of the film): the network sees them clean, and they do not move.
    `led`: how many of its first frames are given: they do not move either, but the network takes them to be at the chunk's noise level.
    """

    index: int
    start: int
    frames: int
    step: int
    steps: int
    held: int = 0
    led: int = 0

    @property
    def moving(self) -> slice:
        """Its frames that are not given."""
        return slice(self.led, self.frames - self.held)

    @property
    def committing(self) -> bool:
        """True in the extra pass that rewrites a finished chunk's keys and values from its clean latent."""
        return self.step == self.steps
