"""Chunkwise Cache by a plan: what is computed is settled before the run, from a budget, and skipped steps are integrated over.

Nothing is replayed and nothing is decided while the run goes on, so there is nothing to remember and nothing to wait for. Under
the time signature FlowCache's own rule does not depend on the content either: it is a plan too, only one in which every chunk
chooses for itself (`plan.py` says what that costs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..chunk import Chunk
from ..decision import Compute, Decision, Outlook, Signals, check, setting
from ..plan import Plan
from ..planner import Profile, least_share, plan_for
from ..schedule import ChunkSchedule
from ..state import ChunkState, RunMemory


@dataclass(frozen=True)
class Planned:
    """A budget, in one of three forms. Raises ValueError for values that contradict each other.

    `share`: of all network tokens, clean passes included, the part that is computed. `seconds`: what the network may take in all; one
    evaluation is timed when the run begins. `exact`: a plan that was made elsewhere.
    """

    name: ClassVar[str] = "planned"
    keeps: ClassVar[None] = None

    share: float = setting(0.4, "The share of all network tokens that is computed; 1 computes every step.", low=0.01, high=1.0, step=0.01)
    seconds: float = setting(0.0, "Instead of a share: what the network may take in all. 0: the share counts.", low=0.0, high=1e6, step=1.0)
    exact: Plan | None = None
    profile: Profile = Profile()

    def __post_init__(self) -> None:
        check(self)
        if self.exact and self.seconds:
            raise ValueError("a plan and a budget in seconds were both given: leave one of them out")

    def decide(self, chunk: Chunk, signals: Signals, state: ChunkState) -> Decision:
        return Compute()

    def plan(self, schedule: ChunkSchedule, together: bool = False) -> Plan:
        """Raises ValueError for an `exact` plan of another schedule."""
        if self.exact is None:
            return plan_for(schedule, self.share, self.profile, together)
        if self.exact.together != together:
            one, other = ("bidirectional", "block-causal") if self.exact.together else ("block-causal", "bidirectional")
            raise ValueError(f"the plan is for {one} attention, and this run is {other}: make a plan for this run, or set attention to {one}")
        return self.exact.check(schedule)

    def timed(self, schedule: ChunkSchedule, frame_s: float, together: bool = False) -> Plan:
        """The plan for the budget in seconds, where one latent frame takes `frame_s` of them."""
        return plan_for(schedule, self.seconds / frame_s / Plan.full(schedule, together).frames_computed(schedule), self.profile, together)

    def check_run(self, steps: int) -> None:
        """Any number of steps will do."""

    def foresee(self, outlook: Outlook) -> tuple[str, ...]:
        return ()

    def retell(self, memory: RunMemory) -> tuple[str, ...]:
        return ()


def foretell(plan: Plan, schedule: ChunkSchedule, wanted: float | None = None) -> tuple[str, ...]:
    """What a plan will do, in sentences. `wanted`: the share that was asked for."""
    counts = [len(steps) for steps in plan.computed if steps]
    total = len(counts) * plan.steps
    share = plan.share(schedule)
    said = f"{sum(counts)} of {total} chunk-steps will be computed, {share:.0%} of all tokens with the clean passes of finished chunks"
    if plan.is_full:
        return (f"all {total} chunk-steps will be computed",)
    if wanted is not None and share > wanted + 0.5 / plan.steps:
        return (f"{said}: {wanted:.0%} cannot be reached, {least_share(schedule, plan.together):.0%} is the least (two steps of every chunk)",)
    return (said,)
