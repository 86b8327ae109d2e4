"""Chunkwise Cache by a plan: what is computed is settled before the run, from a budget, and skipped steps are integrated over.

Nothing is replayed and nothing is decided while the run goes on, so there is nothing to remember and nothing to wait for. Under
the time signature FlowCache's own rule does not depend on the content either: it is a plan too, only one in which every chunk
chooses for itself (`plan.py` says what that costs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..memory import RunMemory
from ..sampling.chunk import Chunk
from ..sampling.plan import Plan, commit_frames
from ..sampling.planner import plan_for
from ..sampling.schedule import ChunkSchedule
from ..settings import check, setting
from .protocol import Compute, Decision, Outlook, PlanPolicy, Signals
from .state import ChunkState


@dataclass(frozen=True)
class Planned:
    """A budget, in one of three forms. Raises ValueError for values that contradict each other.

    `share`: of all network tokens, clean passes included, the part that is computed. `seconds`: what the network may take in all; one
    evaluation is timed when the run begins. `exact`: a plan that was made elsewhere; for bidirectional sections one of each.
    """

    name: ClassVar[str] = "planned"
    title: ClassVar[str] = "Chunkwise Cache by a plan"
    keeps: ClassVar[None] = None

    share: float = setting(0.4, "The share of all network tokens that is computed; 1 computes every step.", low=0.01, high=1.0, step=0.01)
    seconds: float = setting(0.0, "Instead of a share: what the network may take in all. 0: the share counts.", low=0.0, high=1e6, step=1.0)
    exact: Plan | tuple[Plan, ...] | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.exact and self.seconds:
            raise ValueError("a plan and a budget in seconds were both given: leave one of them out")

    @classmethod
    def uncached(cls) -> Planned:
        return cls(share=1.0)

    def decide(self, chunk: Chunk, signals: Signals, state: ChunkState) -> Decision:
        return Compute()

    def plan(self, schedule: ChunkSchedule, together: bool = False) -> Plan:
        """Raises ValueError for an `exact` plan of another schedule."""
        if self.exact is None:
            return plan_for(schedule, self.share, together)
        (plan,) = self._given(1, together)
        return plan.check(schedule)

    def plans(self, schedules: Sequence[ChunkSchedule], frame_s: float | None = None) -> tuple[Plan, ...]:
        """One plan for each bidirectional section. `frame_s`: see `timed`. Raises ValueError for `exact` plans of other sections."""
        if self.exact is not None:
            return tuple(plan.check(one) for plan, one in zip(self._given(len(schedules), True), schedules, strict=True))
        share = self.share if frame_s is None else self.seconds / full_s(schedules, frame_s, True)
        return tuple(plan_for(one, share, True) for one in schedules)

    def timed(self, schedule: ChunkSchedule, frame_s: float, together: bool = False) -> Plan:
        """The plan for the budget in seconds, where a latent frame takes `frame_s` of them."""
        return plan_for(schedule, self.seconds / full_s([schedule], frame_s, together), together)

    def _given(self, sections: int, together: bool) -> tuple[Plan, ...]:
        """The exact plans, of as many sections and for this attention."""
        plans = self.exact if isinstance(self.exact, tuple) else (self.exact,) if self.exact else ()
        if wrong := [plan for plan in plans if plan.together != together]:
            one, other = ("bidirectional", "block-causal") if wrong[0].together else ("block-causal", "bidirectional")
            raise ValueError(f"the plan is for {one} attention, and this run is {other}: make a plan for this run, or set attention to {one}")
        if any(any(plan.partial) for plan in plans):
            raise ValueError(
                "the plan computes some steps in part, and which part is chosen while the run goes on, by the policy that made it: use that one "
                f"with the same budget, or the plan of a run of {self.title}"
            )
        if len(plans) != sections:
            raise ValueError(
                f"the plan is for {len(plans)} section{'s' if len(plans) != 1 else ''}, and this film has {sections}: "
                "make a plan for this run, or set the film's length to that of the plan"
            )
        return plans

    def check_run(self, steps: int) -> None:
        """Any number of steps will do."""

    def forecast(self, outlook: Outlook) -> tuple[str, ...]:
        return ()

    def findings(self, memory: RunMemory) -> tuple[str, ...]:
        return ()


def full_s(schedules: Sequence[ChunkSchedule], frame_s: float, together: bool) -> float:
    """Seconds that the network takes in the uncached run."""
    return frame_s * sum(Plan.full(one, together).frames_computed(one) for one in schedules)


def share_of(plans: Sequence[Plan], schedules: Sequence[ChunkSchedule]) -> float:
    """Of all network tokens of an uncached film, clean passes included, the part that its plans compute."""
    computed, full = (
        sum(plan.frames_computed(one) for plan, one in zip(which, schedules, strict=True))
        for which in (plans, [Plan.full(one, plan.together) for plan, one in zip(plans, schedules, strict=True)])
    )
    return computed / full


def forecast_plans(policy: PlanPolicy, plans: Sequence[Plan], schedules: Sequence[ChunkSchedule], frame_s: float | None = None) -> tuple[str, ...]:
    """What plans will do, in sentences: one of a run with a KV cache, or one of each bidirectional section; () before a timing.

    `frame_s`: seconds that a latent frame takes, where that has been timed.
    """
    if not plans:
        return (f"the network may take {policy.seconds:g} s: one evaluation will be timed, then it is settled what is computed",)
    together, share = plans[0].together, share_of(plans, schedules)
    budget: tuple[str, ...] = ()
    wanted = policy.share if isinstance(policy, Planned) and policy.exact is None else None
    if frame_s is not None:
        whole = full_s(schedules, frame_s, together)
        wanted = min(policy.seconds / whole, 1.0)
        budget = (f"all steps would take the network about {whole:.3g} s here, so {policy.seconds:g} s are {wanted:.0%} of all tokens",)
    sentence = f"{_counted(plans, schedules)} will be computed, {share:.0%} of all tokens"
    if not together and commit_frames(schedules[0]):
        sentence += " with the clean passes of finished chunks"
    if wanted is not None and share > wanted + 0.5 / plans[0].steps:
        sentence += f": {wanted:.0%} cannot be reached, this is the least"
    return (sentence, *budget)


def _counted(plans: Sequence[Plan], schedules: Sequence[ChunkSchedule]) -> str:
    """What is computed and of how much, counted as `RunReport` does: in a bidirectional row idle chunks run too."""
    if not plans[0].together:
        n, total = sum(map(len, plans[0].computed)), schedules[0].chunk_steps
        return f"all {total} chunk-steps" if n == total else f"{n} of {total} chunk-steps"
    rows = [(row, any(plan.computes(chunk) for chunk in row.active)) for plan, one in zip(plans, schedules, strict=True) for row in one.rows]
    run = [row for row, computed in rows if computed]
    n, total = (sum(row.last - row.first for row in some) for some in (run, [row for row, _ in rows]))
    return f"all {len(rows)} rows ({total} chunk-steps)" if n == total else f"{len(run)} of {len(rows)} rows ({n} of {total} chunk-steps)"
