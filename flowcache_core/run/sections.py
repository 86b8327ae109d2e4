"""A run as SkyReels-V2 was trained: every row runs all chunks of a section, and every frame sees every other.

It is the counterpart of `session.py` without a KV cache: in a bidirectional section the keys and values of every frame
change in every row, so nothing can be kept, and no policy decides as the run goes on. A plan can leave out whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import ClassVar

from torch import Tensor

from ..kv.cache import Branches
from ..models.adapter import ModelAdapter, require_bidirectional
from ..policies.planned import forecast_plans
from ..policies.protocol import CachePolicy, SectionPolicy
from ..sampling.chunk import Chunk
from ..sampling.plan import Plan, row_frames
from ..sampling.schedule import Section
from .report import RunReport


class SectionSession:
    """One film as `sections` over latents of h x w = `grid`. A context manager, as Session is.

    `plans`: one per section, by which rows are skipped; None until `settle` where the policy has a budget in seconds. Raises
    ValueError for a policy that would decide while the run goes on.
    """

    remembers: ClassVar[tuple[str, ...]] = ("plans", "evaluations", "report")
    plans: tuple[Plan, ...] | None

    def __init__(self, adapter: ModelAdapter, sections: Sequence[Section], grid: tuple[int, int], fps: int = 24,
                 policy: CachePolicy | None = None) -> None:  # fmt: skip
        last = sections[-1]
        self.adapter, self.fps, self.sections = require_bidirectional(adapter), fps, sections
        self.report = RunReport(last.index + last.schedule.chunks, last.schedule.steps)
        self._policy = require_whole_rows(policy)
        self._schedules = [section.schedule for section in sections]
        frame_tokens = adapter.tokens_per_frame(*grid)
        self._rows = {
            (row.active[0].index + section.index, row.active[0].step): (section.over_film(row), row_frames(section.schedule, row) * frame_tokens)
            for section in sections
            for row in section.schedule.rows
        }
        """By first active chunk and its step: a row with its chunks numbered over the film, and its tokens."""
        self.evaluations = 0
        self._text: dict[Branches, object] = {}
        self.plans = tuple(Plan.full(one, together=True) for one in self._schedules)
        if self._policy is not None:
            self.plans = None if self._policy.seconds else self._follow(self._policy.plans(self._schedules))

    def __enter__(self) -> SectionSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.report.close()
        except Exception:
            if error is None:  # as `Session.close`
                raise
        finally:
            self._text.clear()

    def forecast(self) -> tuple[str, ...]:
        """What is known before the first step, in sentences that the report repeats."""
        notes = forecast_plans(self._policy, self.plans or (), self._schedules) if self._policy else ()
        self.report.notes += notes
        return notes

    def settle(self, frame_s: float) -> tuple[Plan, ...]:
        """The plans of a budget in seconds, once a latent frame has been timed; the report says what follows from it."""
        assert self._policy is not None
        self.plans = self._follow(self._policy.plans(self._schedules, frame_s))
        self.report.notes = *forecast_plans(self._policy, self.plans, self._schedules, frame_s), *self.report.notes[1:]
        return self.plans

    def note(self, chunk: Chunk, clean: Tensor | None) -> None:
        """After every step: the clean latents now predicted for a chunk, or None where the plan skips the chunk's row."""
        row = self._rows.get((chunk.index, chunk.step))
        if row is not None:
            self.report.whole_row(*row, computed=clean is not None)

    def _follow(self, plans: tuple[Plan, ...]) -> tuple[Plan, ...]:
        for plan, section in zip(plans, self.sections, strict=True):
            self.report.follows(plan, section.index)
        return plans

    def denoise(self, x: Tensor, sigmas: Sequence[float], context: Tensor, branches: Branches, active: Sequence[Chunk] = ()) -> Tensor:
        """Velocity of a section. x: [len(branches) * films, C, F, h, w]; sigmas: the noise level of every latent frame; `active`: who moves."""
        self.evaluations += 1
        self.report.evaluates(x.device)
        if branches not in self._text:
            self._text[branches] = self.adapter.text(context)
        at = [(chunk.index, chunk.step) for chunk in active] if self.plans is not None else []
        with self.report.clock.measure("network", x.device, at):
            return self.adapter.whole(x, sigmas, self._text[branches], self.fps)


def require_whole_rows(policy: CachePolicy | None) -> SectionPolicy | None:
    """The policy, if it can do without a KV cache. Raises ValueError."""
    if policy is None or isinstance(policy, SectionPolicy):
        return policy
    raise ValueError(
        f"{policy.title} decides for every chunk by itself, but where every frame sees every other a row is computed whole or not at all: "
        "use a plan, or block-causal attention"
    )
