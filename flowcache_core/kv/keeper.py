"""History under a budget: it lets the policy score slots while a chunk commits, and says which stay, how far away they count as and for how many.

Slots are chosen per layer, branch and film; the heads of a layer share the choice, so that the positions of a layer's slots
are known. Unless its positions are to be as they are, a chunk that lies farther back than the network has seen in training counts as just
within that horizon: queries are turned for it, stored keys never are.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..kernels.transfer import Fetched, Inbox
from ..memory import RunMemory
from ..network import Rotary
from ..sampling.chunk import Chunk
from ..sampling.schedule import ChunkSchedule
from .evict import select
from .layout import Range
from .policy import KVView, SamplingKVPolicy

if TYPE_CHECKING:
    from .compressor import Budget

Segment = tuple[int, int, int]
"""First slot, end, and by how many latent frames farther away it is than the horizon (0: within it)."""


@dataclass(frozen=True, slots=True)
class Middle:
    """Slots `start`..`end` of history; each stands for exp(`weight`) tokens."""

    start: int = 0
    end: int = 0
    weight: float = 0.0

    def cut(self, start: int, end: int) -> list[tuple[int, int, float]]:
        """A range of slots in parts that lie within the middle or without: start, end, weight."""
        edges = sorted({start, end, *(edge for edge in (self.start, self.end) if self.weight and start < edge < end)})
        return [(a, b, self.weight if self.start <= a < self.end else 0.0) for a, b in pairwise(edges)]


@dataclass
class Kept:
    """One layer of one branch. tokens: int64 [films, slots of history], numbers of tokens in the film; carried: their last scores."""

    tokens: Tensor
    carried: Tensor
    scores: Tensor | None = None
    memory: RunMemory = field(default_factory=RunMemory)
    runs: list[list[tuple[int, int, int]]] = field(default_factory=list)
    """Per film: chunk, first slot, end."""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Which slots of one layer stay, of one branch or of several. index: int64 [films, stays], ascending.

    pooled: int64 [films, n, m] or None: n groups of m neighbours that go; the mean of each takes the place of its middle slot,
    which is in `index`. `first` and `last`: so many slots at the start and at the end of history are known to stay, without a look at `index`.
    """

    index: Tensor
    pooled: Tensor | None = None
    first: int = 0
    last: int = 0


def side_by_side(choices: Sequence[Choice | None]) -> Choice | None:
    """Of the branches of one cache, in their order; None for all slots, which then holds for all of them."""
    some = [choice for choice in choices if choice is not None]
    if len(some) < 2:
        return next(iter(some), None)
    pooled = [choice.pooled for choice in some if choice.pooled is not None]
    return Choice(torch.cat([choice.index for choice in some]), torch.cat(pooled) if pooled else None, some[0].first, some[0].last)


