"""Whether a film has returned to its sink: the first latent frames, which stay in history however long the film is.

Films far beyond the trained horizon are reported to fall back to their first frames again and again (sink collapse: LoL, arXiv 2601.16914).
Here every chunk is compared with these frames, on the clean latents of the finished film.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sampling.schedule import ChunkSchedule

NEAR = 0.5
"""A chunk has returned where its distance to the sink is less than this part of the median of the chunks before it."""
SHOWN = 8
"""Chunks that a sentence lists."""


@dataclass(frozen=True, slots=True)
class Returns:
    """chunks: by film of the batch, numbers from 0 of those that have returned; nearest: by film, the least distance as a part of that median."""

    chunks: tuple[tuple[int, ...], ...]
    nearest: tuple[float, ...]


def distances(latents: Tensor, schedule: ChunkSchedule, sink: int) -> Tensor:
    """Of every chunk to the first `sink` latent frames, float32 [films, chunks]. latents: [films, C, F, h, w].

    Of each frame the distance to the nearest frame of the sink, over that frame's norm; of a chunk the mean over its frames.
    """
    stays = _frames(latents[:, :, :sink])
    norms = stays.norm(dim=2)[:, None].clamp(min=1e-12)
    near = []
    for start, count in map(schedule.span, range(schedule.chunks)):
        apart = torch.cdist(_frames(latents[:, :, start : start + count]), stays, compute_mode="donot_use_mm_for_euclid_dist")
        near.append((apart / norms).amin(2).mean(1))
    return torch.stack(near, 1)


def _frames(latents: Tensor) -> Tensor:
    """[films, C, F, h, w] -> float32 [films, F, C * h * w]."""
    return latents.float().transpose(1, 2).flatten(2)


def returns(latents: Tensor, schedule: ChunkSchedule, sink: int) -> Returns:
    """Only chunks beyond the trained window are judged: those that cannot see the film's beginning but by the sink, and have a chunk between it
    and themselves. Waits for the device once."""
    far = distances(latents, schedule, sink).cpu()
    first = -(-sink // schedule.chunk_frames)
    parts = torch.ones_like(far)
    for chunk in range(max(schedule.window or schedule.chunks, first + 1), schedule.chunks):
        usual = far[:, first:chunk].median(1).values
        parts[:, chunk] = torch.where(usual > 0, far[:, chunk] / usual, 1.0)
    chunks = tuple(tuple((film < NEAR).nonzero().flatten().tolist()) for film in parts)
    return Returns(chunks, tuple(float(film.min()) for film in parts))


def beyond(schedule: ChunkSchedule) -> bool:
    """Whether a film is longer than the trained window."""
    return schedule.window is not None and schedule.chunks > schedule.window


def returned(latents: Tensor, schedule: ChunkSchedule, sink: int) -> tuple[str, ...]:
    """A sentence for the report where chunks of a film, or of one of several, have returned to its first frames; () where none has."""
    found = returns(latents, schedule, sink)
    numbers = sorted({chunk + 1 for film in found.chunks for chunk in film})
    if not numbers:
        return ()
    listed = ", ".join(map(str, numbers[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")
    return (
        f"the film comes back to its first frames in chunk{'s' * (len(numbers) > 1)} {listed} ({len(numbers)} of {schedule.chunks}): the distance to "
        f"them is {min(found.nearest):.0%} of what is usual (sink collapse); try a smaller sink in KV Compressor",
    )
