"""One film, from what is asked to what came of it. Read this first.

A `Run` is settled when it is made: plan, budget, memory, all before a weight moves. `sample` makes the film: it opens the session,
which decides, computes and commits, and hands a `ChunkDenoiser` around it to the loop over rows. Whoever evaluates the network, the host's
guider or `generate`, is given a turn for every evaluation, and calls `turn.denoise`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from ..kv.cache import Branches, KVSizes
from ..kv.compressor import Budget, Compressor
from ..kv.layout import Capacity, capacity
from ..models.adapter import ModelAdapter, OwnTexts, RowAdapter, reach_of, require_bidirectional, require_time, require_tokens
from ..models.family import Family
from ..models.numbers import finite, not_numbers
from ..policies.always import Always
from ..policies.planned import Planned
from ..policies.protocol import CachePolicy, Forecasts, PartPolicy, PlanPolicy, SignaturePolicy, TokenPolicy
from ..ranks.world import ALONE, Spread
from ..sampling.chunk import Chunk
from ..sampling.given import CLEAN, GivenNoise
from ..sampling.loop import sample_chunks, sample_sections
from ..sampling.noise import require_levels
from ..sampling.plan import Plan
from ..sampling.planner import most_in_part
from ..sampling.schedule import ChunkSchedule, Row, Section
from ..sampling.solvers import Solver, UniPC
from .footprint import Footprint, footprint
from .report import RunReport
from .resume import FileCheckpoints, NoFileCheckpoints, RunCheckpoints, Unreadable
from .sections import SectionSession, require_whole_rows
from .session import Session, plan_of
from .sink import beyond, returned
from .states import States
from .turn import Evaluate

SMALL = 1 << 19
"""Numbers between two layers that a chunk has at most, all films and branches together, where the chunks of a row are evaluated in one pass. Measured
on a processor (`bench row`)."""
Film = ChunkSchedule | tuple[Section, ...]
"""Chunk by chunk against a KV cache, or bidirectional sections."""


class Observer(Protocol):
    """Who is shown a run while it goes on."""

    def begin(self, report: RunReport, notes: Iterable[str]) -> None:
        """What is known before the first step, and again what follows from a timing."""
        ...

    def step(self, report: RunReport, chunk: Chunk, clean: Tensor | None, film: Tensor) -> None:
        """After every step: `clean` as it is now predicted for the chunk, None where the step was skipped."""
        ...


class NoObserver:
    def begin(self, report: RunReport, notes: Iterable[str]) -> None: ...

    def step(self, report: RunReport, chunk: Chunk, clean: Tensor | None, film: Tensor) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where a run takes place. `films`: side by side; `branches`: of guidance, each with its own text; `text_tokens`: of all of these together."""

    films: int = 1
    branches: int = 1
    text_tokens: int = 0
    weights: int = 0
    """Bytes of the network as it is stored."""
    itemsize: int = 4
    """Bytes of a number in the dtype of computation."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    alike: bool = False
    """Whether who evaluates does the same at every step, with one text a branch for all chunks: then chunks can be evaluated together."""


@dataclass(frozen=True)
class Run:
    """`latent`: channels, height and width of a latent frame; `sigmas`: the noise levels of a chunk, one more than steps.

    Raises ValueError, with the way out, for what cannot work.
    """

    family: Family
    adapter: ModelAdapter
    film: Film
    sigmas: tuple[float, ...]
    latent: tuple[int, int, int]
    place: Place = field(default_factory=Place)
    policy: CachePolicy | None = None
    compressor: Compressor | None = None
    fps: int = 24
    given: GivenNoise = CLEAN
    solver: Solver = field(default_factory=UniPC)
    scale: float = 1.0
    """Of guidance, where the family is guided inside the run."""
    recache: frozenset[int] = frozenset()
    """Chunks before which history is made anew, since the text changes with them."""
    spread: Spread = ALONE
    """The devices that share the film; adapter, compressor and place are this device's."""

    def __post_init__(self) -> None:
        require_levels(self.sigmas)
        self._require_latents()
        self.family.require_frames(self.family.frames.pixel(self.schedule.frames), self.schedule.chunk_frames)
        self.family.check(self.schedule)
        self.family.check_levels(self.sigmas)
        object.__setattr__(self, "solver", self.family.solving(self.solver))
        if self.sections:
            self._require_bidirectional()
        if self.family.guidance.inside:
            self._require_one_text()
        if self.compressor and not self.family.clean_pass:
            raise ValueError(
                f"a budget of history is scored while a finished chunk is passed through the network clean, and {self.family.title} does without "
                "that pass here: leave the budget out, or the pass on"
            )
        if self.recache:
            self._require_recache()
        self._require_abilities(self.policy)
        _ = self.budget, self.plan, self.held

    def _require_latents(self) -> None:
        channels = self.family.latents.channels
        if self.latent[0] != channels:
            raise ValueError(
                f"the latents have {self.latent[0]} channels, and those of {self.family.title} have {channels}: they are of another kind of model; "
                "use Empty AR Video Latent"
            )
        _, height, width = self.latent
        if min(self.adapter.token_grid(height, width)) < 1:
            pixels = self.family.latents.multiple
            raise ValueError(
                f"the latents are {height} x {width} cells, which is less than one patch of {self.family.title}: use Empty AR Video Latent, with at "
                f"least {pixels} x {pixels} pixels"
            )

    def _require_one_text(self) -> None:
        if self.place.branches != 1:
            raise ValueError(
                f"{self.family.title} is guided inside the run and takes one text, and {self.place.branches} were given: use a guider with the "
                "prompt alone (BasicGuider, or cfg 1)"
            )
        if self.sections or not isinstance(self.adapter, OwnTexts):
            what = "with bidirectional attention" if self.sections else "without the texts of its branches"
            raise ValueError(f"{self.family.title} is guided inside the run, which cannot be done {what}: use block-causal attention")

    def _require_bidirectional(self) -> None:
        require_bidirectional(self.adapter)
        policy = require_whole_rows(self.policy)
        if self.compressor:
            raise ValueError("a budget of history was given, but where every frame of a section sees every other there is no KV cache: leave it out")
        if isinstance(policy, Planned) and policy.exact is not None:
            policy.plans([section.schedule for section in self.sections])

    def _require_recache(self) -> None:
        if not (self.family.recache and self.family.clean_pass):
            raise ValueError(
                f"with recache finished chunks are shown to the network once more, clean, where the prompt changes, as LongLive does; "
                f"{self.family.title} was not trained for that: set recache to off"
            )

    def _require_abilities(self, policy: object) -> None:
        """What a policy asks of the network and of the number of steps."""
        if isinstance(policy, TokenPolicy | PartPolicy):
            require_tokens(self.adapter, policy.title, self.schedule.chunk_frames if isinstance(policy, TokenPolicy) else None)
        if isinstance(policy, SignaturePolicy) and policy.follows_time:
            require_time(self.adapter)
        if isinstance(policy, Forecasts):
            policy.check_run(len(self.sigmas) - 1)

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """() where the film is made chunk by chunk."""
        return () if isinstance(self.film, ChunkSchedule) else self.film

    @property
    def schedule(self) -> ChunkSchedule:
        """Of the film, or of its first section."""
        return self.film if isinstance(self.film, ChunkSchedule) else self.film[0].schedule

    @cached_property
    def branches(self) -> int:
        """Branches that the network runs here for one evaluation, those that the run makes itself too."""
        guidance = self.family.guidance
        return self._own(len(guidance.branches(self.scale))) if guidance.inside else self.place.branches

    @cached_property
    def cached_branches(self) -> int:
        """Those of them that have a KV cache."""
        return self._own(self._cached_by_all) if self.family.guidance.inside else self.branches

    @property
    def _cached_by_all(self) -> int:
        """By all devices, where guidance is inside."""
        guidance, by_token = self.family.guidance, isinstance(self.policy, TokenPolicy | PartPolicy)
        return len(guidance.branches(self.scale) if by_token else guidance.remembered(self.scale))

    def _own(self, branches: int) -> int:
        return len(range(branches)[self.spread.own(branches)])

    @cached_property
    def text_tokens(self) -> int:
        """Of all films and branches, those that the run makes itself too."""
        place, guidance = self.place, self.family.guidance
        if not guidance.inside or not isinstance(self.adapter, OwnTexts):
            return place.text_tokens
        return place.films * self.adapter.words(place.text_tokens // place.films, guidance.branches(self.scale))

    @cached_property
    def plan(self) -> Plan | None:
        """Of a film that is made chunk by chunk; None where it depends on a timing."""
        return plan_of(self.policy, self.schedule) if self.policy and not self.sections else Plan.full(self.schedule)

    @cached_property
    def budget(self) -> Budget | None:
        if self.compressor is None or self.sections:
            return None
        grid, place = self.latent[1:], self.place
        most = self.spread.most(self._cached_by_all) if self.family.guidance.inside else self.cached_branches
        batch = most * place.films
        return self.compressor.budget_for(self.adapter, self.schedule, grid, self.fps, batch, place.itemsize, place.device, self.family.frames.each)

    @cached_property
    def room(self) -> Capacity:
        """Slots of the KV cache."""
        slots = self.budget.slots if self.budget else None
        return capacity(self.schedule, self.adapter.tokens_per_frame(*self.latent[1:]), slots, reach_of(self.adapter))

    @cached_property
    def held(self) -> Footprint:
        """What the run holds at its peak, beside an evaluation."""
        place, bounded = self.place, None
        if self.budget:
            bounded = self.budget.bytes(KVSizes.of(self.adapter, place.films, self.room), self.cached_branches, place.itemsize)
        part = (self.plan or most_in_part(self.schedule)) if isinstance(self.policy, PartPolicy) and not self.sections else None
        held = footprint(
            self.adapter, self.schedule, self.latent, self.branches * place.films, self.text_tokens, place.itemsize,
            self.policy, place.weights, bounded, part, place.films, self.sections[-1].end if self.sections else None, self.cached_branches,
        )  # fmt: skip
        return replace(held, kv=0) if self.sections else held

    @cached_property
    def in_one_pass(self) -> bool:
        """Whether the chunks of a row that are computed go through the network together: where that is the same film, and a chunk alone is so small
        that it leaves the device with little to do."""
        policy, place, grid = self.policy, self.place, self.latent[1:]
        settled = policy is None or (isinstance(policy, Always | PlanPolicy) and not isinstance(policy, PartPolicy))
        plain = not (self.sections or self.compressor or self.recache or self.family.guidance.inside) and self.spread.place is None
        numbers = place.films * place.branches * self.schedule.chunk_frames * self.adapter.tokens_per_frame(*grid) * self.adapter.width
        return isinstance(self.adapter, RowAdapter) and settled and plain and place.alike and numbers <= SMALL

    @property
    def longest(self) -> int:
        """Latent frames of the longest evaluation."""
        if self.sections:
            return max(section.schedule.frames for section in self.sections)
        if self.in_one_pass:
            return max(sum(chunk.frames for chunk in row.active) for row in self.schedule.rows)
        return max(self.schedule.span(k)[1] for k in range(self.schedule.chunks))

    @property
    def steps(self) -> int:
        """Steps of all chunks together."""
        return sum(section.schedule.chunk_steps for section in self.sections) or self.schedule.chunk_steps

    @property
    def chunks(self) -> int:
        return self.sections[-1].index + self.sections[-1].schedule.chunks if self.sections else self.schedule.chunks

    @property
    def rows(self) -> tuple[tuple[Chunk, ...], ...]:
        """The chunks that come to their next step, row by row."""
        sections = self.sections or (Section(0, 0, self.schedule),)
        return tuple(tuple(map(section.in_film, row.active)) for section in sections for row in section.schedule.rows)

    def sample(self, x: Tensor, evaluate: Evaluate, observer: Observer | None = None, states: States | None = None) -> tuple[Tensor, RunReport]:
        """Noise with the given frames in it [films, C, F, h, w] -> latents of the film, and the report.

        `states`: where the state of the run is written every few chunks, and looked for when it begins.
        """
        make = self._by_section if self.sections else self._by_chunk
        checkpoints: RunCheckpoints = NoFileCheckpoints() if states is None else FileCheckpoints(states, self, x)
        try:
            latents, report = self._resumed_or_anew(partial(make, x, evaluate, observer or NoObserver(), checkpoints), checkpoints)
            self._require_complete(report)
            checkpoints.require(latents)
        except Exception as error:
            checkpoints.explain(error)
            raise
        checkpoints.finish()
        if self.compressor and self.compressor.sink and not self.sections and beyond(self.schedule):
            report.notes += returned(latents, self.schedule, self.compressor.sink)
            report.host_syncs += 1
        report.expected, report.pixels = self.held, self.family.frames
        report.went(self.rows, self.sigmas)
        return latents, report

    @staticmethod
    def _resumed_or_anew(make: Callable[[], tuple[Tensor, RunReport]], checkpoints: RunCheckpoints) -> tuple[Tensor, RunReport]:
        try:
            return make()
        except Unreadable as why:
            checkpoints.refuse(why)
        return make()  # behind the clause: while it lasts, the error keeps what the failed run held

    def _require_complete(self, report: RunReport) -> None:
        """Raises RuntimeError for a run that ended without all of its steps, or without an evaluation: its film is not one."""
        if report.steps_reported != self.steps or not report.tokens_computed:
            raise RuntimeError(
                f"the run ended after {report.steps_reported} of {self.steps} chunk-steps, with {report.tokens_computed} tokens computed: its "
                "latents are no film. Something stands between the sampler and the network: bypass the nodes that patch the model"
            )

    def _by_chunk(self, x: Tensor, evaluate: Evaluate, observer: Observer, checkpoints: RunCheckpoints) -> tuple[Tensor, RunReport]:
        grid, noise = (x.shape[3], x.shape[4]), self.family.noise
        session = Session(
            self.adapter, self.schedule, self.sigmas, grid, x.shape[0], self.policy, self.fps, self.given.sigma, self.budget, noise.commit,
            self.plan, self.room,
        )  # fmt: skip
        with session:
            observer.begin(session.report, (*session.forecast(x.device), *checkpoints.attach(session, observer)))
            denoiser = ChunkDenoiser(session, self, evaluate, observer)
            return sample_chunks(denoiser, x, self.schedule, self.sigmas, self.solver, self.given, checkpoints), session.report

    def _by_section(self, x: Tensor, evaluate: Evaluate, observer: Observer, checkpoints: RunCheckpoints) -> tuple[Tensor, RunReport]:
        with SectionSession(self.adapter, self.sections, (x.shape[3], x.shape[4]), self.fps, self.policy) as session:
            observer.begin(session.report, (*session.forecast(), *checkpoints.attach(session, observer)))
            denoiser = FilmDenoiser(session, evaluate, observer)
            return sample_sections(denoiser, x, self.sections, self.sigmas, self.solver, self.given, checkpoints), session.report


def through_session(session: Session | SectionSession, evaluate: Callable[[], Tensor]) -> Tensor:
    """What an evaluation gives. Raises RuntimeError where it did not come by the session: the film would be of something else, and nothing
    counted; and for a first one that is not made of numbers, with the weight that is not. To know that, the host waits once a run."""
    before = session.evaluations
    velocity = evaluate()
    if session.evaluations == before:
        raise RuntimeError(
            "an evaluation of the network did not come by the session of this run: something stands between the sampler and the network, such as a "
            "compiled or replaced model; load the model anew, without it"
        )
    if before == 0:
        session.report.host_syncs += 1
        if not finite(velocity):
            raise RuntimeError(not_numbers(getattr(session.adapter, "network", None), velocity.dtype))
    return velocity


@dataclass(frozen=True)
class SeveralChunks:
    """What turns of several chunks have in common."""

    chunks: Sequence[Chunk]
    start: int

    @property
    def parts(self) -> tuple[tuple[int, slice], ...]:
        places = ((chunk.step, chunk.start - self.start, chunk.frames) for chunk in self.chunks)
        return tuple((step, slice(begin, begin + frames)) for step, begin, frames in places)

    @property
    def levels(self) -> tuple[float, ...]:
        return ()

    @property
    def index(self) -> int:
        return self.chunks[0].index

    @property
    def step(self) -> int:
        return min(chunk.step for chunk in self.chunks)

    @property
    def committing(self) -> bool:
        return False

    @property
    def reads(self) -> int:
        return self.index

    def unwritten(self, branches: Iterable[Hashable]) -> tuple[Hashable, ...]:
        return ()


@dataclass(frozen=True)
class RowTurn(SeveralChunks):
    """Chunks of a row in one pass: what is evaluated are their latents, one behind the other."""

    session: Session

    def denoise(self, x: Tensor, context: Tensor, branches: Branches, blocks: Hashable = None, texts: Hashable = None) -> Tensor:
        return self.session.denoise_row(x, self.chunks, context, branches, texts)


@dataclass(frozen=True)
class ChunkTurn:
    session: Session
    chunk: Chunk
    run: Run

    @property
    def index(self) -> int:
        return self.chunk.index

    @property
    def step(self) -> int:
        return self.chunk.step

    @property
    def committing(self) -> bool:
        return self.chunk.committing

    @property
    def reads(self) -> int:
        return max(self.chunk.index, self.session.reads)

    @property
    def start(self) -> int:
        return self.chunk.start

    @property
    def parts(self) -> tuple[tuple[int, slice], ...]:
        return ((self.chunk.step, slice(0, self.chunk.frames)),)

    @property
    def levels(self) -> tuple[float, ...]:
        return ()

    def unwritten(self, branches: Iterable[Hashable]) -> tuple[Hashable, ...]:
        mine = self.committing and not self.run.family.guidance.inside
        return self.session.unwritten(self.chunk, branches) if mine else ()

    def denoise(self, x: Tensor, context: Tensor, branches: Branches, blocks: Hashable = None, texts: Hashable = None) -> Tensor:
        guidance, scale, level = self.run.family.guidance, self.run.scale, self.session.level(self.chunk)
        if not guidance.inside:
            return self.session.denoise(x, self.chunk, context, branches, blocks, texts)
        every, remembered, spread = guidance.branches(scale), guidance.remembered(scale), self.run.spread
        self.session.guide(every, remembered, every[spread.own(len(every))])
        needed = every if self.session.in_part(self.chunk.index) else guidance.needed(scale, level)
        names = remembered if self.chunk.committing else needed
        mine = names[spread.own(len(names))]
        own = self.session.denoise(x.repeat(max(len(mine), 1), 1, 1, 1, 1), self.chunk, context, mine, blocks, texts)
        if self.chunk.committing:
            return own[: len(x)] if mine else x
        return guidance.combine(spread.joined(own, len(names), len(x)).chunk(len(names)), scale, level)


@dataclass(frozen=True)
class ChunkDenoiser:
    """The loop's way to session, evaluation and observer."""

    session: Session
    run: Run
    evaluate: Evaluate
    observer: Observer

    @property
    def plan(self) -> Plan | None:
        return self.session.plan

    def settle(self, frame_s: float) -> Plan:
        before, plan = self.session.report.notes, self.session.settle(self.run.spread.agreed(frame_s))
        self.observer.begin(self.session.report, [line for line in self.session.report.notes if line not in before])
        return plan

    def anew(self, chunk: Chunk) -> Sequence[Chunk]:
        return self.session.restart(chunk) if chunk.index in self.run.recache else ()

    def begin_row(self, chunks: Sequence[Chunk], film: Tensor) -> None:
        self.session.begin_row(chunks, film)

    def predict(self, x: Tensor, chunk: Chunk) -> Tensor:
        if chunk.committing and chunk.index >= self.run.schedule.given and not self.run.family.clean_pass:
            return x
        return through_session(self.session, lambda: self.evaluate(ChunkTurn(self.session, chunk, self.run), x))

    def together(self, chunks: Sequence[Chunk]) -> bool:
        return len(chunks) > 1 and self.run.in_one_pass

    def predict_row(self, parts: Sequence[Tensor], chunks: Sequence[Chunk]) -> Sequence[Tensor]:
        turn, x = RowTurn(chunks, chunks[0].start, self.session), torch.cat(list(parts), 2)
        return through_session(self.session, lambda: self.evaluate(turn, x)).split([chunk.frames for chunk in chunks], 2)

    def choose(self, chunk: Chunk, rate: Tensor) -> Tensor:
        return self.session.choose(chunk, rate)

    def note(self, chunk: Chunk, clean: Tensor | None, film: Tensor) -> None:
        self.session.note(chunk, clean)
        self.observer.step(self.session.report, chunk, clean, film)

    def commit(self, chunk: Chunk) -> None:
        self.session.commit(chunk)


@dataclass(frozen=True)
class SectionTurn(SeveralChunks):
    """A row of a section. `chunks`: those that move; `of_frames`: the noise level of every latent frame."""

    session: SectionSession
    of_frames: tuple[float, ...]

    @property
    def levels(self) -> tuple[float, ...]:
        return self.of_frames if len(set(self.of_frames)) > 1 else ()

    def denoise(self, x: Tensor, context: Tensor, branches: Branches, blocks: Hashable = None, texts: Hashable = None) -> Tensor:
        return self.session.denoise(x, self.of_frames, context, branches, self.chunks)


@dataclass(frozen=True)
class FilmDenoiser:
    """As `ChunkDenoiser`, for bidirectional sections."""

    session: SectionSession
    evaluate: Evaluate
    observer: Observer

    @property
    def plans(self) -> Sequence[Plan] | None:
        return self.session.plans

    def settle(self, frame_s: float) -> Sequence[Plan]:
        before, plans = self.session.report.notes, self.session.settle(frame_s)
        self.observer.begin(self.session.report, [line for line in self.session.report.notes if line not in before])
        return plans

    def predict(self, x: Tensor, levels: tuple[float, ...], row: Row, start: int) -> Tensor:
        return through_session(self.session, lambda: self.evaluate(SectionTurn(row.active, start, self.session, levels), x))

    def note(self, chunk: Chunk, clean: Tensor | None, film: Tensor) -> None:
        self.session.note(chunk, clean)
        self.observer.step(self.session.report, chunk, clean, film)
