"""Chunkwise reuse whose threshold is found for a wanted computed share, instead of being set.

Under the time signature all changes are known before sampling, so the threshold is found once, exactly. Under the latent
signature they are not: before every decision the rest of the run is played through with the changes that are expected, and
the threshold moves to where the run would meet the share. Expected is what earlier chunks measured at the same step; where no
chunk has been yet, the change of a straight flow between unit-variance noise and data, scaled by what was measured last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import ClassVar

from ..memory import RunMemory
from ..sampling.chunk import Chunk
from ..settings import setting
from .chunkwise import Chunkwise
from .forecast import headroom, on_rescaling
from .protocol import Compute, Decision, Deferred, Outlook, Signals
from .state import ChunkState
from .thresholds import ReuseState, computed_from, least_computed, nearest_threshold


@dataclass(frozen=True)
class Target(Chunkwise):
    """Settings of Chunkwise Cache with a wanted share of computed chunk-steps; the threshold among them is not used.

    Raises ValueError for a share that the other settings cannot reach in the run's steps.
    """

    name: ClassVar[str] = "target"
    title: ClassVar[str] = "Chunkwise Cache by a target"

    share: float = setting(0.5, "The share of a run's chunk-steps that is computed.", low=0.01, high=1.0, step=0.01)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescale == "unclamped":
            raise ValueError(
                "a target cannot be found with rescale unclamped, where a larger threshold may compute more: set rescale to clamped or none"
            )

    @classmethod
    def uncached(cls) -> Target:
        return cls(share=1.0)

    @classmethod
    def of(cls, rule: Chunkwise, share: float) -> Target:
        """The settings of `rule`, with a target in place of its threshold."""
        return cls(**{f.name: getattr(rule, f.name) for f in fields(Chunkwise)}, share=share)

    @property
    def follows_time(self) -> bool:
        return self.signature == "time"

    def decide(self, chunk: Chunk, signals: Signals, state: ChunkState) -> Decision | Deferred:
        """Under the latent signature every decision counts for the next, so all of them wait for the chunk's turn, forced ones too."""
        change = self.change(signals)
        if self.signature == "time":
            threshold = state.run.of(Found, lambda: self.find(signals.outlook)).threshold
            return Deferred((change,), lambda change: self.decide_at(threshold, change, chunk, state)) if threshold else self._compute(state)
        pace = state.run.of(Pace, lambda: Pace.start(self, signals.outlook))
        return Deferred((change,), lambda change: pace.decide(self, chunk, change, state))

    def check_run(self, steps: int) -> None:
        least = least_computed(self, steps)
        if round(self.share * steps) < least:
            raise ValueError(
                f"a computed share of {self.share:.0%} cannot be reached: with warmup_steps {self.warmup_steps}, max_reuse {self.max_reuse} and "
                f"{steps} steps per chunk at least {least} of {steps} are computed ({least / steps:.0%}, at most {steps / least:.2f}x); "
                "ask for that, or lower warmup_steps or raise max_reuse"
            )

    def find(self, outlook: Outlook) -> Found:
        return Found(nearest_threshold(self, self.known_changes(outlook), self.share))

    def forecast(self, outlook: Outlook) -> tuple[str, ...]:
        total = outlook.chunks * outlook.steps
        if self.signature == "time":
            threshold = self.find(outlook).threshold
            n = outlook.chunks * computed_from(self, threshold, self.known_changes(outlook))
            sentence = f"{n} of {total} chunk-steps will be computed, target {self.share:.0%} of them: threshold {threshold:.4g} was found"
        else:
            n = round(self.share * total)
            sentence = f"about {n} of {total} chunk-steps will be computed, target {self.share:.0%} of them: the threshold follows the target"
        return (sentence, *on_rescaling(self, outlook.polynomial), *headroom(self, outlook.steps))

    def findings(self, memory: RunMemory) -> tuple[str, ...]:
        pace = memory.find(Pace)
        if pace is None or not pace.used:
            return ()
        low, middle, high = min(pace.used), sorted(pace.used)[len(pace.used) // 2], max(pace.used)
        return (f"target {self.share:.0%}: the threshold lay between {low:.3g} and {high:.3g}, in the middle at {middle:.3g}",)


@dataclass(frozen=True, slots=True)
class Found:
    """The threshold of a run whose changes are known."""

    threshold: float


@dataclass(slots=True)
class Pace:
    """The controller of one run: what was computed, what is still to come, and the threshold that fits."""

    goal: int
    waiting: int
    """Chunks that have not begun."""
    straight: tuple[float, ...]
    threshold: float
    computed: int = 0
    flying: dict[int, tuple[int, ChunkState]] = field(default_factory=dict)
    """Chunk -> the step it has before it, and its state."""
    measured: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Step -> sum and number of the changes measured there."""
    scale: float = 1.0
    used: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, rule: Target, outlook: Outlook) -> Pace:
        straight = straight_changes(outlook.sigmas)
        goal = round(rule.share * outlook.chunks * outlook.steps)
        return cls(goal, outlook.chunks, straight, nearest_threshold(rule, straight, rule.share) or 1e-6)

    def decide(self, rule: Target, chunk: Chunk, change: float, state: ChunkState) -> Decision:
        if chunk.index not in self.flying:
            self.waiting -= 1
        self._learn(chunk.step, change)
        here, others = self._expected(), [at for index, at in self.flying.items() if index != chunk.index]
        rest = [(here, ReuseState(step, s.drift, s.reused_in_a_row, s.computed)) for step, s in others]
        now = list(here)
        now[chunk.step] = change
        rest.append((now, ReuseState(chunk.step, state.drift, state.reused_in_a_row, state.computed)))

        def total(threshold: float) -> int:
            begun = sum(computed_from(rule, threshold, changes, at) for changes, at in rest)
            return self.computed + begun + (self.waiting * computed_from(rule, threshold, here) if self.waiting else 0)

        self.threshold = nearest(total, self.goal, self.threshold, self.waiting // 2)
        decision = rule.decide_at(self.threshold, change, chunk, state)
        if not rule.forced(chunk.step, chunk.steps, state.computed):
            self.used.append(self.threshold)
        self.computed += isinstance(decision, Compute)
        self.flying[chunk.index] = chunk.step + 1, state
        if chunk.step == chunk.steps - 1:
            del self.flying[chunk.index]
        return decision

    def _learn(self, step: int, change: float) -> None:
        if step == 0 or not math.isfinite(change):
            return
        total, n = self.measured.get(step, (0.0, 0))
        self.measured[step] = total + change, n + 1
        ratio = change / self.straight[step]
        self.scale = ratio if len(self.measured) == 1 else 0.75 * self.scale + 0.25 * ratio

    def _expected(self) -> list[float]:
        known = self.measured
        return [known[j][0] / known[j][1] if j in known else self.scale * s for j, s in enumerate(self.straight)]


def straight_changes(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Relative L1 change of x = (1 - sigma) data + sigma noise at every step against the one before, both of unit variance."""
    moved = ((before - now) * math.sqrt(2) / math.hypot(1 - before, before) for before, now in pairwise(sigmas[:-1]))
    return (0.0, *(max(m, 1e-9) for m in moved))


def nearest(total: Callable[[float], int], goal: int, start: float, slack: int) -> float:
    """A threshold at which the falling function `total` comes nearest to `goal`; `start` itself if it is within `slack`."""
    at = total(start)
    if abs(at - goal) <= slack:
        return start
    best, miss, low, high = start, abs(at - goal), start, start
    up = at > goal
    for _ in range(24):
        low, high = (high, high * 2) if up else (low / 2, low)
        at = total(high if up else low)
        if abs(at - goal) < miss:
            best, miss = high if up else low, abs(at - goal)
        if (at <= goal) if up else (at >= goal):
            break
    for _ in range(10):
        if miss <= slack:
            break
        middle = math.sqrt(low * high)
        at = total(middle)
        if abs(at - goal) < miss:
            best, miss = middle, abs(at - goal)
        low, high = (middle, high) if at > goal else (low, middle)
    return best
