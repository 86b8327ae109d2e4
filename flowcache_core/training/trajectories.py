"""Trajectories of a guided teacher: how it gets from noise to a film, chunk by chunk, with the states at a few noise levels.

A student of few steps learns from them where a state at one of its noise levels ends (ODE regression, as CausVid, arXiv 2412.07772, and
Self-Forcing, arXiv 2506.08009, begin). Every chunk is denoised to the end before the next begins, and sees the clean chunks before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path as File

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import whole
from ..kernels.attention import attention
from ..models.attention import BlockCausal
from ..models.causal_wan_family import FOUR
from ..models.skyreels import PATCH, SkyReelsV2, TextKV
from ..models.word_text import encode_prompt
from ..network import Attend
from ..sampling.noise import TRAIN_STEPS, flow_sigmas
from ..sampling.path import Path
from ..sampling.solvers import UniPC

CHUNK, WINDOW = 3, 5
"""Latent frames of a chunk; chunks that the teacher sees together, as it was trained."""
FPS = 24
GUIDANCE = 3.0
LEVELS = FOUR.trained
"""Of the student."""
STEPS_BETWEEN = (2, 2, 3, 3)
"""Steps of the teacher from each of `LEVELS` to the next, the last to 0."""
SHIFT = 8.0
FIRST = flow_sigmas(1, SHIFT)[0]
"""The highest level that the teacher was trained on; the student takes it for pure noise."""
FILMS = 8
"""Of one piece of trajectories."""


def teacher_levels(first: int = 0) -> tuple[float, ...]:
    """Noise levels from `LEVELS[first]` to 0; between two of the student's they are evenly spaced before the teacher's shift."""
    ends = [(FIRST, *LEVELS[1:])[number] for number in range(first, len(LEVELS))]
    levels = [level for (a, b), steps in zip(pairwise([*ends, 0.0]), STEPS_BETWEEN[first:], strict=True) for level in _spaced(a, b, steps)]
    return (*levels, 0.0)


def _spaced(start: float, end: float, steps: int) -> Iterator[float]:
    a, b = (level / (SHIFT - (SHIFT - 1) * level) for level in (start, end))
    yield start
    for k in range(1, steps):
        place = a + (b - a) * k / steps
        yield SHIFT * place / (1 + (SHIFT - 1) * place)


class History:
    """Keys and values of the clean chunks of films, by layer [B, heads, tokens, D]."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def keeping(self, attend: Attend) -> Attend:
        """`attend`, whose keys and values are put behind those that are there."""

        def kept(layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
            out = attend(layer, q, k, v, x)
            before = self.layers.get(layer)
            self.layers[layer] = (torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)) if before else (k, v)
            return out

        return kept


