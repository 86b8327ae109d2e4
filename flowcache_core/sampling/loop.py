"""The loop over rows and chunks. It knows neither networks nor policies, only the run: a `Denoiser`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .chunk import Chunk
from .given import CLEAN, GivenNoise
from .plan import Plan
from .schedule import ChunkSchedule, Row, Section
from .solvers import Solver
from .walk import Walk, walks

TICK = 1e-9


class Denoiser(Protocol):
    """The run as the loop over chunks sees it."""

    @property
    def plan(self) -> Plan | None:
        """Which steps are computed; None where that depends on a timing: then `settle` is asked right before the rows."""
        ...

    def settle(self, frame_s: float) -> Plan:
        """`frame_s`: seconds that a latent frame takes, on average over the uncached run."""
        ...

    def anew(self, chunk: Chunk) -> Sequence[Chunk]:
        """Before a chunk's first step -> finished chunks that history is made of anew, oldest first: they are shown once more and committed."""
        ...

    def begin_row(self, chunks: Sequence[Chunk], film: Tensor) -> None:
        """Before a row: the chunks that come to their next step, of which none has moved yet, and the latents of the whole film."""
        ...

    def predict(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Latents of the chunk [B, C, F, h, w] -> velocity, same shape; in the commit pass the result is not used."""
        ...

    def together(self, chunks: Sequence[Chunk]) -> bool:
        """Whether these chunks of a row go through the network in one pass."""
        ...

    def predict_row(self, parts: Sequence[Tensor], chunks: Sequence[Chunk]) -> Sequence[Tensor]:
        """`predict` of each, where they are `together`. A chunk sees those before it, as it does when they come one after the other."""
        ...

    def choose(self, chunk: Chunk, rate: Tensor) -> Tensor:
        """Which latent cells are computed at a step that the plan computes in part, before `predict` is asked: as in `walk.Choose`."""
        ...

    def note(self, chunk: Chunk, clean: Tensor | None, film: Tensor) -> None:
        """After every step: the clean latents predicted for the chunk, or None where its step was skipped; latents of the whole film."""
        ...

    def commit(self, chunk: Chunk) -> None:
        """The chunk is finished, and its clean latents were shown to the network where later chunks look back on them."""
        ...


@dataclass
class LoopState:
    """Where a loop stands between two rows. `film`: latents [B, C, F, h, w]; `section` and `row`: those that come next; `walk_of`: by chunk."""

    film: Tensor
    rng: torch.Generator
    section: int = 0
    row: int = 0
    walk_of: dict[int, Walk] = field(default_factory=dict)
    reached: int = 0
    """Latent frames from the first on of which any has moved; the others are as they were handed over."""

    remembers: ClassVar[tuple[str, ...]] = ("section", "row", "rng", "walk_of", "moved")

    @property
    def moved(self) -> Tensor:
        """Of the film, the frames that were reached; set, they are put in place."""
        return self.film[:, :, : self.reached]

    @moved.setter
    def moved(self, frames: Tensor) -> None:
        """Raises ValueError for latents of another size than the film's."""
        if frames.shape[:2] != self.film.shape[:2] or frames.shape[3:] != self.film.shape[3:]:
            raise ValueError(f"latents of {tuple(frames.shape)} for a film of {tuple(self.film.shape)}")
        self.reached = frames.shape[2]
        self.film[:, :, : self.reached].copy_(frames)

    def passed(self, row: Row, start: int = 0) -> int:
        """A row was gone through, in a section that begins at latent frame `start` -> how many chunks it finished."""
        self.row += 1
        self.reached = max(self.reached, *(start + chunk.start + chunk.frames for chunk in row.active))
        return sum(chunk.step == chunk.steps - 1 for chunk in row.active)


class Checkpoints(Protocol):
    """Who keeps what a run has reached, and puts a later run there."""

    @property
    def section(self) -> int | None:
        """Where the run goes on from an earlier one, the section in which that one stood, 0 where there are no sections; None at the beginning."""
        ...

    def restore(self, state: LoopState) -> None:
        """Before the first row: puts the loop where the earlier run stood. Its walks are those of the section's beginning."""
        ...

    def after_row(self, state: LoopState, finished: int) -> None:
        """After every row but the last of the film. `finished`: chunks that came to their end in the row."""
        ...


class NoCheckpoints:
    section = None

    def restore(self, state: LoopState) -> None: ...

    def after_row(self, state: LoopState, finished: int) -> None: ...


NO_CHECKPOINTS = NoCheckpoints()


def sample_chunks(run: Denoiser, noise: Tensor, schedule: ChunkSchedule, sigmas: Sequence[float], solver: Solver,
                  given: GivenNoise = CLEAN, checkpoints: Checkpoints = NO_CHECKPOINTS) -> Tensor:  # fmt: skip
    """Denoise a film [B, C, F, h, w] chunk by chunk; only active chunks run, and of their steps those of the plan.

    At the steps that the plan computes in part, velocity counts at the chosen cells alone; the others wait (`walk.py`).

    A finished chunk that later chunks look back on is passed through the network once more, clean, so that
    its keys and values are those of the finished latent; with that, skipping idle chunks is exact. The frames of the
    schedule's prefix and suffix are taken from `noise` as they are, as finished latents, and never written; the network is
    shown the prefix once, as `given` has it.
    """
    state = LoopState(noise.clone(), given.start())
    x = state.film
    if checkpoints.section is None:
        _show_prefix(run, x, schedule, given, state.rng)
    plan = run.plan or run.settle(_timed(run, x, schedule))
    state.walk_of = walks(schedule, plan, tuple(sigmas), solver, given.rng)
    checkpoints.restore(state)
    for row in schedule.rows[state.row :]:
        _go_through(run, x, schedule, row, plan, state.walk_of)
        finished = state.passed(row)
        if state.row < len(schedule.rows):
            checkpoints.after_row(state, finished)
    return x


def _show_prefix(run: Denoiser, x: Tensor, schedule: ChunkSchedule, given: GivenNoise, rng: torch.Generator) -> None:
    for index in range(schedule.given):
        before = schedule.at(index, schedule.steps)
        run.predict(given.show(_part(x, before), rng), before)
        run.commit(before)


def _go_through(run: Denoiser, x: Tensor, schedule: ChunkSchedule, row: Row, plan: Plan, walk_of: dict[int, Walk]) -> None:
    """A row: every active chunk by a step, in place; those that are finished become history."""
    run.begin_row(row.active, x)
    velocities = _together(run, x, [chunk for chunk in row.active if plan.computes(chunk)], walk_of)
    for chunk in row.active:
        clean = None
        if chunk.step == 0:
            _recache(run, x, chunk)
        if plan.computes(chunk):
            walk = walk_of[chunk.index]
            chosen = run.choose(chunk, walk.rate(chunk.step)) if plan.computes_part(chunk) else None
            arrived = _arrive(x, chunk, walk)
            clean = _move(x, chunk, arrived, velocities.pop(chunk) if velocities else run.predict(arrived, chunk), walk, chosen)
        run.note(chunk, clean, x)
    for chunk in row.active:
        if chunk.step != chunk.steps - 1:
            continue
        if chunk.index < schedule.chunks - 1:
            run.predict(_part(x, chunk), replace(chunk, step=chunk.steps))
        run.commit(chunk)
        del walk_of[chunk.index]


def _together(run: Denoiser, x: Tensor, chunks: Sequence[Chunk], walk_of: dict[int, Walk]) -> dict[Chunk, Tensor]:
    """Velocities of chunks that go through the network in one pass; {} where they come one after the other."""
    if not run.together(chunks):
        return {}
    return dict(zip(chunks, run.predict_row([_arrive(x, chunk, walk_of[chunk.index]) for chunk in chunks], chunks), strict=True))


def _recache(run: Denoiser, x: Tensor, chunk: Chunk) -> None:
    for before in run.anew(chunk):
        run.predict(_part(x, before), before)
        run.commit(before)


def _timed(run: Denoiser, x: Tensor, schedule: ChunkSchedule) -> float:
    """`frame_seconds`, and less where chunks go through the network in one pass: as much less as for the first chunks at their first step."""

    def evaluate(chunk: Chunk) -> Tensor:
        return run.predict(_part(x, chunk), chunk)

    mine, first = frame_seconds(schedule, evaluate, x.device), schedule.rows[0].active[0].index
    fullest = max((row.active for row in schedule.rows if row.active[0].index == first), key=len)
    chunks = [schedule.at(chunk.index, 0) for chunk in fullest]
    if not run.together(chunks):
        return mine

    def evaluate_all(chunk: Chunk) -> Sequence[Tensor]:
        return run.predict_row([_part(x, one) for one in chunks], chunks)

    evaluate_all(chunks[0])
    return mine * seconds_of(evaluate_all, chunks[0], x.device) / sum(seconds_of(evaluate, chunk, x.device) for chunk in chunks)


def frame_seconds(schedule: ChunkSchedule, evaluate: Callable[[Chunk], object], device: torch.device) -> float:
    """Seconds that a latent frame takes on average over the uncached run, by one warm-up and one or two timed evaluations.

    A frame takes the longer the more frames its chunk sees; how much longer is read off the second chunk, where both are ever
    denoised at the same time. It counts as no less than nothing, and no more than in proportion.
    """
    first = schedule.rows[0].active[0]
    evaluate(first)
    mine = seconds_of(evaluate, first, device) / first.frames
    beside = schedule.at(first.index + 1, 0) if first.index + 1 < schedule.chunks else None
    if beside is None or not any({first.index, beside.index} <= {chunk.index for chunk in row.active} for row in schedule.rows):
        return mine
    theirs = seconds_of(evaluate, beside, device) / beside.frames
    chunks = range(schedule.given, schedule.chunks)
    frames, seen = sum(schedule.span(k)[1] for k in chunks), {k: sum(schedule.span(k)) - schedule.span(schedule.oldest(k))[0] for k in chunks}
    per_seen = min(max((theirs - mine) / max(seen[beside.index] - seen[first.index], 1), 0.0), mine / seen[first.index])
    return mine + per_seen * (sum(schedule.span(k)[1] * seen[k] for k in chunks) / frames - seen[first.index])


def seconds_of(evaluate: Callable[[Chunk], object], chunk: Chunk, device: torch.device) -> float:
    """What one evaluation takes, to its end on the device; `TICK` where the clock says that it took no time or less."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begin = now()
    evaluate(chunk)
    return max(now() - begin, TICK)


def _part(x: Tensor, chunk: Chunk) -> Tensor:
    """A chunk's latents, as a copy: solver and session may keep it while the film moves on."""
    return x[:, :, chunk.start : chunk.start + chunk.frames].clone()


def _arrive(x: Tensor, chunk: Chunk, walk: Walk) -> Tensor:
    """The chunk's latents at the noise level of its step; given frames as they are."""
    part, own = _part(x, chunk), chunk.moving
    arrived = walk.arrive(part, chunk.step)
    return torch.cat([part[:, :, : own.start], arrived[:, :, own], part[:, :, own.stop :]], 2) if chunk.held or chunk.led else arrived


def _move(x: Tensor, chunk: Chunk, arrived: Tensor, velocity: Tensor, walk: Walk, chosen: Tensor | None = None) -> Tensor:
    """One step of the chunk's own frames of `x`, in place -> the clean latents it predicts; given frames stay."""
    own = chunk.moving
    if chunk.held or chunk.led:
        velocity = velocity.clone()
        velocity[:, :, : own.start] = 0
        velocity[:, :, own.stop :] = 0
    moved, clean = walk.step(_part(x, chunk), arrived, velocity, chunk.step, chosen)
    x[:, :, chunk.start + own.start : chunk.start + own.stop] = moved[:, :, own]
    return clean


PredictSection = Callable[[Tensor, tuple[float, ...], Row], Tensor]
"""(latents of the section [B, C, F, h, w], noise level of every frame, row) -> velocity, same shape."""
Note = Callable[[Chunk, Tensor | None, Tensor], None]
"""As `Denoiser.note`."""


class SectionDenoiser(Protocol):
    """The run as the loop over bidirectional sections sees it; chunks are numbered over the film."""

    @property
    def plans(self) -> Sequence[Plan] | None:
        """One for each section; None where they depend on a timing."""
        ...

    def settle(self, frame_s: float) -> Sequence[Plan]: ...

    def predict(self, x: Tensor, levels: tuple[float, ...], row: Row, start: int) -> Tensor:
        """As `PredictSection`, with chunks as those of the film, where x begins at latent frame `start`."""
        ...

    def note(self, chunk: Chunk, clean: Tensor | None, film: Tensor) -> None: ...


def _go_through_section(predict: PredictSection, x: Tensor, schedule: ChunkSchedule, levels: tuple[float, ...], row: Row, plan: Plan,
                       walk_of: dict[int, Walk], note: Note, given: GivenNoise, rng: torch.Generator) -> None:  # fmt: skip
    """A row of a section, in place."""
    if not any(plan.computes(chunk) for chunk in row.active):
        for chunk in row.active:
            note(chunk, None, x)
        return
    begin = schedule.span(row.first)[0]
    velocity = predict(*_shown(x, schedule, row, (levels[0], *levels), given, rng), row)
    for chunk in row.active:
        mine = velocity[:, :, chunk.start - begin : chunk.start - begin + chunk.frames]
        clean = _move(x, chunk, _part(x, chunk), mine, walk_of[chunk.index]) if plan.computes(chunk) else None
        note(chunk, clean, x)


def _shown(x: Tensor, schedule: ChunkSchedule, row: Row, level_of: tuple[float, ...], given: GivenNoise,
            rng: torch.Generator) -> tuple[Tensor, tuple[float, ...]]:  # fmt: skip
    """What the network is shown in a row: latents [B, C, F, h, w] of the section's frames, and the noise level of every frame.

    `level_of`: by `Row.indices`, the level of a chunk.
    """
    begin, end = schedule.span(row.first)[0], sum(schedule.span(row.last - 1))
    per_frame = [level_of[row.indices[k]] for k in range(row.first, row.last) for _ in range(schedule.span(k)[1])]
    seen = x[:, :, begin:end].clone()
    if begin < schedule.prefix:
        per_frame[: schedule.prefix - begin] = [given.sigma] * (schedule.prefix - begin)
        seen[:, :, : schedule.prefix - begin] = given.show(seen[:, :, : schedule.prefix - begin], rng)
    if end == schedule.frames and schedule.suffix:
        per_frame[-schedule.suffix :] = [0.0] * schedule.suffix
    return seen, tuple(per_frame)


def sample_sections(run: SectionDenoiser, noise: Tensor, sections: Sequence[Section], sigmas: Sequence[float], solver: Solver,
                   given: GivenNoise = CLEAN, checkpoints: Checkpoints = NO_CHECKPOINTS) -> Tensor:  # fmt: skip
    """A film of any length [B, C, F, h, w] as published: section after section, each given the last frames of the one before.

    Every row of the plan runs all chunks of the section, begun or not, and moves the active ones. Frames of prefix and suffix are taken
    from `noise` and never written; in every row the network is shown the prefix with fresh light noise, at that noise level, and the
    suffix clean.
    """
    levels, state = tuple(sigmas), LoopState(noise.clone(), given.start(), checkpoints.section or 0)
    film = state.film
    plans = run.plans or run.settle(_section_seconds(run, film, sections[0], levels, given))

    def begin() -> None:
        state.walk_of = walks(sections[state.section].schedule, plans[state.section], levels, solver, given.rng)

    begin()
    checkpoints.restore(state)
    while state.section < len(sections):
        section, plan = sections[state.section], plans[state.section]

        def predict(part: Tensor, levels: tuple[float, ...], row: Row, section: Section = section) -> Tensor:
            return run.predict(part, levels, section.over_film(row), section.start + section.schedule.span(row.first)[0])

        def note(chunk: Chunk, clean: Tensor | None, x: Tensor, section: Section = section) -> None:
            film[:, :, section.start : section.end] = x
            run.note(section.in_film(chunk), clean, film)

        x, rows = film[:, :, section.start : section.end].clone(), section.schedule.rows
        for row in rows[state.row :]:
            _go_through_section(predict, x, section.schedule, levels, row, plan, state.walk_of, note, given, state.rng)
            finished = state.passed(row, section.start)
            if state.row == len(rows):
                state.section, state.row = state.section + 1, 0
                if state.section == len(sections):
                    break
                begin()
            checkpoints.after_row(state, finished)
    return film


def _section_seconds(run: SectionDenoiser, film: Tensor, section: Section, levels: tuple[float, ...], given: GivenNoise) -> float:
    """Seconds that a latent frame takes in the first section's first row, by one warm-up and one timed evaluation."""
    row = section.schedule.rows[0]
    seen, per_frame = _shown(film[:, :, section.start : section.end], section.schedule, row, (levels[0], *levels), given, given.start())
    start = section.schedule.span(row.first)[0]
    run.predict(seen, per_frame, row, start)
    return seconds_of(lambda chunk: run.predict(seen, per_frame, row, start), row.active[0], film.device) / seen.shape[2]
