"""The KV cache: per layer one buffer for keys and one for values, allocated once; history first, then the active chunks.

An active chunk writes its own span and attends to one contiguous range that ends with it, so no mask is needed and
nothing is copied: this equals block-causal attention over the whole window. When a chunk becomes history, slots may be given up
(`layout.py` says how many, `keeper.py` which), and what lies behind them moves up.

A slot is the place of one token's key and value in the buffers. Films x branches lie side by side in the batch dimension.

Slots move once a chunk, in place. Of S slots that stay, 2 S are read or written where they move as one piece (a window that moves
on, the latest tokens and the active chunks under a budget), 4 S where they are chosen, by way of a block of scratch, and none of
the sink. A window of 21 latent frames of the 1.3B model at 832 x 480, in chunks of 3 frames, has 60 buffers of 32760 slots, 6.0 GB in
all, of which 5.2 GB stay at each commit:

    form                                          moved per commit   scratch, or slots kept free
    copy aside and back                           20.7 GB            86 MB, a buffer
    in place                                      10.4 GB            none
    rings with as many slots again                1.5 GB             6.0 GB
    buffers one behind the other, each growing
    into what the next has given up               0.02 GB            101 MB, a buffer
    a table of rows, gathered for each call       12 GB a call       201 MB, a layer

By bandwidth and arithmetic 10.4 GB are 1 % of a chunk of four steps or less, and a longer chunk has more steps: the form that needs no memory
is the best. A mask over gaps, or keys in another order, would round otherwise and make other films.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..kernels.attention import attention, heads_apart, heads_together
from ..kernels.segments import attention_with_lse, merge
from ..kernels.slots import keep, move_up, pool, put
from ..kernels.weighted import in_one_call, weighted
from ..network import AttendBySlots, NetworkSizes, Slots
from ..sampling.chunk import Chunk
from .keeper import Choice, Keeper, Segment, side_by_side
from .layout import Capacity, Layout, Range
from .waiting import Waiting

Branches = tuple[Hashable, ...]
Seen = Callable[[Chunk, Hashable], int | None]
"""How many chunks, itself included, a branch of a chunk sees at this step; None: as many as the schedule allows."""
T = TypeVar("T")
Held = dict[str, list[Tensor]]
"""What a cache has in its slots, by kind: a tensor for each layer, or one for its keys and one for its values."""


@dataclass(frozen=True)
class KVSizes:
    """What all caches of a run have in common. `films`: of a batch; `heads`: of keys and values; `capacity`: slots at most, in all.

    `history` and `active`: slots at most of each, where the two are stored apart; `group`: query heads that share a key head.
    """

    films: int
    layers: int
    heads: int
    head_dim: int
    capacity: int
    history: int = 0
    active: int = 0
    group: int = 1

    @classmethod
    def of(cls, network: NetworkSizes, films: int, room: Capacity) -> KVSizes:
        """`films`: side by side; `room`: slots that the run needs."""
        group = network.query_heads // network.heads
        return cls(films, network.layers, network.heads, network.head_dim, room.total, room.history, room.active, group)


class KVCache:
    """Keys after rotation, and values, of all layers for `branches` that run side by side in one batch."""

    def __init__(self, branches: Branches, sizes: KVSizes) -> None:
        self.branches, self.sizes = branches, sizes
        self.syncs = 0
        """How often the host has waited for the device to store history elsewhere, without `waits`."""
        self._buffers: list[tuple[Tensor, Tensor]] = []

    @property
    def bytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self._buffers)

    @property
    def waits(self) -> int:
        """How often it has for the copies of a step."""
        return 0

    def history_bytes(self, kept: int) -> int:
        """Of these, what `kept` slots of history take."""
        return self.bytes * kept // self.sizes.capacity

    def batch_of(self, branches: Branches) -> slice | None:
        """Where some of the branches lie next to each other in the batch, or None."""
        films = self.sizes.films
        for at in range(len(self.branches) - len(branches) + 1):
            if self.branches[at : at + len(branches)] == branches:
                return slice(at * films, (at + len(branches)) * films)
        return None

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [branches x films, heads, capacity, head_dim]."""
        if not self._buffers:
            sizes = self.sizes
            shape = (len(self.branches) * sizes.films, sizes.heads, sizes.capacity, sizes.head_dim)
            self._buffers = [(like.new_empty(shape), like.new_empty(shape)) for _ in range(sizes.layers)]
        return self._buffers[index]

    def write(self, layer: int, batch: slice, at: slice | Tensor, k: Tensor, v: Tensor) -> None:
        """Slots `at` of the buffers, by range or by index."""
        for buffer, fresh in zip(self.layer(layer, k), (k, v), strict=True):
            put(buffer[batch], at, fresh)

    def slots(self, layer: int, batch: slice, at: slice | Tensor, like: Tensor) -> Slots:
        """The same slots, to be written by somebody else."""
        keys, values = self.layer(layer, like)
        return Slots(keys[batch], values[batch], at)

    def own(self, layer: int, batch: slice, at: slice, like: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of an active chunk, to be written in place."""
        keys, values = self.layer(layer, like)
        return keys[batch, :, at], values[batch, :, at]

    def copied(self, layer: int, batch: slice, at: slice | Tensor) -> tuple[Tensor, Tensor]:
        """What is written in these slots of an active chunk."""
        keys, values = (buffer[batch] for buffer in self._buffers[layer])
        if isinstance(at, slice):
            return keys[:, :, at].clone(), values[:, :, at].clone()
        return keys.index_select(2, at), values.index_select(2, at)

    def read(self, layer: int, batch: slice, first: int, end: int) -> tuple[Tensor, Tensor]:
        keys, values = self._buffers[layer]
        return keys[batch, :, first:end], values[batch, :, first:end]

    def join(self, before: int, count: int, after: int) -> None:
        """A finished chunk's `count` slots become history, which ends at `before`: here they lie right behind it already."""

    def keep(self, layer: int, choice: Choice, before: int, after: int) -> None:
        """Of the first `before` slots those of `choice`, of all branches, stay, in order; the `after` slots behind them move up."""
        for buffer in self._buffers[layer]:
            if choice.pooled is not None:
                pool(buffer, choice.pooled)
            keep(buffer, choice.index, before, choice.first, choice.last, after)

    def drop(self, gone: int, stay: int) -> None:
        """The first `gone` slots are given up, the `stay` slots behind them move up."""
        for pair in self._buffers:
            for buffer in pair:
                move_up(buffer, 0, gone, stay)

    def adopt(self, other: KVCache) -> None:
        """Copy the branches that another cache holds: the host has begun to batch them differently."""
        for branch in set(self.branches) & set(other.branches):
            mine, theirs = self.batch_of((branch,)), other.batch_of((branch,))
            for index, (k, v) in enumerate(other._buffers):
                keys, values = self.layer(index, k)
                keys[mine], values[mine] = k[theirs], v[theirs]

    def held(self, kept: int, active: int) -> Held:
        """What is in use, as it is stored: `kept` slots of history under a budget, and `active` ones behind them."""
        return {"buffers": [buffer[:, :, : kept + active] for pair in self._buffers for buffer in pair]}

    def hold(self, held: Held, device: torch.device) -> None:
        """The same back, in place, in buffers on `device`. Raises RuntimeError for tensors of other sizes."""
        for number, saved in enumerate(held["buffers"]):
            like = torch.empty(0, dtype=saved.dtype, device=device)
            self.layer(number // 2, like)[number % 2][:, :, : saved.shape[2]].copy_(saved)

    def free(self) -> None:
        self._buffers.clear()


class CachedAttention(AttendBySlots):
    """Attention of one chunk: writes slots `start`..`end`, sees slots `first`..`end`. One per call of the network.

    With `tokens`, int64 [n] counted from `start`, it writes these slots only; what it sees stays the same, so the queries of
    refreshed tokens meet the fresh slots and the old ones of their own chunk. With a `keeper` and the `chunk`, slots beyond
    the horizon are seen as if they lay within it, and the clean pass of a chunk is shown to the keeper. With `waiting`, the slots
    of its other tokens are written too, as they would be by now. With `ranges`, one per branch, each branch sees no more than its own.
    With `aside` nothing stays written: the chunk's fresh keys and values are seen in this call alone.
    """

    def __init__(self, cache: KVCache, batch: slice, first: int, start: int, end: int, tokens: Tensor | None = None,
                 keeper: Keeper | None = None, chunk: Chunk | None = None, waiting: Waiting | None = None,
                 ranges: tuple[Range | None, ...] = (), aside: bool = False) -> None:  # fmt: skip
        self.cache, self.batch, self.first, self.end, self.ranges, self.aside = cache, batch, first, end, ranges, aside
        self.at = slice(start, end) if tokens is None or waiting else tokens + start
        self.keeper, self.chunk, self.waiting = keeper, chunk, waiting

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        own = self.cache.copied(layer, self.batch, self.at) if self.aside else None
        if self.waiting and isinstance(self.at, slice):
            self.waiting.write(layer, (k, v), self.cache.own(layer, self.batch, self.at, k))
        else:
            self.cache.write(layer, self.batch, self.at, k, v)
        out = self.look(layer, q, x)
        if own is not None:
            self.cache.write(layer, self.batch, self.at, *own)
        return out

    def slots(self, layer: int, like: Tensor) -> Slots | None:
        """None for an aside, after which the slots are as before, and where fresh keys and values are kept for tokens that will wait."""
        return None if self.aside or self.waiting else self.cache.slots(layer, self.batch, self.at, like)

    def look(self, layer: int, q: Tensor, x: Tensor) -> Tensor:
        keys, values = self._seen(layer)
        if self.keeper is None or self.chunk is None:
            return self._ranged(q, keys, values)
        return self._bounded(self.keeper, self.chunk, layer, q, keys, values, x)

    def _seen(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache.read(layer, self.batch, self.first, self.end)

    def _ranged(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        firsts = [self.first if one is None else one.first for one in self.ranges for _ in range(self.cache.sizes.films)]
        if not firsts:
            return attention(q, keys, values)
        return _grouped(firsts, q, lambda first, mine: attention(q[mine], keys[mine, :, first - self.first :], values[mine, :, first - self.first :]))

    def _bounded(self, keeper: Keeper, chunk: Chunk, layer: int, q: Tensor, keys: Tensor, values: Tensor, x: Tensor) -> Tensor:
        films = self.cache.sizes.films
        branches = self.cache.branches[self.batch.start // films : self.batch.stop // films]
        views = []
        for number, (branch, limit) in enumerate(zip(branches, self.ranges or (None,) * len(branches), strict=True)):
            mine = slice(number * films, (number + 1) * films)
            views += keeper.visible(layer, branch, chunk, limit)
            if chunk.committing:
                keeper.observe(layer, branch, chunk, keys[mine], values[mine], q[mine], x[mine])
        return _grouped(views, q, lambda view, mine: self._across(keeper, view[1], q[mine], keys[mine], values[mine], view[0]))

    def _across(self, keeper: Keeper, segments: list[Segment], q: Tensor, keys: Tensor, values: Tensor, first: int = 0) -> Tensor:
        """Attention over segments beyond the horizon, as if each lay within it, and over all that lies behind them, from `first` on.

        A copy of the far keys is turned, and thrown away after the call; or, where they are fewer and that is faster, the queries are turned for each
        segment, whose keys stay as they are. What stands for others counts that many times.
        """
        middle = keeper.middle
        if not segments and not middle.weight:
            return attention(q, keys[:, :, first:], values[:, :, first:])
        far = segments[-1][1] if segments else first
        turns_queries = bool(segments) and len(segments) * q.shape[1] * q.shape[2] <= keys.shape[1] * (far - first)
        if in_one_call(q, keys, middle.weight, not turns_queries):
            start, end = (max(edge - first, 0) for edge in (middle.start, middle.end))
            return weighted(q, self._near(keeper, segments, keys, first), values[:, :, first:], start, end, middle.weight)
        folded = heads_together(q, keys.shape[1])
        pieces = [(folded, keys[:, :, far:], far, keys.shape[2])]
        if turns_queries:
            phases, _ = keeper.turns(segments, q.device)
            back = zip(phases.conj().split(1), segments, strict=True)
            pieces += [(keeper.rotary.turn(folded, turn), keys[:, :, start:end], start, end) for turn, (start, end, _) in back]
        elif segments:
            pieces.append((folded, self._turned(keeper, segments, keys, first), first, far))
        parts = []
        for queries, piece, begin, last in pieces:
            for start, end, weight in middle.cut(begin, last):
                out, lse = attention_with_lse(queries, piece[:, :, start - begin : end - begin], values[:, :, start:end])
                parts.append((out, lse + weight if weight else lse))
        return heads_apart(merge(parts), q.shape[1])

    def _turned(self, keeper: Keeper, segments: list[Segment], keys: Tensor, first: int) -> Tensor:
        """A copy of the keys from `first` on that are beyond the horizon, as if they lay within it."""
        phases, lengths = keeper.turns(segments, keys.device)
        far = segments[-1][1]
        return keeper.rotary.turn(keys[:, :, first:far], phases.repeat_interleave(lengths, 0, output_size=far - first))

    def _near(self, keeper: Keeper, segments: list[Segment], keys: Tensor, first: int) -> Tensor:
        """All keys from `first` on, as if none lay beyond the horizon: a copy where some do."""
        if not segments:
            return keys[:, :, first:]
        return torch.cat([self._turned(keeper, segments, keys, first), keys[:, :, segments[-1][1] :]], 2)


class RowAttention(AttendBySlots):
    """Attention of several chunks of a row whose tokens, `lengths` of each, lie one behind the other: each as `parts` has it, the earliest first.

    A chunk sees the fresh keys and values of those before it, as if it came after them, and none of those behind it.
    """

    def __init__(self, parts: Sequence[CachedAttention], lengths: Sequence[int]) -> None:
        self.parts, self.lengths = parts, tuple(lengths)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        each = zip(self.parts, *(part.split(self.lengths, 2) for part in (q, k, v)), x.split(self.lengths, 1), strict=True)
        return torch.cat([part(layer, *mine) for part, *mine in each], 2)

    def slots(self, layer: int, like: Tensor) -> Slots | None:
        """None where the chunks' slots are no one range, or one of them hands its keys and values over."""
        each = [part.slots(layer, like) for part in self.parts]
        places = [one.at for one in each if one is not None and isinstance(one.at, slice)]
        if each[0] is None or len(places) < len(each) or any(a.stop != b.start for a, b in pairwise(places)):
            return None
        return replace(each[0], at=slice(places[0].start, places[-1].stop))

    def look(self, layer: int, q: Tensor, x: Tensor) -> Tensor:
        each = zip(self.parts, q.split(self.lengths, 2), x.split(self.lengths, 1), strict=True)
        return torch.cat([part.look(layer, *mine) for part, *mine in each], 2)


class BesideHistory:
    """Attention of branches side by side: the first `count` films of the batch as `cached` has it, the others see their own chunk alone."""

    def __init__(self, cached: CachedAttention, count: int) -> None:
        self.cached, self.count = cached, count

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        if not self.count:
            return attention(q, k, v)
        first, n = (part[: self.count] for part in (q, k, v, x)), self.count
        return torch.cat([self.cached(layer, *first), attention(q[n:], k[n:], v[n:])])


def _grouped(views: Sequence[T], q: Tensor, attend: Callable[[T, slice], Tensor]) -> Tensor:
    """What each film of each branch sees -> attention, of neighbours that see the same in one call."""
    groups, at = [], 0
    for view, same in groupby(views):
        end = at + len(list(same))
        groups.append((view, slice(at, end)))
        at = end
    if len(groups) == 1:
        return attend(groups[0][0], slice(None))
    out = torch.empty_like(q)
    for view, mine in groups:
        out[mine] = attend(view, mine)
    return out


def _shapes(held: Held) -> dict[str, list[torch.Size]]:
    return {kind: [tensor.shape for tensor in tensors] for kind, tensors in held.items()}


class KVStore:
    """The caches of a run; every branch lives in exactly one. Usually one cache; two where the host runs the branches apart."""

    remembers: ClassVar[tuple[str, ...]] = ("layout", "keeper", "held", "gone", "_waiting", "_written")
    copied: ClassVar[str] = "held"
    _waiting: dict[tuple[int, Branches], Waiting]
    _written: dict[Hashable, set[int]]
    """By branch, the chunks of which it has keys and values."""

    def __init__(self, sizes: KVSizes, layout: Layout, keeper: Keeper | None = None, make: Callable[[Branches], KVCache] | None = None,
                 waits: Callable[[int], bool] = lambda index: False, seen: Seen | None = None) -> None:  # fmt: skip
        """`waits`: whether tokens of a chunk may wait while others of it are computed; `seen`: for a network that lets some steps
        or branches see fewer chunks than the schedule allows."""
        self.sizes, self.layout, self.keeper, self.waits, self.seen = sizes, layout, keeper, waits, seen
        self._new = make or (lambda branches: KVCache(branches, sizes))
        self.gone: frozenset[int] = frozenset()
        """Chunks of which nothing is kept: no branch needs to have run for them."""
        self._caches: list[KVCache] = []
        self._waiting = {}
        self._written = {}

    @property
    def bytes(self) -> int:
        return sum(cache.bytes for cache in self._caches) + sum(one.bytes for one in self._waiting.values())

    @property
    def syncs(self) -> int:
        return sum(cache.syncs + cache.waits for cache in self._caches)

    @property
    def has_history(self) -> bool:
        """Whether a branch that looks back is evaluated here; of a film that devices share others may have all of them."""
        return any(cache.branches for cache in self._caches)

    @property
    def history_bytes(self) -> int:
        """What the slots of a history under a budget take, wherever they lie."""
        return sum(cache.history_bytes(self.layout.kept) for cache in self._caches)

    def attention(self, branches: Branches, chunk: Chunk, tokens: Tensor | None = None, replaced: bool = False,
                  aside: bool = False) -> CachedAttention:  # fmt: skip
        """What the network attends with when these branches of a chunk run. Raises ValueError where one of them has no history.

        `replaced`: with other blocks than the network's own, so that nothing is drawn on from their keys and values; `aside`: after the
        branches have run at this step, which leaves the cache as it is.
        """
        place = self.layout.begin(chunk.index)
        ranges = self._ranges(branches, chunk)
        self._require_history(branches, chunk, ranges)
        cache, batch = self.of(branches)
        waiting = None
        if self.waits(chunk.index) and not (chunk.committing or replaced or aside):
            waiting = self._waiting.setdefault((chunk.index, branches), Waiting(self.layout.spans[chunk.index][1]))
            waiting.begin(chunk.step, tokens)
        return CachedAttention(cache, batch, *place, tokens, self.keeper, chunk, waiting, ranges, aside)

    def _require_history(self, branches: Branches, chunk: Chunk, ranges: tuple[Range | None, ...]) -> None:
        """Notes that the branches ran for the chunk. Raises ValueError for one that did not run for an earlier chunk that it sees."""
        for branch, limit in zip(branches, ranges or (None,) * len(branches), strict=True):
            oldest = self.layout.oldest(chunk.index) if limit is None else limit.oldest
            written = self._written.setdefault(branch, set())
            missing = next((index for index in range(oldest, chunk.index) if index not in written and index not in self.gone), None)
            if missing is not None:
                raise ValueError(
                    f"chunk {chunk.index + 1} is guided by a branch that did not run for chunk {missing + 1}, on which it looks back: there are no "
                    "keys and values for it. Let every prompt count at all steps and noise levels, without a time range, or set cfg to 1"
                )
            written.add(chunk.index)

    def _ranges(self, branches: Branches, chunk: Chunk) -> tuple[Range | None, ...]:
        """One per branch; () where all of them see what the schedule allows."""
        seen = [self.seen(chunk, branch) for branch in branches] if self.seen else []
        if all(count is None for count in seen):
            return ()
        return tuple(None if count is None else self.layout.range(chunk.index, count) for count in seen)

    def can_wait(self, branches: Branches, chunk: Chunk) -> bool:
        """Whether the keys and values of tokens that are not computed can be drawn on for these branches."""
        waiting = self._waiting.get((chunk.index, branches))
        return waiting is not None and waiting.drawn

    def forget(self, index: int) -> None:
        """A chunk is finished: nothing of it waits any more."""
        self._waiting = {key: waiting for key, waiting in self._waiting.items() if key[0] != index}

    def settle(self, chunk: Chunk) -> None:
        """A finished chunk, clean by now, becomes history; what no later chunk will see goes, or what the budget has no room for."""
        count = self.layout.spans[chunk.index][1]
        history, stays = self.layout.settle(chunk.index)
        if self.keeper is None:
            for cache in self._caches if stays < history else ():
                cache.drop(history - stays, stays)
            return
        if not self.has_history:
            return
        self.keeper.meet(branch for cache in self._caches for branch in cache.branches)
        chosen = [[self.keeper.settle(chunk, branch, stays) for branch in cache.branches] for cache in self._caches]
        self.keeper.send()
        for cache, branches in zip(self._caches, chosen, strict=True):
            cache.join(history - count, count, self.layout.active)
            for layer, choices in enumerate(zip(*branches, strict=True)):
                if (choice := side_by_side(choices)) is not None:
                    cache.keep(layer, choice, history, self.layout.active)

    def of(self, branches: Branches) -> tuple[KVCache, slice]:
        """The cache that holds these branches, in this order, and where they lie in its batch."""
        for cache in self._caches:
            if (batch := cache.batch_of(branches)) is not None:
                return cache, batch
        fresh = self._new(branches)
        for cache in [c for c in self._caches if set(c.branches) & set(branches)]:
            fresh.adopt(cache)
            if rest := tuple(b for b in cache.branches if b not in branches):
                apart = self._new(rest)
                apart.adopt(cache)
                self._caches.append(apart)
            cache.free()
            self._caches.remove(cache)
        self._caches.append(fresh)
        return fresh, slice(0, len(branches) * self.sizes.films)

    @property
    def held(self) -> list[tuple[Branches, int, Held]]:
        """Of every cache its branches, how often the host has waited for it, and its slots in use."""
        return [(cache.branches, cache.syncs + cache.waits, cache.held(self.layout.kept, self.layout.active)) for cache in self._caches]

    def take_in(self, value: list[tuple[Branches, int, Held]], device: torch.device) -> None:
        """What was `held`, in caches of its own. Raises ValueError for other slots than those of the layout."""
        self._caches = [self._new(branches) for branches, _, _ in value]
        for cache, (_, syncs, slots) in zip(self._caches, value, strict=True):
            cache.hold(slots, device)
            cache.syncs = syncs
            if _shapes(slots) != _shapes(cache.held(self.layout.kept, self.layout.active)):
                raise ValueError("its KV cache has other slots than this run")

    def free(self) -> None:
        for cache in self._caches:
            cache.free()
        self._caches.clear()
        self._waiting.clear()
        self._written.clear()
        if self.keeper:
            self.keeper.free()
