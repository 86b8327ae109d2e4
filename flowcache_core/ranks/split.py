"""A chunk over several devices: each runs some of its tokens through the layers, and attention for some of the heads (DeepSpeed-Ulysses,
arXiv 2309.14509, section 3.1).

Around the attention of every layer an all-to-all turns tokens into heads and back, so the KV cache of a device holds its own heads alone.
The network is the adapter's own, run by `refresh` for the device's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from ..kv.policy import KVPolicy, KVView, SharedKVPolicy
from ..models.adapter import Call, ModelAdapter, TokenAdapter
from ..network import Attend
from .group import Group, shares

P = TypeVar("P", bound=KVPolicy)


def parts(sizes: Sequence[int]) -> list[slice]:
    """Neighbouring ranges of these sizes, from 0 on."""
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


@dataclass(frozen=True)
class Tokens:
    """Runs an adapter for a part of the tokens. `heads`: of keys, by device; `residual`: whether the whole residual is wanted; `hidden`: whether
    a KV policy looks at what the layers are given."""

    inner: TokenAdapter
    group: Group
    heads: tuple[int, ...]
    residual: bool
    hidden: bool

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        count = call.chunk.frames * self.inner.tokens_per_frame(*call.x.shape[3:])
        return self.refresh(call, torch.arange(count, device=call.x.device), attend)

    def refresh(self, call: Call, tokens: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        sizes = shares(len(tokens), self.group.size)
        together = self.inner.query_heads // self.inner.heads
        across = ByHeads(attend, self.group, self.heads, sizes, together, self.hidden and call.chunk.committing)
        velocity, residual = self.inner.refresh(call, tokens[parts(sizes)[self.group.rank]], across)
        return self.group.total(velocity), self.group.gathered(residual, 1, sizes) if self.residual else residual


@dataclass(frozen=True)
class ByHeads:
    """Attention of all tokens for this device's heads, from the device's tokens for all heads. `heads` of keys and `tokens`: by device;
    `together`: query heads that share a key head."""

    attend: Attend
    group: Group
    heads: Sequence[int]
    tokens: Sequence[int]
    together: int
    hidden: bool

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        hidden = self.group.gathered(x, 1, self.tokens) if self.hidden else x
        q, k, v = self._to_heads(q, k, v)
        return self._to_tokens(self.attend(layer, q, k, v, hidden))

    def _to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, heads, own tokens, D] each -> [B, own heads, tokens, D] each."""
        queries, keys, mine = parts(self._query_heads), parts(self.heads), self.heads[self.group.rank]
        pieces = [torch.cat([q[:, a], k[:, b], v[:, b]], 1) for a, b in zip(queries, keys, strict=True)]
        together = (self.together + 2) * mine
        whole = torch.cat(self.group.exchange(pieces, [(len(q), together, count, q.shape[3]) for count in self.tokens]), 2)
        q, k, v = whole.split([self.together * mine, mine, mine], 1)
        return q, k, v

    def _to_tokens(self, out: Tensor) -> Tensor:
        """[B, own heads, tokens, D] -> [B, heads, own tokens, D]."""
        count = self.tokens[self.group.rank]
        shapes = [(len(out), heads, count, out.shape[3]) for heads in self._query_heads]
        return torch.cat(self.group.exchange(out.split(list(self.tokens), 2), shapes), 1)

    @property
    def _query_heads(self) -> list[int]:
        return [self.together * heads for heads in self.heads]


def split_adapter(adapter: ModelAdapter, group: Group, residual: bool, hidden: bool) -> ModelAdapter:
    """The same adapter for a device of `group`: it has this device's heads, and runs its tokens. Raises ValueError, with the way out."""
    if group.size == 1:
        return adapter
    if not isinstance(adapter, TokenAdapter):
        raise ValueError(f"devices share a chunk by its tokens, and {adapter.name} cannot run single tokens here: use one device for each branch")
    heads = shares(adapter.heads, group.size)
    mine, tokens = copy(adapter), Tokens(adapter, group, tuple(heads), residual, hidden)
    own = heads[group.rank]
    vars(mine).update(
        heads=own, query_heads=own * (adapter.query_heads // adapter.heads), forward=tokens.forward, refresh=tokens.refresh
    )  # fmt: skip
    return mine


@dataclass(frozen=True)
class JoinedScores:
    """The scores of all heads, of which each device gives its own: so every device keeps the same slots. `heads`: by device."""

    policy: KVPolicy
    group: Group
    heads: tuple[int, ...]

    def score(self, view: KVView) -> Tensor:
        """-> float32 [B, H, N]."""
        return self.group.gathered(self.policy.score(view), 1, self.heads)


def split_policy(policy: P, group: Group, heads: int) -> P:
    """The same KV policy for a device of `group`, of a network with so many key heads in all."""
    if group.size == 1 or isinstance(policy, SharedKVPolicy):
        return policy
    mine = copy(policy)
    vars(mine)["score"] = JoinedScores(policy, group, tuple(shares(heads, group.size))).score
    return mine
