"""A run for the loops made of single functions, or of a session and a function that evaluates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowcache_core.kernels.transfer import Inbox
from flowcache_core.policies.protocol import CachePolicy, Decision
from flowcache_core.policies.state import ChunkState
from flowcache_core.run.sections import SectionSession
from flowcache_core.run.session import Session
from flowcache_core.run.signals import RowDecisions
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.given import CLEAN, GivenNoise
from flowcache_core.sampling.loop import Note, PredictSection, sample_sections
from flowcache_core.sampling.plan import Plan
from flowcache_core.sampling.schedule import ChunkSchedule, Row, Section
from flowcache_core.sampling.solvers import Solver


def decided(policy: CachePolicy, chunk: Chunk, signals: Any, state: ChunkState) -> Decision:
    """What a policy decides for a chunk that is alone in its row."""
    return RowDecisions({chunk: policy.decide(chunk, signals, state)}, Inbox()).take(chunk)


@dataclass(frozen=True)
class Driven:
    """`schedule`: where there is no session, for the plan of everything."""

    evaluate: Callable[[Tensor, Chunk], Tensor]
    session: Session | None = None
    see: Note | None = None
    exact: Plan | None = None
    schedule: ChunkSchedule | None = None
    recache: frozenset[int] = frozenset()

    @property
    def plan(self) -> Plan | None:
        if self.exact or self.schedule:
            return self.exact or Plan.full(self.schedule)  # type: ignore[arg-type]
        return self.session.plan if self.session else None

    def settle(self, frame_s: float) -> Plan:
        assert self.session
        return self.session.settle(frame_s)

    def anew(self, chunk: Chunk) -> Sequence[Chunk]:
        return self.session.restart(chunk) if self.session and chunk.index in self.recache else ()

    def begin_row(self, chunks: Sequence[Chunk], film: Tensor) -> None:
        if self.session:
            self.session.begin_row(chunks, film)

    def predict(self, x: Tensor, chunk: Chunk) -> Tensor:
        return self.evaluate(x, chunk)

    def together(self, chunks: Sequence[Chunk]) -> bool:
        return False

    def predict_row(self, parts: Sequence[Tensor], chunks: Sequence[Chunk]) -> Sequence[Tensor]:
        raise AssertionError("chunks come one after the other")

    def choose(self, chunk: Chunk, rate: Tensor) -> Tensor:
        assert self.session
        return self.session.choose(chunk, rate)

    def note(self, chunk: Chunk, clean: Tensor | None, film: Tensor) -> None:
        if self.session:
            self.session.note(chunk, clean)
        if self.see:
            self.see(chunk, clean, film)

    def commit(self, chunk: Chunk) -> None:
        if self.session:
            self.session.commit(chunk)


@dataclass(frozen=True)
class DrivenSections:
    """The same for bidirectional sections."""

    evaluate: PredictSection
    session: SectionSession | None = None
    see: Note | None = None
    exact: Plan | None = None

    @property
    def plans(self) -> Sequence[Plan] | None:
        return (self.exact,) if self.exact else self.session.plans if self.session else None

    def settle(self, frame_s: float) -> Any:
        assert self.session
        return self.session.settle(frame_s)

    def predict(self, x: Tensor, levels: tuple[float, ...], row: Row, start: int) -> Tensor:
        return self.evaluate(x, levels, row)

    def note(self, chunk: Chunk, clean: Tensor | None, film: Tensor) -> None:
        if self.session:
            self.session.note(chunk, clean)
        if self.see:
            self.see(chunk, clean, film)


def sample_section(predict: PredictSection, noise: Tensor, schedule: ChunkSchedule, sigmas: Sequence[float], solver: Solver,
                   given: GivenNoise = CLEAN, plan: Plan | None = None) -> Tensor:  # fmt: skip
    """A film of one section, without a session; `plan` None computes all rows."""
    run = DrivenSections(predict, exact=plan or Plan.full(schedule, together=True))
    return sample_sections(run, noise, [Section(0, 0, schedule)], sigmas, solver, given)
