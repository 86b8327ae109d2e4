"""A film of random keys and values through a store, beside a list of every key and value that was ever written."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowcache_core.kv.cache import CachedAttention, KVSizes, KVStore
from flowcache_core.kv.compressor import Budget
from flowcache_core.kv.keeper import Keeper
from flowcache_core.kv.layout import Layout, capacity
from flowcache_core.kv.policy import KVView
from flowcache_core.models.skyreels import HEAD_DIM, Rope
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.schedule import ChunkSchedule

FRAME, FILMS, LAYERS, HEADS = 4, 2, 3, 2
Groups = tuple[tuple[str, ...], ...]
TOGETHER: Groups = (("a", "b"),)
GROUPS: tuple[Groups, ...] = (TOGETHER, (("a",), ("b",)), (("b", "a"),))


@dataclass(frozen=True)
class Scattered:
    """Scores that differ by layer, film and token, so that any gap may open."""

    name: ClassVar[str] = "scattered"

    def score(self, view: KVView) -> Tensor:
        film = torch.arange(len(view.tokens), device=view.tokens.device)[:, None]
        return ((view.tokens + 13 * view.layer + 29 * film) * 7919 % 101).float()[:, None]


def budget(frames: int, **settings: object) -> Budget:
    """A sink of one frame and the latest three stay."""
    return Budget(frames * FRAME, FRAME, 3 * FRAME, "token", Scattered(), **settings)  # type: ignore[arg-type]


def exactly(seen: Tensor, written: Tensor) -> None:
    assert torch.equal(seen, written)


class RecordedFilm:
    """`groups`: how branches are batched; `regrouped`: a seed, with which that changes from evaluation to evaluation."""

    def __init__(self, schedule: ChunkSchedule, kept: Budget | None = None, groups: Groups = TOGETHER, regrouped: int | None = None) -> None:
        self.schedule, self.groups, self._rng = schedule, groups, random.Random(regrouped) if regrouped is not None else None
        layout, room = Layout(schedule, FRAME, kept.slots if kept else None), capacity(schedule, FRAME, kept.slots if kept else None)
        self.sizes = KVSizes(FILMS, LAYERS, HEADS, HEAD_DIM, room.total, room.history, room.active)
        self.keeper = Keeper(kept, schedule, LAYERS, FILMS, (2, 2), Rope()) if kept else None
        make = kept.cache_of(self.sizes, layout) if kept else None
        self.store = KVStore(self.sizes, layout, self.keeper, make)
        self.written = torch.zeros(2, 2, LAYERS, FILMS, HEADS, schedule.frames * FRAME, HEAD_DIM)
        """Keys and values by branch."""
        self.compared = 0
        self.seen = torch.empty(0), torch.empty(0)

    def run(self, close: Callable[[Tensor, Tensor], None], settled: Callable[[Chunk], None] | None = None) -> RecordedFilm:
        """`close`: compares what is seen with what was written; `settled`: makes a chunk history."""
        for index in range(self.schedule.given):
            self._finish(self.schedule.at(index, self.schedule.steps), close, settled)
        for row in self.schedule.rows:
            for chunk in row.active:
                self._evaluate(chunk, close)
                if chunk.step == self.schedule.steps - 1 and chunk.index < self.schedule.chunks - 1:
                    self._finish(self.schedule.at(chunk.index, self.schedule.steps), close, settled)
        return self

    def _finish(self, chunk: Chunk, close: Callable[[Tensor, Tensor], None], settled: Callable[[Chunk], None] | None) -> None:
        self._evaluate(chunk, close)
        (settled or self.store.settle)(chunk)
        if self.keeper:
            self.keeper.locate()

    def _evaluate(self, chunk: Chunk, close: Callable[[Tensor, Tensor], None]) -> None:
        mine = slice(chunk.start * FRAME, (chunk.start + chunk.frames) * FRAME)
        self.written[..., mine, :] = torch.randn(self.written[..., mine, :].shape)
        for group in self._rng.choice(GROUPS) if self._rng else self.groups:
            attend, numbers = self.store.attention(group, chunk), ["ab".index(branch) for branch in group]
            for layer in range(LAYERS):
                k, v = (x[numbers, layer][..., mine, :].flatten(0, 1) for x in self.written)
                self.attend(attend, layer, k, v)
                for seen, written in zip(self.seen, self.written, strict=True):
                    for number, branch in enumerate(numbers):
                        for film in range(FILMS):
                            tokens = self._tokens(chunk, group[number], layer, film)
                            close(seen[number * FILMS + film], written[branch, layer, film][:, tokens])
                            self.compared += 1

    def _tokens(self, chunk: Chunk, branch: str, layer: int, film: int) -> Tensor:
        """Of all that a chunk sees, in order: what is left of history, and the chunks that are being denoised up to itself."""
        end = (chunk.start + chunk.frames) * FRAME
        if self.keeper is None:
            return torch.arange(self.schedule.span(self.schedule.oldest(chunk.index))[0] * FRAME, end)
        kept = self.keeper._kept[branch][layer].tokens[film] if branch in self.keeper._kept else torch.empty(0, dtype=torch.long)
        first = min(self.store.layout.spans)
        return torch.cat([kept, torch.arange(self.schedule.span(first)[0] * FRAME, end)])

    def attend(self, attend: CachedAttention, layer: int, k: Tensor, v: Tensor) -> None:
        """Notes what is attended to."""
        read = attend._seen

        def seen(layer: int) -> tuple[Tensor, Tensor]:
            keys, values = read(layer)
            self.seen = keys.clone(), values.clone()
            return keys, values

        attend._seen = seen  # type: ignore[method-assign]
        attend(layer, k, k, v, k.new_zeros(len(k), k.shape[2], 1))
        attend._seen = read  # type: ignore[method-assign]
