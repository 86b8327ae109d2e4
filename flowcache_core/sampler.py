"""The loop over rows and chunks. It knows neither networks nor policies: `predict` returns the velocity of one chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .chunk import Chunk
from .schedule import ChunkSchedule, Row
from .solvers import Solver

Predict = Callable[[Tensor, Chunk], Tensor]
"""(latents of the chunk [B, C, F, h, w], chunk) -> velocity, same shape; in the commit pass the result is not used."""
OnStep = Callable[[Chunk, Tensor, Tensor], None]
"""(chunk, predicted clean latents of the chunk, latents of the whole film) after every step."""


def sample_chunks(predict: Predict, noise: Tensor, schedule: ChunkSchedule, sigmas: Sequence[float], solver: Solver,
                  commit: Callable[[Chunk], None] = lambda chunk: None, on_step: OnStep | None = None) -> Tensor:  # fmt: skip
    """Denoise a film [B, C, F, h, w] chunk by chunk; only active chunks run.

    A finished chunk that later chunks look back on is passed through the network once more, clean (sigma 0), so that
    its keys and values are those of the finished latent; with that, skipping idle chunks is exact. The frames of the
    schedule's prefix chunks are taken from `noise` as they are, as finished latents.
    """
    x, levels = noise.clone(), tuple(sigmas)
    memory = {index: solver.start() for index in range(schedule.prefix, schedule.chunks)}
    for index in range(schedule.prefix):
        given = Chunk(index, *schedule.span(index), schedule.steps, schedule.steps)
        predict(_part(x, given), given)
    for row in schedule.rows:
        for chunk in row.active:
            part = _part(x, chunk)
            velocity = predict(part, chunk)
            clean = part - levels[chunk.step] * velocity
            x[:, :, chunk.start : chunk.start + chunk.frames] = solver.step(part, velocity, chunk.step, levels, memory[chunk.index])
            if on_step:
                on_step(chunk, clean, x)
        for chunk in row.active:
            if chunk.step != chunk.steps - 1:
                continue
            if chunk.index < schedule.chunks - 1:
                predict(_part(x, chunk), replace(chunk, step=chunk.steps))
            commit(chunk)
            del memory[chunk.index]
    return x


def _part(x: Tensor, chunk: Chunk) -> Tensor:
    """A chunk's latents, as a copy: solver and session may keep it while the film moves on."""
    return x[:, :, chunk.start : chunk.start + chunk.frames].clone()


PredictWindow = Callable[[Tensor, Tensor, Row], Tensor]
"""(latents of the window [B, C, F, h, w], noise level of every frame [F], row) -> velocity, same shape."""


def sample_window(predict: PredictWindow, noise: Tensor, schedule: ChunkSchedule, sigmas: Sequence[float], solver: Solver,
                  on_step: OnStep | None = None) -> Tensor:  # fmt: skip
    """The upstream way: every row runs all chunks of the window, begun or not, and moves the active ones."""
    x, levels = noise.clone(), tuple(sigmas)
    memory = {index: solver.start() for index in range(schedule.prefix, schedule.chunks)}
    level_of = (levels[0], *levels)
    for row in schedule.rows:
        begin, end = schedule.span(row.first)[0], sum(schedule.span(row.last - 1))
        per_frame = [level_of[row.indices[k]] for k in range(row.first, row.last) for _ in range(schedule.span(k)[1])]
        velocity = predict(x[:, :, begin:end], torch.tensor(per_frame, device=x.device), row)
        for chunk in row.active:
            part = _part(x, chunk)
            mine = velocity[:, :, chunk.start - begin : chunk.start - begin + chunk.frames]
            clean = part - levels[chunk.step] * mine
            x[:, :, chunk.start : chunk.start + chunk.frames] = solver.step(part, mine, chunk.step, levels, memory[chunk.index])
            if on_step:
                on_step(chunk, clean, x)
    return x
