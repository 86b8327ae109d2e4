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


@dataclass(frozen=True, slots=True)
class Returns:
    """chunks: by film of the batch, numbers from 0 of those that have returned; nearest: by film, the least distance as a part of that median."""

    chunks: tuple[tuple[int, ...], ...]
    nearest: tuple[float, ...]


def distances(latents: Tensor, schedule: ChunkSchedule, sink: int) -> Tensor:
    """Of every chunk to the first `sink` latent frames, float32 [films, chunks]. latents: [films, C, F, h, w].

    Of each frame the distance to the nearest frame of the sink, over that frame's norm; of a chunk the mean over its frames.
    """
    frames = latents.float().transpose(1, 2).flatten(2)
    stays = frames[:, :sink]
    near = (torch.cdist(frames, stays) / stays.norm(dim=2)[:, None].clamp(min=1e-12)).amin(2)
    return torch.stack([near[:, start : start + n].mean(1) for start, n in map(schedule.span, range(schedule.chunks))], 1)


def returns(latents: Tensor, schedule: ChunkSchedule, sink: int) -> Returns:
    """Only chunks beyond the trained window are judged: those that cannot see the film's beginning but by the sink. Waits for the device once."""
    far = distances(latents, schedule, sink).cpu()
    first = -(-sink // schedule.chunk_frames)
    parts = torch.ones_like(far)
    for chunk in range(schedule.window or schedule.chunks, schedule.chunks):
        parts[:, chunk] = far[:, chunk] / far[:, first:chunk].median(1).values.clamp(min=1e-12)
    chunks = tuple(tuple((film < NEAR).nonzero().flatten().tolist()) for film in parts)
    return Returns(chunks, tuple(float(film.min()) for film in parts))
