"""What is denoised when: pure data, no tensors of the video.

`flow_sigmas` is the noise schedule of one chunk; `ChunkSchedule` staggers the chunks of a film over the rows of the
sampling loop, as the asynchronous generator of SkyReels-V2 does (report section 3.3): chunk k starts `ar_step` rows
after chunk k-1. `ar_step` 0 moves all chunks together; `ar_step` >= steps finishes each before the next begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from .chunk import Chunk

TRAIN_STEPS = 1000


def flow_sigmas(steps: int, shift: float = 8.0) -> tuple[float, ...]:
    """`steps` + 1 noise levels from just below 1 down to 0, shifted as s * x / (1 + (s - 1) * x)."""
    if steps < 1:
        raise ValueError(f"{steps} steps were asked for: at least 1 is needed (50 is the published setting)")
    first = 1 - 1 / TRAIN_STEPS
    levels = (first * (1 - i / steps) for i in range(steps))
    return (*(shift * x / (1 + (shift - 1) * x) for x in levels), 0.0)


def timestep(sigma: float) -> int:
    """The integer timestep 0..999 that the network is given for a noise level; truncated, as upstream does."""
    return int(TRAIN_STEPS * sigma)


@dataclass(frozen=True, slots=True)
class Row:
    """One turn of the loop. `active`: the chunks that move a step, in order; `first`..`last` (exclusive): the window."""

    active: tuple[Chunk, ...]
    first: int
    last: int
    indices: tuple[int, ...]
    """Per chunk of the film: 0 not begun, j about to do step j - 1 (1..steps), steps + 1 finished."""


@dataclass(frozen=True)
class ChunkSchedule:
    """How `frames` latent frames in chunks of `chunk_frames` go through `steps` steps.

    `window`: chunks that are looked at together at most (the trained horizon); `prefix`: finished chunks given at the start.
    A last chunk shorter than the others is allowed. Raises ValueError for settings that cannot work.
    """

    frames: int
    chunk_frames: int
    steps: int
    ar_step: int = 5
    window: int | None = None
    prefix: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1 or self.chunk_frames < 1:
            raise ValueError(f"{self.frames} latent frames in chunks of {self.chunk_frames}: both must be at least 1")
        if self.steps < 1:
            raise ValueError(f"{self.steps} steps were asked for: at least 1 is needed")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} chunks was asked for: a chunk sees at least itself, so use 1 or more")
        if self.ar_step < 0:
            raise ValueError(f"ar_step {self.ar_step} is negative: 0 denoises all chunks together, 5 is the published stagger")
        if not 0 <= self.prefix < self.chunks:
            raise ValueError(f"{self.prefix} prefix chunks of {self.chunks}: at least one chunk must be left to generate")
        if self.chunks > self.reach and self.ar_step * self.reach < self.steps and self.ar_step < self.steps:
            least = -(-self.steps // self.reach)
            raise ValueError(
                f"{self.chunks} chunks do not fit a window of {self.reach} at ar_step {self.ar_step}: use ar_step {least} or more, "
                f"or at most {self.reach} chunks ({self.reach * self.chunk_frames} latent frames)"
            )

    @property
    def chunks(self) -> int:
        return -(-self.frames // self.chunk_frames)

    @property
    def reach(self) -> int:
        """Chunks that one chunk can see, itself included."""
        return self.window or self.chunks

    def span(self, index: int) -> tuple[int, int]:
        """First latent frame and number of frames of a chunk; only the last may be short."""
        start = index * self.chunk_frames
        return start, min(self.chunk_frames, self.frames - start)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(self._rows())

    @property
    def chunk_steps(self) -> int:
        """Steps of all chunks together."""
        return (self.chunks - self.prefix) * self.steps

    def _rows(self) -> Iterator[Row]:
        done, n = self.steps, self.steps + 1
        before = [n] * self.prefix + [0] * (self.chunks - self.prefix)
        last = min(self.reach, self.chunks)
        while not all(index >= done for index in before):
            now = list(before)
            for k in range(self.chunks):
                free = k == 0 or before[k - 1] >= done
                now[k] = min(max(before[k] + 1 if free else now[k - 1] - self.ar_step, 0), n)
            moving = [now[k] != before[k] and now[k] != n for k in range(self.chunks)]
            while last < self.chunks and moving[last]:
                last += 1
            active = tuple(Chunk(k, *self.span(k), step=now[k] - 1, steps=self.steps) for k in range(self.chunks) if moving[k])
            yield Row(active, max(0, last - self.reach), last, tuple(now))
            before = now


def nearest_frames(frames: int, chunk_frames: int, temporal: int = 4) -> tuple[int, int]:
    """Pixel lengths around `frames` that fill whole chunks: 97 frames at chunk 4 -> (93, 109)."""
    chunk = chunk_frames * temporal
    below = max((frames + temporal - 1) // chunk, 1) * chunk - temporal + 1
    return (below, below) if below == frames else (below, below + chunk)
