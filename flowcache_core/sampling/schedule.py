"""What is denoised when: pure data, no tensors of the video.

`ChunkSchedule` staggers the chunks of a film over the rows of the sampling loop, as the asynchronous generator of SkyReels-V2
does (report section 3.3): chunk k starts `ar_step` rows after chunk k-1. `ar_step` 0 moves all chunks together; `ar_step` >= steps
finishes each before the next begins.
`sections_of` cuts a film that is longer than the trained horizon into overlapping sections, each with a schedule of its own.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from .chunk import Chunk
from .frames import FOUR_N_PLUS_1, Frames
from .noise import TRAIN_STEPS
from .profile import ORDINARY, Profile

TINY = 1e-9
"""Against parts that miss a whole step by rounding."""
LONGEST = 200_000
"""Latent frames of a film: some nine hours."""
PLACES = 300_000_000
"""Rows times chunks: what is noted of a film, a few GB at most."""


@dataclass(frozen=True, slots=True)
class Row:
    """One iteration of the sampling loop. `active`: the chunks that move a step, in order; `first`..`last` (exclusive): the window."""

    active: tuple[Chunk, ...]
    first: int
    last: int
    indices: tuple[int, ...]
    """Per chunk of the film: 0 not begun, j about to do step j - 1 (1..steps), steps + 1 finished."""


@dataclass(frozen=True)
class ChunkSchedule:
    """How `frames` latent frames in chunks of `chunk_frames` go through `steps` steps.

    `window`: chunks that are looked at together at most (the trained horizon); `prefix` and `suffix`: latent frames given at
    the start and at the end, of any number. Raises ValueError for settings that cannot work.

    The grid of chunks begins right after the prefix, so all frames of a chunk that still carry noise share one level, as
    in training; the other way, a given frame inside the first chunk, would mix two levels where the models saw one. The
    prefix is cut into chunks from its end backwards, so that only the chunk farthest from the new frames may be short.
    The last generated chunk may be short too. It takes the suffix along (`Chunk.held`): its given frames stand at their own
    noise level 0 beside those that are denoised.

    `aligned`: the grid begins with the film instead, as MAGI-1 was trained. Given frames that fill no chunk are then the first of
    the first generated chunk (`Chunk.led`), which the network takes to be at the noise level of the others.

    `profile`: what the model's steps are worth, for plans.
    """

    frames: int
    chunk_frames: int
    steps: int
    ar_step: int = 5
    window: int | None = None
    prefix: int = 0
    suffix: int = 0
    pixels: Frames = FOUR_N_PLUS_1
    """For messages."""
    aligned: bool = False
    profile: Profile = ORDINARY

    def __post_init__(self) -> None:
        if self.frames < 1 or self.chunk_frames < 1:
            raise ValueError(f"{self.frames} latent frames in chunks of {self.chunk_frames}: both must be at least 1")
        if self.steps < 1:
            raise ValueError(f"{self.steps} steps were asked for: at least 1 is needed")
        if self.steps > TRAIN_STEPS:
            raise ValueError(f"{self.steps} steps were asked for: the models tell {TRAIN_STEPS} noise levels apart, so use at most {TRAIN_STEPS}")
        require_length(self.frames)
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} chunks was asked for: a chunk sees at least itself, so use 1 or more")
        if self.ar_step < 0:
            raise ValueError(f"ar_step {self.ar_step} is negative: 0 denoises all chunks together, 5 is the published stagger")
        if self.prefix < 0 or self.suffix < 0:
            raise ValueError(f"{self.prefix} given latent frames at the start and {self.suffix} at the end: neither can be negative")
        chunks = -(-self.frames // self.chunk_frames)
        if (self.steps + chunks * min(self.ar_step, self.steps)) * chunks > PLACES:
            raise ValueError(
                f"{self.frames} latent frames in chunks of {self.chunk_frames} are {chunks} chunks, more than can be laid out at {self.steps} steps "
                f"and ar_step {self.ar_step}: make the film in parts, each from the last frames of the one before"
            )
        if self.prefix + self.suffix >= self.frames:
            raise ValueError(
                f"{self.prefix + self.suffix} of {self.frames} latent frames are given: at least one must be left to generate; "
                f"make the film longer or give fewer frames"
            )
        if self.prefix > self.horizon:
            raise ValueError(
                f"{self.prefix} latent frames are given at the start, but the window holds {self.horizon}: "
                f"give at most the last {self.horizon} ({self.pixels.pixel(self.horizon)} frames of the clip)"
            )
        todo = self.chunks - self.given
        if todo > self.reach and self.ar_step * self.reach < self.steps and self.ar_step < self.steps:
            least = -(-self.steps // self.reach)
            raise ValueError(
                f"{todo} chunks do not fit a window of {self.reach} at ar_step {self.ar_step}: use ar_step {least} or more, "
                f"or at most {self.reach} chunks ({self.reach * self.chunk_frames} latent frames)"
            )

    @property
    def given(self) -> int:
        """Whole chunks of the prefix."""
        return self.prefix // self.chunk_frames if self.aligned else -(-self.prefix // self.chunk_frames)

    @property
    def chunks(self) -> int:
        """All chunks, those of the prefix included."""
        return len(self._spans)

    @property
    def reach(self) -> int:
        """Whole chunks that one chunk can see, itself included."""
        return self.window or self.chunks

    @property
    def horizon(self) -> int:
        """Latent frames that one chunk can see, itself included."""
        return self.window * self.chunk_frames if self.window else self.frames

    def span(self, index: int) -> tuple[int, int]:
        """First latent frame and number of frames of a chunk."""
        return self._spans[index]

    def oldest(self, index: int) -> int:
        """The first chunk that a chunk sees: all that is within the horizon, in whole chunks."""
        return min(bisect_left(self._starts, sum(self.span(index)) - self.horizon), index)

    def at(self, index: int, step: int) -> Chunk:
        """A chunk at a step."""
        led = self.prefix % self.chunk_frames if self.aligned and index == self.given else 0
        return Chunk(index, *self.span(index), step, self.steps, self.suffix if index == self.chunks - 1 else 0, led)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(self._rows())

    @cached_property
    def jumps(self) -> tuple[int, ...]:
        """Steps from which on the velocity is another function than in the step before (`Profile.changes`)."""
        return tuple(math.ceil(part * self.steps - TINY) for part in self.profile.changes)

    @property
    def chunk_steps(self) -> int:
        """Steps of all chunks together."""
        return (self.chunks - self.given) * self.steps

    @cached_property
    def _spans(self) -> tuple[tuple[int, int], ...]:
        size, end = self.chunk_frames, self.frames - self.suffix
        if self.aligned:
            return tuple((a, b - a) for a, b in pairwise([*range(0, end, size), self.frames]))
        starts = [*range(self.prefix % size or size, self.prefix, size), *range(self.prefix, end, size)]
        if self.prefix:
            starts.insert(0, 0)
        return tuple((a, b - a) for a, b in pairwise([*starts, self.frames]))

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(start for start, _ in self._spans)

    def _rows(self) -> Iterator[Row]:
        done, n, chunks = self.steps, self.steps + 1, self.chunks
        now = [n] * self.given + [0] * (chunks - self.given)
        first = self.given
        """All chunks before it are finished."""
        last = sum(sum(self.span(k)) <= self.horizon for k in range(chunks)) or 1
        while True:
            while first < chunks and now[first] >= done:
                now[first] = n
                first += 1
            if first == chunks:
                return
            active = []
            free = True
            for k in range(first, chunks):
                before = now[k]
                now[k] = min(max(before + 1 if free else now[k - 1] - self.ar_step, 0), n)
                free = before >= done
                if now[k] not in (before, n):
                    active.append(self.at(k, now[k] - 1))
                if now[k] == 0:
                    break
            while last < chunks and active[-1].index >= last:
                last += 1
            yield Row(tuple(active), min(self.oldest(last - 1), active[0].index), last, tuple(now))


@dataclass(frozen=True, slots=True)
class Section:
    """Frames `start`.. of a film, denoised bidirectionally as a film of their own.

    `index`: what to add to its chunks' numbers to count them over the film.
    """

    start: int
    index: int
    schedule: ChunkSchedule

    @property
    def end(self) -> int:
        return self.start + self.schedule.frames

    def in_film(self, chunk: Chunk) -> Chunk:
        """A chunk of the section, numbered and placed as one of the film."""
        return replace(chunk, index=chunk.index + self.index, start=chunk.start + self.start)

    def over_film(self, row: Row) -> Row:
        """The same for the active chunks of a row."""
        return replace(row, active=tuple(self.in_film(chunk) for chunk in row.active))


def require_length(frames: int) -> None:
    """Raises ValueError."""
    if frames > LONGEST:
        raise ValueError(f"{frames} latent frames were asked for: at most {LONGEST} are made in one run, make the film in parts")


def sections_of(frames: int, chunk_frames: int, steps: int, ar_step: int, length: int, overlap: int,
                prefix: int = 0, suffix: int = 0, pixels: Frames = FOUR_N_PLUS_1) -> tuple[Section, ...]:  # fmt: skip
    """A film of `frames` latent frames as sections of `length`, each beginning with the last `overlap` frames of the one before it.

    This is how SkyReels-V2 makes films longer than it was trained for (97 frames = 25 latent frames, overlap 17 = 5): the
    last section takes what is left and may be short. `prefix` and `suffix` are given at the start and the end of the film;
    a section is ended early where only given frames would be left for the last one.
    """
    require_length(frames)
    if frames > length and not 0 < overlap < length - suffix:
        raise ValueError(
            f"sections of {length} latent frames cannot overlap by {overlap}{f' and end in {suffix} given frames' if suffix else ''}: "
            f"use an overlap of 1 to {max(length - suffix - 1, 1)}, or at most {length} latent frames"
        )
    if frames > length and prefix >= length - suffix:
        raise ValueError(
            f"{prefix} latent frames are given at the start, but a section holds {length}: give at most the last {length - suffix - 1} "
            f"({pixels.pixel(length - suffix - 1)} frames of the clip; 17 is the published overlap)"
        )
    out: list[Section] = []
    start, given, total = 0, prefix, 0
    while True:
        end = min(start + length, frames)
        if 0 < frames - end <= suffix:
            end = frames - suffix - 1
        schedule = ChunkSchedule(end - start, chunk_frames, steps, ar_step, None, given, suffix if end == frames else 0, pixels)
        out.append(Section(start, total - (schedule.given if out else 0), schedule))
        if end == frames:
            return tuple(out)
        total = out[-1].index + schedule.chunks
        start, given = end - overlap, overlap


def forecast_short(schedule: ChunkSchedule) -> tuple[str, ...]:
    """Says that the last chunk has fewer latent frames than the others, and which lengths are whole; () where it has as many."""
    frames, size, pixels = sum(schedule.span(schedule.chunks - 1)), schedule.chunk_frames, schedule.pixels
    short = schedule.span(schedule.chunks - 1)[1]
    if short >= size:
        return ()
    lengths = [pixels.pixel(count) for count in (frames - short, frames - short + size) if count > schedule.prefix]
    whole = " or ".join(map(str, lengths))
    return (f"the last chunk has {short} latent frame{'s' * (short > 1)}, not {size} as in training: whole chunks end at {whole} frames",)
