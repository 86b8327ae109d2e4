"""What a model's steps are worth, by which plans are made (`planner.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
    first: float = 3.0
    """Weight of the first chunk, which all others look back on; theirs is 1."""
    ratio: float = 1.35
    """Evaluations of the first chunk at least, for one of the others."""
    nearly_whole: float = 0.92
    """At least this part of the first chunk's steps is computed where that leaves all others at least `whole_from` of theirs."""
    whole_from: float = 0.3
    """Above 1: never."""
    changes: tuple[float, ...] = ()
    """After which parts of a chunk's steps the model goes another way at once, with other guidance: there a chunk is computed, wherever the chunks
    that it attends to are."""

    def step(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cost of the step between evaluations at times a and b."""
        times, lengths = zip(*self.knots, strict=True)
        return ((b - a) / np.interp((a + b) / 2, times, lengths)) ** self.exponent

    def start(self, t: np.ndarray) -> np.ndarray:
        return self.late_start * (2 * t) ** self.exponent


ORDINARY = Profile()
"""As tuned on SkyReels-V2."""
