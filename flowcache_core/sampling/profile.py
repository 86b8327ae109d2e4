"""What a model's steps are worth, by which plans are made (`planner.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from .path import CLOCK


@dataclass(frozen=True)
class Profile:
    """What a model's steps cost. Times are on the clock of `path.py`, 0..50."""

    knots: tuple[tuple[float, float], ...] = ((0.0, 1.0), (38.0, 1.0), (49.0, 0.5))
    """(time, H): the length of a step of unit cost, on a broken line."""
    knots_together: tuple[tuple[float, float], ...] = ((0.0, 0.7), (20.0, 1.0), (38.0, 1.0), (49.0, 0.7))
    """The same where whole rows are computed or skipped, which serve chunks at different times: denser at the beginning too, milder at the end."""
    exponent: float = 4.0
    late_start: float = 0.5
    """Weight of the cost (2 t)^exponent of a first evaluation at t instead of 0."""
    ending: float = 0.0
    """Weight of the cost (50 - t)^(exponent / 2) of a last evaluation at t, from which the clean latent is taken; 0: always at the last step."""
    earliest_end: float = 40.0
    """No last evaluation stands before this time, but at the last step of all."""
    ending_together: float = 0.0
    """The same where whole rows are computed or skipped, which end chunks at different times; of many rows the last of every chunk is among them."""
    few_rows: float = 0.25
    """Few rows are less than this part of all."""
    first: float = 3.0
    """Weight of the first chunk, which all others look back on; theirs is 1."""
    ratio: float = 1.35
    """Evaluations of the first chunk at least, for one of the others."""
    most_ratio: float = math.inf
    """And at most, but where it is computed nearly whole, or nothing else uses the budget."""
    nearly_whole: float = 0.92
    """At least this part of the first chunk's steps is computed where that leaves all others at least `whole_from` of theirs."""
    whole_from: float = 0.3
    """Above 1: never."""
    changes: tuple[float, ...] = ()
    """After which parts of a chunk's steps the model goes another way at once, with other guidance: there a chunk is computed, wherever the chunks
    that it attends to are."""

    def over_rows(self, share: float) -> Profile:
        """What whole rows cost, of which this part is computed."""
        return replace(self, knots=self.knots_together, ending=self.ending_together if share < self.few_rows else 0.0)

    def step(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cost of the step between evaluations at times a and b."""
        times, lengths = zip(*self.knots, strict=True)
        return ((b - a) / np.interp((a + b) / 2, times, lengths)) ** self.exponent

    def start(self, t: np.ndarray) -> np.ndarray:
        return self.late_start * (2 * t) ** self.exponent

    def end(self, t: np.ndarray) -> np.ndarray:
        """Cost of a last evaluation at the rising times t, of which the last is that of a chunk's last step.

        Over the step to noise level 0 the clean latent is held, which is of first order: half the exponent.
        """
        if self.ending == 0:
            return np.where(t == t[-1], 0.0, np.inf)
        return np.where((t < self.earliest_end) & (t != t[-1]), np.inf, self.ending * (CLOCK - t) ** (self.exponent / 2))


ORDINARY = Profile(ending=500.0, ending_together=200.0, most_ratio=2.0)
"""As tuned on SkyReels-V2."""
DISTILLED = Profile()
"""For few steps, of which every model was taught the last."""
