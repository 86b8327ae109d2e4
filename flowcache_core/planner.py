"""Plans from a budget: where to compute, if only so many evaluations may be spent.

The model of the error is that of a second-order integrator: a step of length h at time t costs (h / H(t))^4 (its squared local error), and
costs add up. H is longer early than late: near the end the clean latent still changes while its noise is nearly gone. A chunk's
steps are then the path of least cost through its allowed steps, found exactly by dynamic programming. Chunks are planned in order:
while earlier chunks run, only rows in which they are computed are allowed, so that the plan is in step (`plan.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .path import CLOCK
from .plan import Plan, attended, commit_frames, row_frames
from .schedule import ChunkSchedule

LEAST = 2
"""Evaluations of a chunk at least, where it has as many steps."""


@dataclass(frozen=True)
class Profile:
    """What a model's steps cost. Times are on the clock of `path.py`, 0..50."""

    knots: tuple[tuple[float, float], ...] = ((0.0, 1.0), (38.0, 1.0), (49.0, 0.5))
    """(time, H): the length of a step of unit cost, on a broken line."""
    exponent: float = 4.0
    late_start: float = 0.5
    """Weight of the cost (2 t)^exponent of a first evaluation at t instead of 0."""
    first: float = 5.0
    """Weight of the first chunk, which all others look back on; theirs is 1."""

    def step(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cost of the step between evaluations at times a and b."""
        times, lengths = zip(*self.knots, strict=True)
        return ((b - a) / np.interp((a + b) / 2, times, lengths)) ** self.exponent

    def start(self, t: np.ndarray) -> np.ndarray:
        return self.late_start * (2 * t) ** self.exponent


def plan_for(schedule: ChunkSchedule, share: float, profile: Profile = Profile(), together: bool = False) -> Plan:
    """The plan of least cost that computes at most `share` of the run's network tokens, clean passes included.

    A share too small for two steps of every chunk gets these. `together`: for attention over the whole window.
    """
    full = Plan.full(schedule, together)
    if share >= 1:
        return full
    if together:
        return rows_together(schedule, share * full.frames_computed(schedule), profile)
    budget = share * full.frames_computed(schedule) - commit_frames(schedule)
    return best(schedule, budget, profile)


def plan_in_part(schedule: ChunkSchedule, share: float, part: float, profile: Profile = Profile()) -> Plan:
    """The plan of least cost within `share` of which some steps, `steps_in_part`, compute only `part` of a chunk's tokens: a finer one.

    With part 1 it is `plan_for`, and so where the share leaves no step to be computed in part.
    """
    if part >= 1 or share >= 1:
        return plan_for(schedule, share, profile)
    budget = share * Plan.full(schedule).frames_computed(schedule) - commit_frames(schedule)
    fine = best(schedule, budget, profile, part)
    return replace(fine, partial=tuple(map(steps_in_part, fine.computed)), part=part)


def steps_in_part(computed: Sequence[int]) -> tuple[int, ...]:
    """Every second computed step of a chunk, counted back from its last, which is whole; its first two are whole too."""
    return tuple(computed[at] for at in range(2, len(computed)) if (len(computed) - at) % 2 == 0)


def best(schedule: ChunkSchedule, budget: float, profile: Profile, part: float = 1.0) -> Plan:
    """`budget`: latent frames that may be computed, clean passes not counted. `part`: how much of a chunk `steps_in_part` compute."""
    chunks = range(schedule.given, schedule.chunks)
    sizes = [schedule.span(k)[1] for k in chunks]
    least = min(LEAST, schedule.steps)
    found: tuple[float, Plan] | None = None
    for first in range(least, schedule.steps + 1):
        counts = _counts(sizes, schedule.steps, budget, first, least, part)
        if counts is None:
            break
        cost, plan = _nested(schedule, tuple(counts), profile)
        if found is None or cost < found[0]:
            found = cost, plan
    if found is None:
        return _nested(schedule, (least,) * len(sizes), profile)[1]
    return found[1]


def least_share(schedule: ChunkSchedule, together: bool = False) -> float:
    """The smallest share that a plan can have."""
    return plan_for(schedule, 0.0, together=together).share(schedule)


def _counts(sizes: Sequence[int], steps: int, budget: float, first: int, least: int, part: float) -> list[int] | None:
    """Evaluations per chunk: `first` of the first one, the rest of the budget spread evenly over the others; None when it does not suffice."""
    price = [n - len(steps_in_part(range(n))) * (1 - part) for n in range(steps + 1)]
    left, others = budget - price[first] * sizes[0], sizes[1:]
    if left < price[least] * sum(others):
        return None
    even = max(n for n in range(least, steps + 1) if price[n] * sum(others) <= left) if others else 0
    counts = [even] * len(others)
    left -= price[even] * sum(others)
    for k, size in enumerate(others):
        if counts[k] < steps and left >= (more := (price[even + 1] - price[even]) * size):
            counts[k] += 1
            left -= more
    return [first, *counts]


def _nested(schedule: ChunkSchedule, counts: tuple[int, ...], profile: Profile) -> tuple[float, Plan]:
    computed: list[tuple[int, ...]] = [()] * schedule.given
    total = 0.0
    for k, count in zip(range(schedule.given, schedule.chunks), counts, strict=True):
        first = k == schedule.given
        cost, steps = _line(allowed(schedule, computed, k), count, schedule.steps, profile)
        if first:
            steps = (0, *steps[1:])
        computed.append(steps)
        total += cost * (profile.first if first else 1.0)
    return total, Plan(schedule.steps, tuple(computed))


def allowed(schedule: ChunkSchedule, computed: Sequence[Sequence[int]], index: int) -> tuple[int, ...]:
    """The steps of a chunk at which all active chunks that it attends to are computed; `computed`: those of the chunks before it."""
    sets = [set(steps) for steps in computed]
    out = []
    for row in schedule.rows:
        for chunk in row.active:
            if chunk.index == index and all(other.step in sets[other.index] for other in attended(schedule, row, chunk)):
                out.append(chunk.step)
    return tuple(out)


@lru_cache(maxsize=4096)
def _line(points: tuple[int, ...], count: int, steps: int, profile: Profile) -> tuple[float, tuple[int, ...]]:
    """The `count` of the points, the last among them, on the path of least cost."""
    best, back = _table(points, steps, profile)
    count = min(count, len(points))
    at, chosen = len(points) - 1, []
    for m in range(count - 1, -1, -1):
        chosen.append(points[at])
        at = int(back[m][at])
    return float(best[count - 1][-1]), tuple(reversed(chosen))


@lru_cache(maxsize=256)
def _table(points: tuple[int, ...], steps: int, profile: Profile) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per number of evaluations so far, and point: the least cost of a path that ends there, and the point before it."""
    t = np.array(points) * CLOCK / steps
    cost = np.where(np.tri(len(t), k=0).T.astype(bool) & ~np.eye(len(t), dtype=bool), profile.step(t[:, None], t[None, :]), np.inf)
    best, back = [profile.start(t)], [np.zeros(len(t), int)]
    for _ in range(1, len(t)):
        through = best[-1][:, None] + cost
        back.append(through.argmin(0))
        best.append(through.min(0))
    return best, back


def rows_together(schedule: ChunkSchedule, budget: float, profile: Profile) -> Plan:
    """The plan of least cost in which every row computes all of its active chunks or none, within `budget` latent frames.

    The last step of every chunk is computed.
    """
    rows = schedule.rows
    chunks = range(schedule.given, schedule.chunks)
    time = np.full((len(chunks), len(rows)), np.nan)
    for number, row in enumerate(rows):
        for chunk in row.active:
            time[chunk.index - schedule.given, number] = chunk.step * CLOCK / schedule.steps
    cost = np.zeros((len(rows), len(rows)))
    start = np.zeros(len(rows))
    for k, t in enumerate(time):
        begin, end = np.flatnonzero(~np.isnan(t))[[0, -1]]
        weight = profile.first if k == 0 else 1.0
        inside = np.where(np.isnan(t), 0.0, t)
        here = np.arange(begin, end + 1)
        cost[np.ix_(here, here)] += weight * profile.step(inside[here][:, None], inside[here][None, :])
        cost[np.ix_(np.arange(begin), here)] += weight * profile.start(inside[here])[None, :]
        cost[:end, end + 1 :] = np.inf
        start[here] += weight * profile.start(inside[here])
        start[end + 1 :] = np.inf
    cost[np.tri(len(rows), dtype=bool)] = np.inf
    frames = row_frames(schedule, rows[0])
    least = len({int(np.flatnonzero(~np.isnan(t))[-1]) for t in time})
    count = min(max(int(budget // frames), least + (schedule.steps > 1)), len(rows))
    chosen = _cheapest(cost, start, count)
    computed: list[list[int]] = [[] for _ in range(schedule.chunks)]
    for number in chosen:
        for chunk in rows[number].active:
            computed[chunk.index].append(chunk.step)
    return Plan(schedule.steps, tuple(map(tuple, computed)), together=True)


def _cheapest(cost: np.ndarray, start: np.ndarray, count: int) -> list[int]:
    """`count` rising indices, the last of all among them, on the path of least cost; fewer where so many cannot be had."""
    best, back = [start], [np.zeros(len(start), int)]
    for _ in range(1, count):
        through = best[-1][:, None] + cost
        back.append(through.argmin(0))
        best.append(through.min(0))
    at, chosen = len(start) - 1, []
    for m in range(count - 1, -1, -1):
        chosen.append(at)
        at = int(back[m][at])
    return chosen[::-1]