@dataclass(frozen=True)
class Beside:
    """Attention of chunks that are denoised: each sees itself and the clean ones before it, `window` chunks together at most.

    `first`: number of the first of these chunks in its film; `tokens`: of a chunk.
    """

    history: History
    first: int
    tokens: int
    window: int

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        clean = self.history.layers.get(layer)
        q, k = q.to(v), k.to(v)
        return torch.cat([self._chunk(q, k, v, clean, place) for place in range(q.shape[2] // self.tokens)], 2)

    def _chunk(self, q: Tensor, k: Tensor, v: Tensor, clean: tuple[Tensor, Tensor] | None, place: int) -> Tensor:
        mine, end = slice(place * self.tokens, (place + 1) * self.tokens), (self.first + place) * self.tokens
        if clean is None or not end:
            return attention(q[:, :, mine], k[:, :, mine], v[:, :, mine])
        seen = slice(max(0, end - (self.window - 1) * self.tokens), end)
        keys, values = (torch.cat([old[:, :, seen].to(new), new[:, :, mine]], 2) for old, new in zip(clean, (k, v), strict=True))
        return attention(q[:, :, mine], keys, values)


def tokens_of(x: Tensor) -> int:
    """Of a chunk of latents [B, C, F, h, w]."""
    return CHUNK * (x.shape[3] // PATCH) * (x.shape[4] // PATCH)


def text_of(captions: Sequence[str], channels: int) -> Tensor:
    """-> [films, words, channels]."""
    return torch.cat([encode_prompt(caption, channels) for caption in captions])


@dataclass
class Branch:
    """A network at work on some films, chunk by chunk or on all chunks beside clean ones. `window`: chunks that it sees together."""

    network: SkyReelsV2
    text: TextKV
    window: int
    history: History = field(default_factory=History)

    def velocity(self, x: Tensor, sigma: float | Tensor, first: int) -> Tensor:
        """Chunks from number `first` on, [B, C, F, h, w], at one noise level, or one per film and latent frame [B, F] -> float32, the same shape."""
        return self._run(x, _times(sigma), first, Beside(self.history, first, tokens_of(x), self.window))

    def commit(self, clean: Tensor, first: int) -> None:
        """A clean chunk becomes history."""
        attend = Beside(self.history, first, tokens_of(clean), self.window)
        self._run(clean, torch.zeros(1, 1), first, self.history.keeping(attend))

    def commit_film(self, clean: Tensor) -> None:
        """All chunks of films at once."""
        ends = range(tokens_of(clean), clean.shape[2] // CHUNK * tokens_of(clean) + 1, tokens_of(clean))
        self._run(clean, torch.zeros(1, 1), 0, self.history.keeping(BlockCausal(ends, self.window)))

    def _run(self, x: Tensor, times: Tensor, first: int, attend: Attend) -> Tensor:
        like = next(self.network.parameters())
        return self.network(x.to(like), times, self.text, attend, first * CHUNK, FPS).float()


def _times(sigma: float | Tensor) -> Tensor:
    return (sigma if isinstance(sigma, Tensor) else torch.tensor([[sigma]])).double() * TRAIN_STEPS


class Teacher:
    """The guided network on films of some captions: both branches side by side in one batch."""

    def __init__(self, network: SkyReelsV2, captions: Sequence[str]) -> None:
        text = text_of([*captions, *[""] * len(captions)], network.config.text_dim)
        self.both = Branch(network, network.text_kv(text.to(next(network.parameters()))), WINDOW)

    def commit(self, clean: Tensor, first: int) -> None:
        self.both.commit(clean.repeat(2, 1, 1, 1, 1), first)

    def commit_film(self, clean: Tensor) -> None:
        self.both.commit_film(clean.repeat(2, 1, 1, 1, 1))

    def velocity(self, x: Tensor, sigma: float, first: int) -> Tensor:
        level = int(TRAIN_STEPS * sigma) / TRAIN_STEPS
        cond, uncond = self.both.velocity(x.repeat(2, 1, 1, 1, 1), level, first).chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    def descend(self, x: Tensor, level: int, first: int) -> list[Tensor]:
        """Chunks at `LEVELS[level]` -> their states there and at the levels below it, and the clean end."""
        path, solver = Path.whole(teacher_levels(level)), UniPC()
        memory, states = solver.start(torch.Generator()), [x]
        for number, sigma in enumerate(path.sigmas[:-1]):
            x = solver.step(x, self.velocity(x, sigma, first), number, path, memory)
            if path.sigmas[number + 1] in (*LEVELS, 0.0):
                states.append(x)
        return states


@dataclass(frozen=True)
class Piece:
    """Trajectories of some films. Latents are in half precision.

    states: [films, levels, C, F, h, w] at `LEVELS[first:]`; clean: where they end [films, C, F, h, w]; history: the clean film that the
    chunks saw.
    """

    captions: Sequence[str]
    states: Tensor
    clean: Tensor
    history: Tensor

    @property
    def first(self) -> int:
        return len(LEVELS) - self.states.shape[1]


@torch.no_grad()
def own_films(network: SkyReelsV2, captions: Sequence[str], noise: Tensor) -> Piece:
    """The teacher's own films, each chunk from noise on its own clean chunks. noise: [films, C, F, h, w]."""
    teacher, chunks = Teacher(network, captions), []
    for first, part in enumerate(noise.split(CHUNK, 2)):
        *states, clean = teacher.descend(part, 0, first)
        teacher.commit(clean, first)
        chunks.append((torch.stack(states, 1), clean))
    states_of, clean_of = (torch.cat(parts, dim).half() for parts, dim in zip(zip(*chunks, strict=True), (3, 2), strict=True))
    return Piece(captions, states_of, clean_of, clean_of)


@torch.no_grad()
def corrected(network: SkyReelsV2, captions: Sequence[str], states: Tensor, film: Tensor, first: int) -> Piece:
    """Where the teacher takes the states of a student. states: at `LEVELS[first]` [films, C, F, h, w]; film: the student's, which the chunks see."""
    teacher = Teacher(network, captions)
    teacher.commit_film(film)
    *along, clean = teacher.descend(states, first, 0)
    return Piece(captions, torch.stack(along, 1).half(), clean.half(), film.half())


def save(piece: Piece, path: File) -> None:
    with whole(path) as partial:
        save_file({"states": piece.states.contiguous(), "clean": piece.clean.contiguous(), "history": piece.history.clone()}, partial)


def load(path: File, captions: Sequence[str]) -> Piece:
    return Piece(captions, **load_file(path))
