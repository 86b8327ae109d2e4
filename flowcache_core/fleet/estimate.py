"""How long a fleet will take: what plans compute, times what a latent frame takes here. No film is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from ..models.bundle import Bundle
from ..policies.planned import full_s
from ..policies.protocol import PlanPolicy
from ..run.generate import run_of
from ..sampling.plan import Plan
from .renderer import Pace
from .simulation import FilmTime, Fleet, simulate
from .tasks import FilmTask


@dataclass(frozen=True)
class Cost:
    """Of one film: latent frames that run through the network, clean passes included; latent frames that are decoded; whether the first number
    is a bound, since steps are decided while the film is made."""

    computed: float
    frames: int
    bound: bool

    def seconds(self, pace: Pace) -> float:
        return self.computed * pace.network + self.frames * pace.decode


@dataclass(frozen=True)
class Estimate:
    """`seconds`: of each film, in the order of their lines."""

    kinds: int
    workers: int
    seconds: tuple[float, ...]
    bounds: int

    @property
    def hours(self) -> float:
        """Until the last film is there, where whoever is free takes the next one."""
        return simulate([FilmTime((one,)) for one in self.seconds], Fleet(self.workers)).seconds / 3600

    def text(self) -> str:
        workers = f"{self.workers} worker{'s' * (self.workers > 1)}"
        lines = [
            f"{len(self.seconds)} films to make: {self.hours:.3g} hours on {workers} ({sum(self.seconds) / 3600:.3g} on one)",
            f"how: one evaluation of the network and one decoded window, timed on all workers at once for each of {self.kinds} kinds of films; times "
            "the latent frames that the plans compute, clean passes of finished chunks included, and those that are decoded. Loading, saved "
            "states and lost workers come on top",
        ]
        if self.bounds:
            lines.append(f"{self.bounds} films decide while they are made what is computed: of these all steps are counted, which is the most")
        return "\n".join(lines)


def cost_of(bundle: Bundle, task: FilmTask, pace: Pace) -> Cost:
    run = run_of(bundle, task.job, task.policy, task.compressor)
    schedule = run.schedule
    full, planned = Plan.full(schedule).frames_computed(schedule), isinstance(task.policy, PlanPolicy)
    if planned and run.plan is None:
        assert isinstance(task.policy, PlanPolicy)
        computed = full * min(task.policy.seconds / full_s([schedule], pace.network, False), 1.0)
    else:
        computed = run.plan.frames_computed(schedule) if run.plan else full
    return Cost(computed, schedule.frames, bound=not planned and task.policy is not None)


def kind_of(task: FilmTask) -> FilmTask:
    """What films have in common that take the same time per latent frame."""
    job = replace(task.job, prompt="", negative="", seed=0)
    return replace(task, line=0, key="", title="", asked={}, job=job, policy=None, compressor=None)


def kinds_of(tasks: Sequence[FilmTask]) -> list[FilmTask]:
    return list({repr(kind): kind for kind in map(kind_of, tasks)}.values())


def estimate(bundles: dict[str, Bundle], tasks: Sequence[FilmTask], kinds: Sequence[FilmTask], paces: Sequence[Sequence[Pace]]) -> Estimate:
    """`paces`: of every worker, of every kind."""
    mean = {repr(kind): Pace(fmean(one[k].network for one in paces), fmean(one[k].decode for one in paces)) for k, kind in enumerate(kinds)}
    found = [(pace := mean[repr(kind_of(task))], cost_of(bundles[task.model], task, pace)) for task in tasks]
    return Estimate(len(kinds), len(paces), tuple(cost.seconds(pace) for pace, cost in found), sum(cost.bound for _, cost in found))
