"""Which chunk is computed in which row: known before the run, and nothing but data.

Between two computed steps nothing happens to a chunk: its latents wait, and the solver then integrates over the whole gap
(`path.py`, `solvers.py`). A plan is *in step* when in every row in which a chunk is computed all active chunks that it attends to
are computed too. A chunk that is out of step meets keys and values at a higher noise level than it was trained to see beside
its own, as if `ar_step` had changed in mid-run; that, and not what is skipped, is the larger part of the error of rules that let
every chunk decide for itself. `planner.py` makes plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

from ..untrusted import parsed, short
from .chunk import Chunk
from .schedule import ChunkSchedule, Row

FORMAT = "flowcache-plan-1"
TEXT = 16 << 20
"""Characters of a report that are read; the plan of an hour of film takes far fewer."""


@dataclass(frozen=True)
class Plan:
    """`computed[k]`: the steps of chunk k at which the network runs, ascending; () for a chunk of given frames.

    `together`: every row computes all of its active chunks or none, as bidirectional attention needs it. `partial[k]`: of the
    steps of chunk k, those at which only the share `part` of its tokens is computed; () where there are none at all. The others wait.
    """

    steps: int
    computed: tuple[tuple[int, ...], ...]
    together: bool = False
    partial: tuple[tuple[int, ...], ...] = ()
    part: float = 1.0

    @classmethod
    def full(cls, schedule: ChunkSchedule, together: bool = False) -> Plan:
        """Every chunk at every step: the uncached run."""
        every = tuple(range(schedule.steps))
        return cls(schedule.steps, tuple(() if k < schedule.given else every for k in range(schedule.chunks)), together)

    @property
    def is_full(self) -> bool:
        return all(len(steps) in (0, self.steps) for steps in self.computed) and not any(self.partial)

    def computes(self, chunk: Chunk) -> bool:
        """Whether the chunk, or part of it, is computed at this step."""
        return chunk.step in self._sets[chunk.index]

    def computes_part(self, chunk: Chunk) -> bool:
        return self.is_partial(chunk.index) and chunk.step in self.partial[chunk.index]

    def is_partial(self, index: int) -> bool:
        """Whether any step of the chunk is computed in part."""
        return bool(self.partial and self.partial[index])

    def tokens_of(self, tokens: int) -> int:
        """Of `tokens`, those that a step in part computes."""
        return max(int(self.part * tokens + 1e-6), 1)

    def check(self, schedule: ChunkSchedule) -> Plan:
        """The plan itself. Raises ValueError, with the place, where it does not belong to the schedule or is not in step."""
        given, chunks = schedule.given, schedule.chunks
        if (self.steps, len(self.computed)) != (schedule.steps, chunks):
            raise ValueError(
                f"the plan is for {len(self.computed)} chunks of {self.steps} steps, this run has {chunks} chunks of {schedule.steps} steps: "
                "make a plan for this run, or set the run's length and steps to those of the plan"
            )
        for k, steps in enumerate(self.computed):
            if k < given:
                if steps:
                    raise ValueError(f"the plan computes chunk {k + 1}, but its frames are given: a plan for this run leaves the first {given} empty")
            elif not steps or list(steps) != sorted({s for s in steps if 0 <= s < self.steps}):
                raise ValueError(
                    f"the plan's steps of chunk {k + 1} must rise from 0 or more to at most {self.steps - 1}: they are {short(list(steps))}"
                )
        self._check_partial()
        for number, row in enumerate(schedule.rows):
            for chunk in row.active:
                if not self.computes(chunk):
                    continue
                for other in attended(schedule, row, chunk, self.together):
                    if not self.computes(other):
                        raise ValueError(
                            f"the plan is out of step: row {number + 1} computes chunk {chunk.index + 1} at step {chunk.step + 1}, but not chunk "
                            f"{other.index + 1} (step {other.step + 1}), which it attends to; was it made for another ar_step or window?"
                        )
        return self

    def _check_partial(self) -> None:
        if not any(self.partial) and len(self.partial) in (0, len(self.computed)):
            return
        if self.together:
            raise ValueError("the plan computes steps in part, which bidirectional attention cannot: use block-causal attention")
        if not 0 < self.part <= 1 or len(self.partial) != len(self.computed):
            raise ValueError(f"a plan that computes steps in part needs a part above 0 and at most 1 (it is {self.part}), and a list per chunk")
        for k, (steps, some) in enumerate(zip(self.computed, self.partial, strict=True)):
            if wrong := sorted(set(some) - set(steps[2:-1])):
                raise ValueError(
                    f"the plan computes chunk {k + 1} in part at steps {wrong}, counted from 0: only computed steps can be in part, and neither the "
                    "first two of a chunk nor its last"
                )

    def frames_computed(self, schedule: ChunkSchedule) -> float:
        """Latent frames that run through the network, clean passes of finished chunks included; of a step in part, that part."""
        if self.together:
            rows = (row for row in schedule.rows if any(self.computes(chunk) for chunk in row.active))
            return sum(row_frames(schedule, row) for row in rows)
        spared = sum(len(some) * schedule.span(k)[1] for k, some in enumerate(self.partial)) * (1 - self.part)
        return commit_frames(schedule) + sum(len(steps) * schedule.span(k)[1] for k, steps in enumerate(self.computed)) - spared

    def share(self, schedule: ChunkSchedule) -> float:
        """Of all network tokens of the uncached run, clean passes included, the part that is computed."""
        return self.frames_computed(schedule) / Plan.full(schedule, self.together).frames_computed(schedule)

    @cached_property
    def _sets(self) -> tuple[frozenset[int], ...]:
        return tuple(frozenset(steps) for steps in self.computed)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        whole = {"format": FORMAT, "steps": self.steps, "together": self.together, "computed": [list(steps) for steps in self.computed]}
        return whole | {"partial": [list(some) for some in self.partial], "part": self.part} if any(self.partial) else whole

    @classmethod
    def from_dict(cls, values: object) -> Plan:
        """Raises ValueError for what is no plan."""
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError(f'this is no plan: a plan is a JSON object with "format": "{FORMAT}", as Cache Report writes it')
        steps, computed, together = values.get("steps"), values.get("computed"), values.get("together", False)
        partial, part = values.get("partial", []), values.get("part", 1.0)
        if type(steps) is not int or steps < 1 or not isinstance(together, bool) or not _is_lists(computed):
            raise ValueError('the plan is damaged: "steps" must be a number from 1 on, "computed" a list of lists of whole numbers')
        if not _is_lists(partial) or type(part) not in (int, float) or not 0 < part <= 1:
            raise ValueError('the plan is damaged: "partial" must be a list of lists of whole numbers, and "part" a number above 0 and at most 1')
        if partial and len(partial) != len(computed):
            raise ValueError(f'the plan is damaged: "partial" has {len(partial)} lists and "computed" {len(computed)}, and each has one per chunk')
        return cls(steps, tuple(map(tuple, computed)), together, tuple(map(tuple, partial)), float(part))


def _is_lists(value: object) -> TypeGuard[list[list[int]]]:
    return isinstance(value, list) and all(isinstance(one, list) and all(type(s) is int for s in one) for one in value)


def read_plan(text: str) -> Plan | tuple[Plan, ...]:
    """A plan from JSON, or of bidirectional sections one each: by itself, or within a whole report. Raises ValueError for what is none."""
    try:
        values = parsed(text, TEXT)
    except ValueError as wrong:
        raise ValueError(f'the plan is no JSON ({wrong}): give it what Cache Report writes as json, whole or its part "plan" alone') from None
    if isinstance(values, Mapping) and "format" not in values and "plan" in values:
        values = values["plan"]
        if values is None:
            raise ValueError("this report is of a run without a plan: take that of a run under a preset which plans, or under target seconds")
    return tuple(map(Plan.from_dict, values)) if isinstance(values, list) and values else Plan.from_dict(values)


def attended(schedule: ChunkSchedule, row: Row, chunk: Chunk, together: bool = False) -> Iterator[Chunk]:
    """The other active chunks of a row that a chunk attends to: the earlier ones within its horizon, or all in a bidirectional section."""
    oldest = schedule.oldest(chunk.index)
    for other in row.active:
        if other.index != chunk.index and (together or oldest <= other.index < chunk.index):
            yield other


def commit_frames(schedule: ChunkSchedule) -> int:
    """Latent frames that pass through the network once more, clean: of every chunk but the last."""
    return schedule.span(schedule.chunks - 1)[0]


def row_frames(schedule: ChunkSchedule, row: Row) -> int:
    """Latent frames of the section that a bidirectional row runs."""
    return sum(schedule.span(row.last - 1)) - schedule.span(row.first)[0]