class Keeper:
    """Of one run. `films`: of a batch; `grid`: height and width of a frame in tokens."""

    remembers: ClassVar[tuple[str, ...]] = ("middle", "_kept", "_shared")
    _kept: dict[Hashable, list[Kept]]

    def __init__(self, budget: Budget, schedule: ChunkSchedule, layers: int, films: int, grid: tuple[int, int], rotary: Rotary,
                 inbox: Inbox | None = None) -> None:  # fmt: skip
        """`inbox`: by which the run's numbers come to the host."""
        self.budget, self.schedule, self.layers, self.films, self.grid, self.rotary = budget, schedule, layers, films, grid, rotary
        self.frame_tokens = grid[0] * grid[1]
        self._ends = torch.tensor([sum(schedule.span(k)) * self.frame_tokens for k in range(schedule.chunks)])
        self.middle = Middle()
        """Slots of history that stand for others, the same in all layers and branches."""
        self._kept = {}
        self._shared = RunMemory()
        self._segments: dict[tuple[int, Hashable, int], list[list[Segment]]] = {}
        self._lengths: dict[tuple[Segment, ...], Tensor] = {}
        self._inbox = inbox or Inbox()
        self._sent: Fetched | None = None
        self._shifts: dict[int, Tensor] = {}
        """By distance: there are as many as chunks, however many segments the layers have."""

    def observe(self, layer: int, branch: Hashable, chunk: Chunk, keys: Tensor, values: Tensor, queries: Tensor, hidden: Tensor) -> None:
        """The clean pass of a chunk: slots of history and its own [films, heads, N, D], its queries and the layer's input."""
        kept, new = self._of(branch, keys.device)[layer], chunk.frames * self.frame_tokens
        own = torch.arange(new, device=keys.device) + chunk.start * self.frame_tokens
        tokens = torch.cat([kept.tokens, own.expand(self.films, -1)], 1)
        carried = torch.cat([kept.carried, kept.carried.new_zeros(self.films, new)], 1)
        view = KVView(
            layer, keys, values, queries, hidden, tokens, carried, new, self.frame_tokens, self.grid, self.rotary, kept.memory, self._shared
        )
        kept.scores = self.budget.policy.score(view).mean(1)

    def meet(self, branches: Iterable[Hashable]) -> None:
        """Branches whose history is the same so far, whether they have been observed or not; before the first of them settles a chunk."""
        for branch in branches:
            self._of(branch, None)

    def settle(self, chunk: Chunk, branch: Hashable, stays: int) -> list[Choice | None]:
        """The chunk joins history, of which `stays` slots stay -> per layer which; None for all."""
        out: list[Choice | None] = []
        self.middle = self._middle((chunk.start + chunk.frames) * self.frame_tokens, stays)
        for kept in self._of(branch, None):
            own = torch.arange(chunk.frames * self.frame_tokens, device=kept.tokens.device) + chunk.start * self.frame_tokens
            kept.tokens = torch.cat([kept.tokens, own.expand(self.films, -1)], 1)
            scores = kept.tokens.new_zeros(kept.tokens.shape, dtype=torch.float32) if kept.scores is None else kept.scores
            kept.scores, choice = None, None
            if stays < kept.tokens.shape[1]:
                choice = self._choose(scores, kept.tokens, stays)
                kept.tokens, scores = kept.tokens.gather(1, choice.index), scores.gather(1, choice.index)
            kept.carried = scores
            out.append(choice)
        return out

    def send(self) -> None:
        """Asks for the numbers that `locate` needs, once: whatever the device is given behind it, such as slots to move, nobody waits for."""
        if self._sent is None:
            together = torch.stack([torch.stack([kept.tokens for kept in layers]) for layers in self._kept.values()])
            self._sent = self._inbox.fetch(together)

    def locate(self) -> np.ndarray:
        """Notes which slots are of which chunk, for attention and the report: a host sync at most -> tokens [branches, layers, films, slots].

        To be called between a chunk's `settle` and whatever looks back on it.
        """
        self.send()
        assert self._sent is not None
        together, self._sent = self._inbox.get(self._sent), None
        chunks = torch.bucketize(together, self._ends, right=True).numpy()
        for layers, of_branch in zip(self._kept.values(), chunks, strict=True):
            for kept, of_layer in zip(layers, of_branch, strict=True):
                kept.runs = [_runs(film) for film in of_layer]
        self._segments.clear()
        self._lengths.clear()
        found: np.ndarray = together.numpy()
        return found

    @property
    def chunks(self) -> set[int]:
        """Of which some slot is kept, in whatever layer and branch, as last located."""
        return {index for layers in self._kept.values() for kept in layers for film in kept.runs for index, _, _ in film}

    def segments(self, layer: int, branch: Hashable, chunk: Chunk) -> list[list[Segment]]:
        """Per film the slots of history that are to count as within the horizon of a chunk and lie beyond it, oldest first; [] where none is."""
        if self.budget.positions == "as they are":
            return [[]] * self.films
        kept = self._kept[branch][layer].runs if branch in self._kept else []
        key = layer, branch, chunk.index
        if key not in self._segments:
            room = self.schedule.horizon - chunk.frames
            far = [[(start, end, chunk.start - self.schedule.span(k)[0] - room) for k, start, end in runs] for runs in kept]
            self._segments[key] = [[segment for segment in film if segment[2] > 0] for film in far] or [[]] * self.films
        return self._segments[key]

    def visible(self, layer: int, branch: Hashable, chunk: Chunk, limit: Range | None) -> list[tuple[int, list[Segment]]]:
        """Per film the first slot that a chunk sees, and what it sees beyond the horizon. `limit`: None where it sees all of history."""
        beyond = self.segments(layer, branch, chunk)
        if limit is None:
            return [(0, film) for film in beyond]
        runs = (self._kept[branch][layer].runs if branch in self._kept else None) or [[]] * self.films
        firsts = (next((start for k, start, _ in film if k >= limit.oldest), limit.first) for film in runs)
        return [(first, [segment for segment in film if segment[0] >= first]) for first, film in zip(firsts, beyond, strict=True)]

    def turns(self, segments: Sequence[Segment], device: torch.device) -> tuple[Tensor, Tensor]:
        """Phases that bring each segment within the horizon, complex64 [segments, head_dim / 2], and how many slots it has."""
        key = tuple(segments)
        if key not in self._lengths:
            self._lengths[key] = torch.tensor([end - start for start, end, _ in key]).to(device, non_blocking=True)
        return torch.cat([self._shift(farther, device) for _, _, farther in key]), self._lengths[key]

    def _shift(self, farther: int, device: torch.device) -> Tensor:
        if farther not in self._shifts:
            self._shifts[farther] = self.rotary.shift(farther).to(device, non_blocking=True)
        return self._shifts[farther]

    def free(self) -> None:
        self._kept.clear()
        self._shared.clear()
        self._segments.clear()
        self._lengths.clear()
        self._shifts.clear()
        self._sent = None

    def _middle(self, so_far: int, kept: int) -> Middle:
        """What lies between sink and recent, when of the film's first `so_far` tokens `kept` slots are history."""
        budget, protected = self.budget, self.budget.sink + self.budget.recent
        if not isinstance(budget.policy, SamplingKVPolicy) or not protected < kept < so_far:
            return Middle()
        each = min((so_far - protected) / (kept - protected), budget.policy.stands_for)
        return Middle(budget.sink, kept - budget.recent, math.log(each))

    def _choose(self, scores: Tensor, tokens: Tensor, stays: int) -> Choice:
        pooled = int(self.budget.soft * stays)
        index = self._best(scores, tokens, stays - pooled)
        fits = self.budget.sink + self.budget.recent <= stays - pooled
        first, last = (self.budget.sink, self.budget.recent) if fits else (0, 0)
        if not pooled:
            return Choice(index, None, first, last)
        goes = torch.ones_like(tokens).scatter_(1, index, 0)
        losers = goes.argsort(stable=True, dim=1, descending=True)[:, : tokens.shape[1] - index.shape[1]]
        size = losers.shape[1] // pooled
        groups = losers[:, losers.shape[1] - size * pooled :].reshape(self.films, pooled, size)
        return Choice(torch.cat([index, groups[:, :, size // 2]], 1).sort(1).values, groups, first, last)

    def _best(self, scores: Tensor, tokens: Tensor, stays: int) -> Tensor:
        budget, newest = self.budget, tokens.shape[1] - torch.arange(tokens.shape[1], device=tokens.device)
        protected = (tokens < budget.sink) | (newest <= budget.recent)
        match budget.granularity:
            case "token":
                return select(scores, stays, protected)
            case "frame":
                return select(scores, stays, protected, tokens // self.frame_tokens, self.schedule.frames)
            case "chunk":
                ends = self._ends.to(tokens.device, non_blocking=True)
                return select(scores, stays, protected, torch.bucketize(tokens, ends, right=True), self.schedule.chunks)

    def _of(self, branch: Hashable, device: torch.device | None) -> list[Kept]:
        if branch not in self._kept:
            none = torch.empty(self.films, 0, device=device)
            like = next(iter(self._kept.values()), [Kept(none.long(), none)] * self.layers)
            self._kept[branch] = [Kept(old.tokens, torch.zeros_like(old.carried), runs=old.runs) for old in like]
        return self._kept[branch]


def _runs(numbers: np.ndarray) -> list[tuple[int, int, int]]:
    """Chunk numbers of slots, ascending -> per chunk: number, first slot, end."""
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return [(int(numbers[a]), a, b) for a, b in pairwise(edges) if a < b]
