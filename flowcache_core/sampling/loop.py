"""The loop over rows and chunks. It knows neither networks nor policies: `predict` returns the velocity of one chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .chunk import Chunk
from .given import CLEAN, GivenNoise
from .plan import Plan
from .schedule import ChunkSchedule, Row, Window
from .solvers import Solver
from .walk import Choose, Walk, walks

Predict = Callable[[Tensor, Chunk], Tensor]
"""(latents of the chunk [B, C, F, h, w], chunk) -> velocity, same shape; in the commit pass the result is not used."""
OnStep = Callable[[Chunk, Tensor | None, Tensor], None]
"""(chunk, predicted clean latents of the chunk or None where its step was skipped, latents of the whole film) after every step."""

MakePlan = Callable[[float], Plan]
"""Seconds that a latent frame takes, on average over the uncached run -> a plan, where the plan depends on that."""
MakePlans = Callable[[float], Sequence[Plan]]
"""The same -> one plan for each window."""


def sample_chunks(predict: Predict, noise: Tensor, schedule: ChunkSchedule, sigmas: Sequence[float], solver: Solver,
                  commit: Callable[[Chunk], None] = lambda chunk: None, on_step: OnStep | None = None,
                  given: GivenNoise = CLEAN, plan: Plan | MakePlan | None = None, choose: Choose | None = None) -> Tensor:  # fmt: skip
    """Denoise a film [B, C, F, h, w] chunk by chunk; only active chunks run, and of their steps those of the `plan` (None: all).

    At the steps that the plan computes in part, `choose` is asked for the latent cells before `predict` is, whose velocity then
    counts at these cells alone; the others wait (`walk.py`).

    A finished chunk that later chunks look back on is passed through the network once more, clean (sigma 0), so that
    its keys and values are those of the finished latent; with that, skipping idle chunks is exact. The frames of the
    schedule's prefix and suffix are taken from `noise` as they are, as finished latents, and never written; the network is
    shown the prefix once, as `given` has it. A plan that is made from a timing is asked for right before the rows.
    """
    x, levels, rng = noise.clone(), tuple(sigmas), given.start()
    for index in range(schedule.given):
        before = schedule.at(index, schedule.steps)
        predict(given.show(_part(x, before), rng), before)
        commit(before)
    if not isinstance(plan, Plan):
        plan = plan(frame_seconds(schedule, lambda chunk: predict(_part(x, chunk), chunk), x.device)) if plan else Plan.full(schedule)
    if choose is None and any(plan.partial):
        raise ValueError("the plan computes some steps in part, and nothing chooses the part: hand over Session.choose")
    on_way = walks(schedule, plan, levels, solver)
    for row in schedule.rows:
        for chunk in row.active:
            clean = None
            if plan.computes(chunk):
                walk = on_way[chunk.index]
                chosen = choose(chunk, walk.rate(chunk.step)) if choose and plan.computes_part(chunk) else None
                arrived = _arrive(x, chunk, walk)
                clean = _move(x, chunk, arrived, predict(arrived, chunk), walk, chosen)
            if on_step:
                on_step(chunk, clean, x)
        for chunk in row.active:
            if chunk.step != chunk.steps - 1:
                continue
            if chunk.index < schedule.chunks - 1:
                predict(_part(x, chunk), replace(chunk, step=chunk.steps))
            commit(chunk)
            del on_way[chunk.index]
    return x


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
    """What one evaluation takes, to its end on the device."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begin = now()
    evaluate(chunk)
    return now() - begin


def _part(x: Tensor, chunk: Chunk) -> Tensor:
    """A chunk's latents, as a copy: solver and session may keep it while the film moves on."""
    return x[:, :, chunk.start : chunk.start + chunk.frames].clone()


def _arrive(x: Tensor, chunk: Chunk, walk: Walk) -> Tensor:
    """The chunk's latents at the noise level of its step; held frames as they are."""
    part, moving = _part(x, chunk), chunk.frames - chunk.held
    arrived = walk.arrive(part, chunk.step)
    return torch.cat([arrived[:, :, :moving], part[:, :, moving:]], 2) if chunk.held else arrived


