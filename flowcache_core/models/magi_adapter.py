"""MAGI-1 behind the adapter seam: times, texts of the branches and chunks, how far a chunk looks back, and what a replayed step costs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..network import Attend, Rotary
from ..sampling.chunk import Chunk
from .adapter import Call, SquarePatches
from .magi import KV, PATCH, LayerText, Magi, Rope, rope_table

TEXT, NULL, ALONE = "text", "null", "alone"
"""Branches of guidance: text and earlier chunks; earlier chunks alone; neither (of a distilled model: text alone)."""
RANGES = (5, 4, 3, 2)
"""Chunks that a chunk sees, itself included, in the four stages of its steps."""
NULL_WORDS = 50
SHORTCUT = 12
"""Steps of the shortcut grid, of which every third is twice as long as the others."""


@dataclass(frozen=True, slots=True)
class BranchText:
    """kv: per layer, [films, key heads, words, head_dim]; first: of one more word in front.

    dropped: whether the network is told that text is left out.
    """

    kv: Sequence[KV]
    dropped: bool
    first: Sequence[KV] | None = None

    def layer(self, number: int) -> KV:
        k, v = self.kv[number]
        if self.first is None:
            return k, v
        before = self.first[number]
        return torch.cat([before[0].expand(len(k), -1, -1, -1), k], 2), torch.cat([before[1].expand(len(v), -1, -1, -1), v], 2)


@dataclass(frozen=True, slots=True)
class MagiText:
    """The texts of a run. branches: by name; clean: what goes with finished chunks; durations: K and V of these words, per layer [1, heads, n, D]."""

    branches: Mapping[Hashable, BranchText]
    clean: BranchText
    durations: Sequence[KV] = ()


class MagiAdapter(SquarePatches):
    """`network` in whatever place the caller keeps it, computing in `dtype` (default: that of the weights).

    `distilled`: one of the distilled releases, which is told how long its steps are. `ranges`: chunks that a chunk sees in equal parts of
    its steps; () all that the schedule allows. `durations`: embeddings [n, text_dim] of the words that say how many chunks are still to
    come (0, 1, ...), which stand in front of the prompt; None where there are none.
    """

    name: ClassVar[str] = "magi-1"

    def __init__(self, network: Magi, dtype: torch.dtype | None = None, distilled: bool = False, ranges: Sequence[int] = RANGES,
                 durations: Tensor | None = None) -> None:  # fmt: skip
        self.network, self.dtype, self.distilled, self.ranges, self.durations = network, dtype or network.dtype, distilled, tuple(ranges), durations
        config = network.config
        self.layers, self.heads, self.head_dim, self.width = config.layers, config.kv_heads, config.head_dim, config.dim
        self.query_heads, self.text_channels = config.heads, 2 * config.layers * config.kv_heads * config.head_dim
        self.rotary: Rotary = Rope(lambda: network.rope.bands)

    def with_durations(self, durations: Tensor) -> MagiAdapter:
        """The same adapter, with these embeddings [n, text_dim] of the number of chunks to come."""
        return MagiAdapter(self.network, self.dtype, self.distilled, self.ranges, durations)

    def branch_texts(self, context: Tensor, branches: Sequence[str]) -> dict[str, Tensor]:
        """The prompt goes with all branches of a distilled network; else with the first, and the learned null caption with the others."""
        null = self.network.null_text(NULL_WORDS).to(context).expand(len(context), -1, -1)
        return {NULL: null, **{name: context if name == TEXT or self.distilled else null for name in branches}}

    def words(self, prompt: int, branches: Sequence[str]) -> int:
        """Equal texts are kept once."""
        return prompt + NULL_WORDS + (0 if self.durations is None else len(self.durations))

    def text(self, context: Mapping[str, Tensor]) -> MagiText:
        """Keys and values of every text, those of equal texts once."""
        each = {id(words): words for words in context.values()}
        known = {key: self.network.text_kv(words) for key, words in each.items()}
        texts: dict[Hashable, BranchText] = {
            name: BranchText(known[id(words)], not self.distilled and name != TEXT) for name, words in context.items()
        }
        durations = () if self.durations is None else self.network.text_kv(self.durations.to(context[NULL])[None])
        return MagiText(texts, BranchText(texts[NULL].kv, not self.distilled), durations)

    def text_of(self, text: MagiText, chunk: Chunk, chunks: int) -> MagiText:
        """In front of the prompt, the word for the number of chunks still to come."""
        if not text.durations:
            return text
        number = min(chunks - chunk.index - 1, text.durations[0][0].shape[2] - 1)
        first = [(k[:, :, number : number + 1], v[:, :, number : number + 1]) for k, v in text.durations]
        prompt = text.branches[TEXT].kv
        texts = {name: replace(one, first=first) if one.kv is prompt else one for name, one in text.branches.items()}
        return replace(text, branches=texts)

    def seen(self, chunk: Chunk, branch: Hashable) -> int | None:
        """Finished chunks are passed through the network alone."""
        return 1 if branch == ALONE else self.reach(chunk)

    def reach(self, chunk: Chunk) -> int | None:
        if chunk.committing:
            return 1
        return self.ranges[chunk.step * len(self.ranges) // chunk.steps] if self.ranges else None

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        tokens = self.network.embed(call.x)
        out = self.network.stack(tokens, self._condition(call), self._texts(call), self._rope(call), attend)
        return self.network.velocity(out, self._grid(call)), out - tokens

    def refresh(self, call: Call, tokens: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        grid, short = self._grid(call), self.network.embed_some(call.x, tokens)
        out = self.network.stack(short, self._condition(call), self._texts(call), self._rope(call)[tokens], attend)
        patches = self.network.head(out)
        whole = patches.new_zeros(len(patches), math.prod(grid), patches.shape[2]).index_copy_(1, tokens, patches)
        return self.network.unfold(whole, grid), out - short

    def replay(self, call: Call, residual: Tensor) -> Tensor:
        return self.network.velocity(self.output(call, residual), self._grid(call))

    def output(self, call: Call, residual: Tensor) -> Tensor:
        return self.network.embed(call.x) + residual

    def step_length(self, chunk: Chunk) -> float | None:
        """What a distilled network is told of the length of its steps: half their number, or what the shortcut grid has in its place."""
        if not self.distilled:
            return None
        if chunk.steps == SHORTCUT:
            return 4.0 if chunk.step % 3 == 0 else 8.0
        return chunk.steps / 2

    def _branch_texts(self, call: Call) -> list[BranchText]:
        text: MagiText = call.text
        return [text.clean if call.chunk.committing else text.branches[name] for name in call.branches]

    def _texts(self, call: Call) -> list[LayerText]:
        return [one.layer for one in self._branch_texts(call)]

    def _condition(self, call: Call) -> Tensor:
        chunk, texts = call.chunk, self._branch_texts(call)
        t = torch.full((1,), 1 - call.sigma, dtype=torch.float64, device=call.x.device)
        return self.network.condition(t, [one.dropped for one in texts], len(call.x) // len(texts), self.step_length(chunk), call.x.dtype)

    def _grid(self, call: Call) -> tuple[int, int, int]:
        return call.chunk.frames, call.x.shape[3] // PATCH, call.x.shape[4] // PATCH

    def _rope(self, call: Call) -> Tensor:
        """Made for every evaluation: that is cheap beside the layers, and kept tables would grow with the film."""
        return rope_table(self.network.rope.bands, call.chunk.start, *self._grid(call), call.x.device)
