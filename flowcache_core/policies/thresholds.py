"""What the chunkwise rule does on changes that are known: its decision table, how often it computes, and which threshold computes how much.

It knows no networks and no runs: changes come in as numbers, one per step of a chunk.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ..sampling.chunk import Chunk
from .protocol import Compute, Rescale
from .state import ChunkState

if TYPE_CHECKING:
    from .chunkwise import Chunkwise


def rescaled(change: float, polynomial: Sequence[float], how: Rescale) -> float:
    """polynomial(change), coefficients highest power first, clamped at 0 if asked for; without a polynomial the change itself."""
    if how == "none" or not polynomial:
        return change
    value = 0.0
    for coefficient in polynomial:
        value = value * change + coefficient
    return max(value, 0.0) if how == "clamped" else value


def decision_table(rule: Chunkwise, threshold: float, changes: Sequence[float]) -> tuple[bool, ...]:
    """For every step of a chunk: True when it is computed."""
    if threshold == 0:
        return (True,) * len(changes)
    state, steps = ChunkState(), len(changes)
    return tuple(isinstance(rule.decide_at(threshold, change, Chunk(0, 0, 1, step, steps), state), Compute) for step, change in enumerate(changes))


@dataclass(frozen=True, slots=True)
class ReuseState:
    """Where a chunk stands before a step: its drift, its reused steps in a row, and how often it was computed."""

    step: int = 0
    drift: float = 0.0
    reused_in_a_row: int = 0
    computed: int = 0


def computed_from(rule: Chunkwise, threshold: float, changes: Sequence[float], at: ReuseState = ReuseState()) -> int:
    """How many of a chunk's steps the rule computes from `at` on: what `decision_table` counts, without making decisions."""
    steps, drift, row, done = len(changes), at.drift, at.reused_in_a_row, at.computed
    warmup, longest, always = rule.warmup_steps, rule.max_reuse, threshold == 0
    whole = rule.start_percent == 0 and rule.end_percent == 1
    for step in range(at.step, steps):
        drift += changes[step]
        inside = whole or rule.start_percent <= step / steps <= rule.end_percent
        if always or drift >= threshold or done < warmup or row >= longest or step == steps - 1 or not inside:
            done, drift, row = done + 1, 0.0, 0
        else:
            row += 1
    return done - at.computed


def least_computed(rule: Chunkwise, steps: int) -> int:
    """The fewest of `steps` that these settings can compute, at any threshold."""
    return computed_from(rule, math.inf, [0.0] * steps)


def nearest_threshold(rule: Chunkwise, changes: Sequence[float], share: float) -> float:
    """The threshold whose decision table computes the share of steps that is nearest to `share`; of two equally near, more.

    The table changes only where the threshold passes a sum of consecutive changes, and a larger threshold never computes
    more (for changes >= 0), so bisecting the sorted sums is exact.
    """
    sums = sorted({s for start in range(1, len(changes)) for s in _running(changes[start : start + rule.max_reuse + 1]) if s > 0})
    # thresholds between neighbouring sums: the table is the same at every point between
    between = [0.0, *((a + b) / 2 for a, b in pairwise([0.0, *sums])), sums[-1] * 2 if sums else 1.0]
    goal = share * len(changes)
    least = bisect_left(between, -goal, key=lambda t: -computed_from(rule, t, changes))
    near = between[max(least - 1, 0) : least + 1]
    return min(near, key=lambda t: abs(computed_from(rule, t, changes) - goal))


def _running(changes: Sequence[float]) -> list[float]:
    out, total = [], 0.0
    for change in changes:
        total += change
        out.append(total)
    return out