def _move(x: Tensor, chunk: Chunk, arrived: Tensor, velocity: Tensor, walk: Walk, chosen: Tensor | None = None) -> Tensor:
    """One step of the chunk's own frames of `x`, in place -> the clean latents it predicts; held frames stay."""
    moving = chunk.frames - chunk.held
    if chunk.held:
        velocity = velocity.clone()
        velocity[:, :, moving:] = 0
    moved, clean = walk.step(_part(x, chunk), arrived, velocity, chunk.step, chosen)
    x[:, :, chunk.start : chunk.start + moving] = moved[:, :, :moving]
    return clean


PredictWindow = Callable[[Tensor, tuple[float, ...], Row], Tensor]
"""(latents of the window [B, C, F, h, w], noise level of every frame, row) -> velocity, same shape."""


def sample_window(predict: PredictWindow, noise: Tensor, schedule: ChunkSchedule, sigmas: Sequence[float], solver: Solver,
                  on_step: OnStep | None = None, given: GivenNoise = CLEAN, rng: torch.Generator | None = None,
                  plan: Plan | None = None) -> Tensor:  # fmt: skip
    """The upstream way: every row of the `plan` (None: all) runs all chunks of the window, begun or not, and moves the active ones.

    Frames of prefix and suffix are taken from `noise` and never written; in every row the network is shown the prefix with
    fresh light noise, at that noise level, and the suffix clean.
    """
    x, levels, rng = noise.clone(), tuple(sigmas), rng or given.start()
    plan = plan or Plan.full(schedule, together=True)
    on_way, level_of = walks(schedule, plan, levels, solver), (levels[0], *levels)
    for row in schedule.rows:
        computed = [chunk for chunk in row.active if plan.computes(chunk)]
        if not computed:
            for chunk in row.active:
                if on_step:
                    on_step(chunk, None, x)
            continue
        begin = schedule.span(row.first)[0]
        velocity = predict(*_window(x, schedule, row, level_of, given, rng), row)
        for chunk in row.active:
            mine = velocity[:, :, chunk.start - begin : chunk.start - begin + chunk.frames]
            clean = _move(x, chunk, _part(x, chunk), mine, on_way[chunk.index]) if plan.computes(chunk) else None
            if on_step:
                on_step(chunk, clean, x)
    return x


def _window(x: Tensor, schedule: ChunkSchedule, row: Row, level_of: tuple[float, ...], given: GivenNoise,
            rng: torch.Generator) -> tuple[Tensor, tuple[float, ...]]:  # fmt: skip
    """What the network is shown in a row: latents [B, C, F, h, w] of the window's frames, and the noise level of every frame.

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


def sample_windows(predict: PredictWindow, noise: Tensor, windows: Sequence[Window], sigmas: Sequence[float], solver: Solver,
                   on_step: OnStep | None = None, given: GivenNoise = CLEAN, plans: Sequence[Plan] | MakePlans = ()) -> Tensor:  # fmt: skip
    """A film of any length [B, C, F, h, w] as published: window after window, each given the last frames of the one before.

    `plans`: one per window; () computes every row. `predict` sees a window's frames alone; the chunks that `predict` and `on_step`
    are told of are numbered over the film.
    """
    film, rng = noise.clone(), given.start()
    if callable(plans):
        window, levels = windows[0], tuple(sigmas)
        row, part = window.schedule.rows[0], film[:, :, window.start : window.end]
        seen, per_frame = _window(part, window.schedule, row, (levels[0], *levels), given, given.start())
        predict(seen, per_frame, row)
        plans = plans(seconds_of(lambda chunk: predict(seen, per_frame, row), row.active[0], film.device) / seen.shape[2])
    each = plans or (None,) * len(windows)
    for window, plan in zip(windows, each, strict=True):

        def whole(chunk: Chunk, window: Window = window) -> Chunk:
            return replace(chunk, index=chunk.index + window.index, start=chunk.start + window.start)

        def told(part: Tensor, levels: tuple[float, ...], row: Row, whole: Callable[[Chunk], Chunk] = whole) -> Tensor:
            return predict(part, levels, replace(row, active=tuple(whole(chunk) for chunk in row.active)))

        def shown(chunk: Chunk, clean: Tensor | None, x: Tensor, window: Window = window, whole: Callable[[Chunk], Chunk] = whole) -> None:
            film[:, :, window.start : window.end] = x
            if on_step:
                on_step(whole(chunk), clean, film)

        part = film[:, :, window.start : window.end]
        film[:, :, window.start : window.end] = sample_window(told, part, window.schedule, sigmas, solver, shown, given, rng, plan)
    return film
