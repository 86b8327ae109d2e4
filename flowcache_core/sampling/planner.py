"""Plans from a budget: where to compute, if only so many evaluations may be spent.

The model of the error is that of a second-order integrator: a step of length h at time t costs (h / H(t))^4 (its squared local error), and
costs add up. H is shorter near the end, where the clean latent still changes while its noise is nearly gone, and for whole rows at the
beginning. A chunk's steps are then the path of least cost through its allowed steps, found exactly by dynamic programming. Chunks are planned
in order: while earlier chunks run, only rows in which they are computed are allowed, so that the plan is in step (`plan.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from .path import CLOCK
from .plan import Plan, attended, commit_frames, row_frames
from .profile import Profile
from .schedule import ChunkSchedule

LEAST = 2
"""Evaluations of a chunk at least, where it has as many steps."""
SMALL = 128
"""Points among which every jump is looked at."""
TINY = 1e-6
"""Against a budget that misses a whole number by rounding."""


def plan_for(schedule: ChunkSchedule, share: float, together: bool = False) -> Plan:
    """The plan of least cost that computes at most `share` of the run's network tokens, clean passes included.

    A share too small for two steps of every chunk gets these. `together`: for bidirectional attention.
    """
    full = Plan.full(schedule, together)
    if share >= 1:
        return full
    if together:
        return rows_together(schedule, share * full.frames_computed(schedule) + TINY)
    budget = share * full.frames_computed(schedule) - commit_frames(schedule) + TINY
    return best(schedule, budget)


def plan_in_part(schedule: ChunkSchedule, share: float, part: float) -> Plan:
    """The plan of least cost within `share` of which some steps, `steps_in_part`, compute only `part` of a chunk's tokens: a finer one.

    With part 1 it is `plan_for`, and so where the share leaves no step to be computed in part.
    """
    if part >= 1 or share >= 1:
        return plan_for(schedule, share)
    budget = share * Plan.full(schedule).frames_computed(schedule) - commit_frames(schedule) + TINY
    fine = best(schedule, budget, part)
    return replace(fine, partial=_in_part(fine, schedule), part=part)


def most_in_part(schedule: ChunkSchedule) -> Plan:
    """The plan by `plan_in_part` with the most steps: under no other does a run hold more."""
    full = Plan.full(schedule)
    return replace(full, partial=_in_part(full, schedule))


def _in_part(plan: Plan, schedule: ChunkSchedule) -> tuple[tuple[int, ...], ...]:
    return tuple(steps_in_part(computed, schedule.jumps) for computed in plan.computed)


def steps_in_part(computed: Sequence[int], jumps: Sequence[int] = ()) -> tuple[int, ...]:
    """Every second computed step of a chunk, counted back from its last, which is whole; its first two and `jumps` are whole too."""
    return tuple(computed[at] for at in range(2, len(computed)) if (len(computed) - at) % 2 == 0 and computed[at] not in jumps)


def least_share(schedule: ChunkSchedule, together: bool = False) -> float:
    """The smallest share that a plan can have."""
    return plan_for(schedule, 0.0, together=together).share(schedule)


def best(schedule: ChunkSchedule, budget: float, part: float = 1.0) -> Plan:
    """`budget`: latent frames that may be computed, clean passes not counted. `part`: how much of a chunk `steps_in_part` compute."""
    profile, jumps = schedule.profile, len(schedule.jumps)
    sizes = [schedule.span(k)[1] for k in range(schedule.given, schedule.chunks)]
    least, places = min(LEAST + jumps, schedule.steps), _places(schedule)
    price = [n - max(len(steps_in_part(range(n))) - jumps, 0) * (1 - part) for n in range(schedule.steps + 1)]
    found: tuple[tuple[bool, float], Plan] | None = None
    for others in _candidates(least, schedule.steps):
        counts = _counts(sizes, price, budget, others)
        if counts[0] < least:
            break
        if counts[0] < min(profile.ratio * others, schedule.steps) and others > least and len(sizes) > 1:
            continue
        cost, plan = _nested(schedule, places, counts)
        uneven = counts[0] > profile.most_ratio * others
        if part == 1 and counts[0] >= profile.nearly_whole * schedule.steps and others >= profile.whole_from * schedule.steps:
            uneven, cost = False, 0.0
        if found is None or (uneven, cost) <= found[0]:
            found = (uneven, cost), plan
    return found[1] if found else _nested(schedule, places, (least,) * len(sizes))[1]


def _candidates(least: int, most: int) -> Iterator[int]:
    """Numbers of evaluations that are tried: all of them, and of many those that differ by some percent."""
    count = least
    while count <= most:
        yield count
        count += max(1, count // 25)


def _counts(sizes: Sequence[int], price: Sequence[float], budget: float, others: int) -> list[int]:
    """Evaluations per chunk: what is left by `others` for every later chunk is the first one's; what is too much for it, theirs again.

    `price`: what a number of evaluations costs.
    """
    steps, left = len(price) - 1, budget - price[others] * sum(sizes[1:])
    first = bisect_right(price, left / sizes[0]) - 1
    counts = [first] + [others] * (len(sizes) - 1)
    left -= price[first] * sizes[0]
    while first == steps:
        before = left
        for k, size in enumerate(sizes):
            more = (price[min(counts[k] + 1, steps)] - price[counts[k]]) * size
            if k and counts[k] < steps and left >= more:
                counts[k] += 1
                left -= more
        if left == before:
            break
    return counts


Places = dict[int, list[tuple[int, tuple[tuple[int, int], ...]]]]
"""Of every chunk its steps, and with each the (chunk, step) pairs that it attends to in that row."""


def _places(schedule: ChunkSchedule) -> Places:
    out: Places = {}
    for row in schedule.rows:
        for chunk in row.active:
            others = tuple((other.index, other.step) for other in attended(schedule, row, chunk))
            out.setdefault(chunk.index, []).append((chunk.step, others))
    return out


def _nested(schedule: ChunkSchedule, places: Places, counts: Sequence[int]) -> tuple[float, Plan]:
    """Chunk after chunk, at steps at which all that it attends to is computed."""
    profile = schedule.profile
    computed: list[tuple[int, ...]] = [()] * schedule.given
    sets: dict[int, set[int]] = {}
    total = 0.0
    for k, count in zip(range(schedule.given, schedule.chunks), counts, strict=True):
        first = k == schedule.given
        allowed = tuple(step for step, others in places[k] if all(at in sets[other] for other, at in others))
        cost, steps = _line(allowed, count, schedule.steps, profile, first, schedule.jumps)
        computed.append(steps)
        sets[k] = set(steps)
        total += cost * (profile.first if first else 1.0)
    return total, Plan(schedule.steps, tuple(computed))


@lru_cache(maxsize=1024)
def _line(points: tuple[int, ...], count: int, steps: int, profile: Profile, from_first: bool,
          jumps: tuple[int, ...] = ()) -> tuple[float, tuple[int, ...]]:  # fmt: skip
    """The `count` of the points on the path of least cost to noise level 0; all of them where they are fewer.

    `from_first`: the path begins at the first of the points, else where it costs least. It leaves out none of `jumps`. Of many points only
    steps are looked at that are not far longer than the mean.
    """
    total = len(points)
    count = min(count, total)
    reach = total if total <= SMALL else min(total, 12 * math.ceil(total / count))
    t = np.array(points) * CLOCK / steps
    before = np.arange(total)[:, None] - np.arange(1, reach + 1)
    cost = np.where(before < 0, np.inf, profile.step(t[before], t[:, None]))
    best, back = profile.start(t), []
    if from_first and count > 1:
        best[1:] = np.inf
    for at in (points.index(jump) for jump in jumps if jump in points):
        cost[(before < at) & (np.arange(total)[:, None] > at)] = np.inf
        best[at + 1 :] = np.inf
    for _ in range(1, count):
        through = best[before] + cost
        jump = through.argmin(1)
        back.append(jump + 1)
        best = np.take_along_axis(through, jump[:, None], 1)[:, 0]
    best = best + profile.end(t)
    best[: max((points.index(jump) for jump in jumps if jump in points), default=0)] = np.inf
    last = at = int(best.argmin())
    chosen = [points[last]]
    for jump in reversed(back):
        at -= int(jump[at])
        chosen.append(points[at])
    return float(best[last]), tuple(reversed(chosen))


def evenly(schedule: ChunkSchedule, count: int, together: bool = False) -> Plan:
    """`count` evenly spaced rows per chunk, counted from the first chunk's first: what taking fewer steps comes to on a finer schedule.

    `count` has to divide the schedule's steps.
    """
    every = schedule.steps // count
    computed: list[list[int]] = [[] for _ in range(schedule.chunks)]
    for row in schedule.rows[::every]:
        for chunk in row.active:
            computed[chunk.index].append(chunk.step)
    return Plan(schedule.steps, tuple(map(tuple, computed)), together)


def rows_together(schedule: ChunkSchedule, budget: float) -> Plan:
    """The plan of least cost in which every row computes all of its active chunks or none, within `budget` latent frames."""
    rows = schedule.rows
    least = len({number for number, row in enumerate(rows) if any(chunk.step == chunk.steps - 1 for chunk in row.active)})
    count = min(max(int(budget // row_frames(schedule, rows[0])), least + (schedule.steps > 1)), len(rows))
    profile = schedule.profile.over_rows(count / len(rows))
    chunks = range(schedule.given, schedule.chunks)
    time = np.full((len(chunks), len(rows)), np.nan)
    for number, row in enumerate(rows):
        for chunk in row.active:
            time[chunk.index - schedule.given, number] = chunk.step * CLOCK / schedule.steps
    cost = np.zeros((len(rows), len(rows)))
    start, finish = np.zeros(len(rows)), np.zeros(len(rows))
    for t in time:
        begin, end = np.flatnonzero(~np.isnan(t))[[0, -1]]
        inside = np.where(np.isnan(t), 0.0, t)
        here = np.arange(begin, end + 1)
        cost[np.ix_(here, here)] += profile.step(inside[here][:, None], inside[here][None, :])
        cost[np.ix_(np.arange(begin), here)] += profile.start(inside[here])[None, :]
        cost[:begin, end + 1 :] = np.inf
        cost[np.ix_(here, np.arange(end + 1, len(rows)))] += profile.end(inside[here])[:, None]
        start[here] += profile.start(inside[here])
        start[end + 1 :] = np.inf
        finish[:begin] = np.inf
        finish[here] += profile.end(inside[here])
    cost[np.tri(len(rows), dtype=bool)] = np.inf
    chosen = _cheapest(cost, start, finish, count)
    computed: list[list[int]] = [[] for _ in range(schedule.chunks)]
    for number in chosen:
        for chunk in rows[number].active:
            computed[chunk.index].append(chunk.step)
    return Plan(schedule.steps, tuple(map(tuple, computed)), together=True)


def _cheapest(cost: np.ndarray, start: np.ndarray, finish: np.ndarray, count: int) -> list[int]:
    """`count` rising indices on the path of least cost from `start` to `finish`; fewer where so many cannot be had."""
    best, back = [start], [np.zeros(len(start), int)]
    for _ in range(1, count):
        through = best[-1][:, None] + cost
        back.append(through.argmin(0))
        best.append(through.min(0))
    at, chosen = int((best[-1] + finish).argmin()), []
    for m in range(count - 1, -1, -1):
        chosen.append(at)
        at = int(back[m][at])
    return chosen[::-1]
