"""What an evaluation of one chunk costs on several devices: operations, bytes sent, seconds. Arithmetic; the bytes are exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .group import ring_bytes, shares

SCORE = 4
"""Bytes of a score."""


@dataclass(frozen=True)
class Machine:
    """One of several devices that are alike.

    `rate`: operations per second (a product counts twice) while all compute; `alone`: the same while the others are idle; `memory`: bytes per
    second that it reads weights at; `link`: bytes per second that it sends; `latency`: seconds of a collective of nothing.
    """

    rate: float
    alone: float
    memory: float
    link: float
    latency: float


@dataclass(frozen=True)
class Network:
    """Sizes of a network. `weights`: numbers by which every token of the chunk is multiplied; `cells`: numbers of a token's velocity; `stored`:
    numbers of all its layers."""

    layers: int
    width: int
    heads: int
    query_heads: int
    head_dim: int
    weights: int
    cells: int
    stored: int = 0


@dataclass(frozen=True)
class Step:
    """In what one evaluation of a chunk differs from the others: branches that run, slots that are seen, whether it is the commit pass."""

    branches: int
    seen: int
    committing: bool = False


@dataclass(frozen=True)
class Work:
    """One evaluation.

    `branches`: films x branches; `tokens`: of the chunk, or those that are refreshed, 0 where an output is replayed; `seen`: slots that they
    attend to; `words`: of text; `chunk_tokens`: 0 where all tokens run; `residual`: whether it is gathered; `remembered`: the first so many
    branches look back on history, None all, the others see their chunk alone; `committing`: of a finished chunk no velocity is exchanged;
    `steps`: the evaluations of a chunk, where they differ; `sharded`: whether a device holds its share of the weights alone.
    """

    network: Network
    branches: int
    tokens: int
    seen: int
    words: int
    itemsize: int
    chunk_tokens: int = 0
    residual: bool = False
    remembered: int | None = None
    committing: bool = False
    steps: tuple[Step, ...] = ()
    sharded: bool = False

    @property
    def evaluations(self) -> list[Work]:
        """One by one, of a chunk."""
        return [replace(self, branches=one.branches, seen=one.seen, committing=one.committing, steps=()) for one in self.steps] or [self]

    @property
    def with_history(self) -> int:
        """Branches that see history."""
        return self.branches if self.remembered is None else min(self.remembered, self.branches)


@dataclass(frozen=True)
class Mesh:
    """Along how many devices the branches of guidance are shared, and along how many tokens and heads."""

    branches: int = 1
    heads: int = 1

    @property
    def devices(self) -> int:
        return self.branches * self.heads


def meshes(devices: int, branches: int, heads: int) -> list[Mesh]:
    """All ways to use so many devices. Raises ValueError, with the numbers that work, where there is none."""
    found = [Mesh(along, devices // along) for along in range(1, branches + 1) if devices % along == 0 and devices // along <= heads]
    if not found:
        fitting = sorted({one * other for one in range(1, branches + 1) for other in range(1, heads + 1) if one * other < devices})
        raise ValueError(
            f"{devices} devices cannot share this film: its network has {heads} heads of keys, of which every device needs one, and {branches} "
            f"evaluations of guidance can be shared; use {', '.join(map(str, fitting[-4:]))} devices"
        )
    return found


def operations(work: Work, branches: int, with_history: int, tokens: int, heads: float) -> float:
    """Of the layers for `tokens` of the tokens of so many branches, with attention of all tokens for `heads` of the query heads. So many of
    them `with_history`; the others see their chunk alone."""
    network = work.network
    linear = 2 * network.weights * tokens + 4 * network.layers * tokens * work.words * network.query_heads * network.head_dim
    seen = with_history * work.seen + (branches - with_history) * _chunk(work)
    return branches * linear + 4 * network.layers * work.tokens * seen * heads * network.head_dim


def sent_bytes(work: Work, mesh: Mesh, place: tuple[int, int] = (0, 0)) -> int:
    """By the device at this place along branches and heads, for one evaluation."""
    branches = shares(work.branches, mesh.branches)[place[0]]
    return _along_heads(work, mesh.heads, place[1], branches) + _along_branches(work, mesh.branches, branches)


def kept_bytes(work: Work, mesh: Mesh, place: tuple[int, int], slots: int, hidden: bool = False) -> int:
    """On top, where a finished chunk joins a history under a budget: scores of so many slots, or, where the KV policy scores each token by
    what the layers are given (`hidden`), that."""
    branches, network = shares(work.with_history, mesh.branches)[place[0]], work.network
    tokens = shares(work.tokens, mesh.heads)[place[1]] * network.width * work.itemsize
    scores = shares(network.heads, mesh.heads)[place[1]] * slots * SCORE
    return (mesh.heads - 1) * network.layers * branches * (tokens if hidden else scores)


def _along_heads(work: Work, devices: int, mine: int, branches: int) -> int:
    if devices == 1 or not work.tokens:
        return 0
    network, heads, tokens = work.network, shares(work.network.heads, devices), shares(work.tokens, devices)
    together = network.query_heads // network.heads
    there = (together + 2) * (network.heads - heads[mine]) * tokens[mine]
    back = together * heads[mine] * (work.tokens - tokens[mine])
    attention = network.layers * branches * (there + back) * network.head_dim * work.itemsize
    residual = (devices - 1) * branches * tokens[mine] * network.width * work.itemsize if work.residual else 0
    return attention + residual + ring_bytes(branches * _chunk(work) * network.cells * work.itemsize, devices)


def _along_branches(work: Work, devices: int, branches: int) -> int:
    return 0 if work.committing else (devices - 1) * branches * _chunk(work) * work.network.cells * work.itemsize


def _chunk(work: Work) -> int:
    return work.chunk_tokens or work.tokens


def collectives(work: Work, mesh: Mesh) -> int:
    """Of one evaluation."""
    along_heads = 2 * work.network.layers + 1 + work.residual if mesh.heads > 1 else 0
    return along_heads + (mesh.branches > 1 and not work.committing)


def seconds(work: Work, mesh: Mesh, machine: Machine) -> tuple[float, float]:
    """Of the device that has most to do: computing and sending, one after the other. Where the evaluations of a chunk differ, their mean."""
    return mean(work, lambda one: _computing(one, mesh, machine)), mean(work, lambda one: _sending(one, mesh, machine))


def mean(work: Work, of: Callable[[Work], float]) -> float:
    """Over the evaluations of a chunk."""
    return sum(map(of, work.evaluations)) / len(work.evaluations)


def _computing(work: Work, mesh: Mesh, machine: Machine) -> float:
    branches, network = max(shares(work.branches, mesh.branches)), work.network
    with_history = max(shares(work.with_history, mesh.branches))
    tokens = max(shares(work.tokens, mesh.heads))
    heads = max(shares(network.heads, mesh.heads)) * network.query_heads / network.heads
    rate = machine.alone if mesh.devices == 1 else machine.rate
    return max(operations(work, branches, with_history, tokens, heads) / rate, network.weights * work.itemsize / machine.memory)


def _sending(work: Work, mesh: Mesh, machine: Machine) -> float:
    sent = sent_bytes(work, mesh) + weight_bytes(work, mesh)
    return sent / machine.link + (collectives(work, mesh) + work.network.layers * (work.sharded and mesh.devices > 1)) * machine.latency


def weight_bytes(work: Work, mesh: Mesh) -> int:
    """Of the layers, that each device sends for one evaluation where it holds its share of them alone: its share to every other."""
    return work.network.stored * work.itemsize * (mesh.devices - 1) // mesh.devices if work.sharded else 0


def ratio(work: Work, mesh: Mesh, machine: Machine) -> float:
    """How many times as fast as one device."""
    return sum(seconds(work, Mesh(), machine)) / sum(seconds(work, mesh, machine))


def fastest(work: Work, choices: Sequence[Mesh], machine: Machine) -> Mesh:
    """The one of these that takes the least time; of equals the one that sends less."""
    return min(choices, key=lambda mesh: (sum(seconds(work, mesh, machine)), sent_bytes(work, mesh)))


# a row of chunks, each on one device


@dataclass(frozen=True)
class Row:
    """The evaluations of a row, one for each active chunk, the oldest first; `past`: slots of history that they see between them."""

    each: tuple[Work, ...]
    past: int

    @property
    def slots(self) -> int:
        """Of history and active chunks."""
        return self.past + sum(one.tokens for one in self.each)

    def by_heads(self, mesh: Mesh, machine: Machine) -> float:
        """Seconds, one chunk after the other, each by all devices."""
        return sum(sum(seconds(one, mesh, machine)) for one in self.each)

    def by_chunks(self, mesh: Mesh, machine: Machine, whole: bool) -> float:
        """Seconds where the devices along heads have chunks instead, layer by layer at the same time. `whole`: all have all of history."""
        computing = max(sum(_computing(self.each[k], Mesh(mesh.branches), machine) for k in mine) for mine in self.dealt(mesh.heads))
        per_layer = 1 if whole else 2
        latency = (per_layer * self.each[0].network.layers + (mesh.branches > 1)) * machine.latency
        return computing + self.chunk_bytes(mesh, whole) / machine.link + latency

    def dealt(self, devices: int) -> list[list[int]]:
        """The numbers of the chunks of each device: one after another, the longest first, to the device that has least to do."""
        unit = Machine(1.0, 1.0, math.inf, 1.0, 0.0)
        cost, mine = [_computing(one, Mesh(), unit) for one in self.each], [list[int]() for _ in range(devices)]
        for number in sorted(range(len(cost)), key=lambda number: -cost[number]):
            min(mine, key=lambda some: sum(cost[k] for k in some)).append(number)
        return mine

    def chunk_bytes(self, mesh: Mesh, whole: bool) -> float:
        """Sent or received, whichever is more, by the device that has most of it: keys and values of its chunks to devices with later ones,
        velocities to all, and where history is not `whole` everywhere, an even part of it of every device to all others, or queries there and
        outputs back if that is less."""
        network, dealt, branches = self.each[0].network, self.dealt(mesh.heads), max(shares(self.each[0].with_history, mesh.branches))
        number = network.layers * branches * self.each[0].itemsize * network.head_dim
        keys, queries = 2 * network.heads * number, network.query_heads * number
        tokens, others = [one.tokens for one in self.each], mesh.heads - 1
        sent = [sum(tokens[k] * sum(any(later > k for later in theirs) for theirs in dealt if theirs is not mine) for k in mine) for mine in dealt]
        received = [sum(tokens[k] for k in range(max(mine, default=0)) if k not in mine) for mine in dealt]
        most = max(sum(tokens[k] for k in mine) for mine in dealt)
        velocities = most * (mesh.devices - 1) * branches * network.cells * self.each[0].itemsize
        active = max(map(max, zip(sent, received, strict=True))) * keys + velocities
        if whole:
            return active
        asking = (most * others + sum(tokens)) * queries
        return active + min(self.past * others / mesh.heads * keys, asking)

    def chunk_cache(self, mesh: Mesh, whole: bool) -> float:
        """Bytes of keys and values on a device: of all active chunks, and of all of history or an even part."""
        held = self.slots - self.past + self.past / (1 if whole else mesh.heads)
        return self.cache(mesh.branches) * held / self.slots

    def cache(self, devices: int) -> float:
        """Bytes of all keys and values, of the branches of one of so many devices."""
        one = self.each[0]
        network, branches = one.network, max(shares(one.with_history, devices))
        return 2 * network.layers * network.heads * network.head_dim * branches * self.slots * one.itemsize
