"""What a film of a released model takes on a worker of one or several cards, by arithmetic: seconds of every chunk, bytes on each card.

Chunks come one after the other. Seconds of an evaluation are those of `ranks/cost.py`, bytes those of `run/footprint.py`; what is assumed of a
machine beside that stands here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice

import torch

from ..fleet.simulation import FilmTime
from ..models.adapter import Ranged
from ..models.magi_family import MAGI_DISTILLED
from ..models.skyreels_family import SKYREELS
from ..policies.protocol import PartPolicy, PlanPolicy
from ..ranks.cost import Machine, Mesh, Work, fastest, seconds
from ..ranks.group import shares
from ..run.footprint import Footprint
from ..run.run import Run
from ..sampling.chunk import Chunk
from ..sampling.plan import Plan
from ..sampling.schedule import ChunkSchedule
from .cards import GIB, HALF, KEPT_BACK, evaluation, settled
from .geometries import GEOMETRIES, Geometry, Sized
from .model import Arm, arms_of
from .scale import RATE, meshes_of, work_of

DECODED = {SKYREELS.name: 17.74e12, MAGI_DISTILLED.name: 13.92e12}
"""Operations of a VAE's decoder for a latent frame of 960 x 544, counted from its shapes."""
PICTURE = 960 * 544
DECODING, ENCODING = RATE / 4, 100.0
"""Assumed: operations per second of one card in convolutions of a VAE, and frames per second of one machine that encodes video."""
DISK, START = 2e9, 30.0
"""Assumed of a worker's card: bytes per second at which it reads weights and writes and reads states; seconds until its process runs."""


@dataclass(frozen=True)
class Production:
    """Films of `frames` pixel frames by a released model. `arm`: how, one of `arms`."""

    model: str
    arm: str
    frames: int

    @property
    def geometry(self) -> Geometry:
        return GEOMETRIES[self.model]

    @property
    def settings(self) -> Arm:
        return arms_of(self.geometry.family)[self.arm]

    @cached_property
    def _settled(self) -> tuple[Run, int]:
        """The run, one chunk after the other, and the bytes of its weights."""
        return settled(self.geometry, self.frames, self.settings, self.geometry.job.steps)

    @cached_property
    def schedule(self) -> ChunkSchedule:
        return self._settled[0].schedule

    @cached_property
    def plan(self) -> Plan:
        return self._settled[0].plan or Plan.full(self.schedule)

    @cached_property
    def footprint(self) -> Footprint:
        run, weights = self._settled
        return replace(run.held, weights=weights)

    @property
    def branches(self) -> int:
        """That look back on history."""
        guidance = self.geometry.family.guidance
        return len(guidance.remembered(self.geometry.job.cfg))

    def seen(self, chunk: Chunk, branch: object) -> float:
        """Latent frames, those of the chunk included."""
        schedule, ranged, kept = self.schedule, _ranged(self.model), self.settings.history
        reach = ranged.seen(chunk, branch) if ranged else None
        oldest = max(schedule.oldest(chunk.index), chunk.index + 1 - (reach or schedule.chunks))
        history = chunk.start - schedule.span(oldest)[0]
        return chunk.frames + (history if kept is None else min(history, kept * schedule.horizon))

    def evaluation(self, chunk: Chunk) -> Work:
        """One evaluation. Branches that see less than others count by their mean, which is right for one card."""
        geometry, whole = self.geometry, work(self.model)
        guidance, cfg = geometry.family.guidance, geometry.job.cfg
        if chunk.committing:
            names = guidance.remembered(cfg)
        else:
            names = guidance.needed(cfg, _levels(self.model)[chunk.step]) if guidance.inside else guidance.branches(cfg)
        seen = sum(self.seen(chunk, name) for name in names) / len(names)
        frame = whole.tokens // geometry.layout.chunk_frames
        return Work(whole.network, len(names), chunk.frames * frame, round(seen * frame), geometry.words, HALF, committing=chunk.committing)

    @cached_property
    def evaluations(self) -> list[Counter[Work]]:
        """Of every chunk, with its clean pass."""
        clean = [(self.schedule.steps,)] * (self.schedule.chunks - 1) + [()]
        steps = [(*computed, *more) for computed, more in zip(self.plan.computed, clean, strict=True)]
        return [Counter(self.evaluation(self.schedule.at(k, step)) for step in each) for k, each in enumerate(steps)]

    @cached_property
    def states(self) -> list[float]:
        """Bytes of what is saved behind each chunk but the last: keys and values of it, and what the next one sees of those before."""
        one, branches = work(self.model), self.geometry.family.guidance.remembered(self.geometry.job.cfg)
        token = 2 * one.network.layers * one.network.heads * one.network.head_dim * len(branches) * HALF
        after = [self.schedule.at(k, 0) for k in range(1, self.schedule.chunks)]
        seen = [max(self.seen(chunk, name) for name in branches) - chunk.frames for chunk in after]
        return [token * frames * one.tokens / self.geometry.layout.chunk_frames for frames in seen]

    @property
    def decoding(self) -> float:
        """Seconds of the film in the VAE, on one card, and in the encoder."""
        job = self.geometry.job
        whole = DECODED[self.geometry.family.name] * job.width * job.size / PICTURE
        return self.schedule.frames * whole / DECODING + self.frames / ENCODING


def arms(model: str) -> list[str]:
    """Of a model those of which every step is known before the run."""
    known = arms_of(GEOMETRIES[model].family).items()
    return [name for name, arm in known if not arm.upstream and (arm.policy is None or _planned(arm.policy))]


def _planned(policy: object) -> bool:
    return isinstance(policy, PlanPolicy) and not isinstance(policy, PartPolicy) and not policy.seconds


@dataclass(frozen=True)
class Worker:
    """One of a fleet, of several cards that share each film. `sharded`: and the weights of the network."""

    production: Production
    mesh: Mesh
    machine: Machine
    sharded: bool = False

    @classmethod
    @cache
    def of(cls, production: Production, cards: int, machine: Machine, sharded: bool = False) -> Worker:
        """With the fastest mesh; where weights are shared, of those in which all cards run in every step (`World.spread`). Raises ValueError where so
        many cards cannot share the film."""
        one = replace(work(production.model), sharded=sharded)
        always = min((step.branches for step in one.steps), default=one.branches) if sharded else one.branches
        return cls(production, fastest(one, meshes_of(replace(one, branches=always), cards), machine), machine, sharded)

    @property
    def held(self) -> float:
        """Bytes on the card that holds most, while it evaluates: weights, its share of the KV cache and of an evaluation, and the rest whole."""
        one, branches = self.production.footprint, work(self.production.model).branches
        moment = evaluation(self.production.geometry) * _share(branches, self.mesh.branches) / self.mesh.heads
        return self.weights + one.held - one.kv + one.kv * self.kept + moment

    @property
    def weights(self) -> float:
        """Bytes on each card. Where they are shared, its part of all layers, one layer that is gathered, and PyTorch's buffer for that."""
        whole, network = self.production.footprint.weights, work(self.production.model).network
        if not self.sharded:
            return whole
        layers = network.stored * HALF
        return whole - layers + layers * (1 / self.mesh.devices + 2 / network.layers)

    @property
    def kept(self) -> float:
        """Of the KV cache, on the card that holds most of it."""
        return _share(self.production.branches, self.mesh.branches) * _share(work(self.production.model).network.heads, self.mesh.heads)

    def fits(self, card: float) -> bool:
        """A card of so many GiB."""
        return self.held / GIB + KEPT_BACK <= card

    @cached_property
    def chunks(self) -> tuple[float, ...]:
        """Seconds of each in the network."""
        each = cache(lambda work: sum(seconds(replace(work, sharded=self.sharded), self.mesh, self.machine)))
        return tuple(sum(times * each(work) for work, times in one.items()) for one in self.production.evaluations)

    @property
    def seconds(self) -> float:
        """Of a film, without states."""
        return sum(self.chunks) + self.production.decoding

    def film(self, save_every: int) -> FilmTime:
        """With a state after so many chunks, 0 none, of which every card writes its share. The decoder runs on one card."""
        chunks, production = self.chunks, self.production
        every = save_every or len(chunks)
        parts = [sum(islice(chunks, first, first + every)) for first in range(0, len(chunks), every)]
        saves = [size * self.kept / DISK for size in production.states[every - 1 :: every]]
        return FilmTime(tuple(part + save for part, save in zip(parts, [*saves, 0.0], strict=True)), production.decoding)

    @property
    def load(self) -> float:
        """Seconds until a new worker can be used."""
        return START + self.production.footprint.weights / DISK

    @property
    def resume(self) -> float:
        """Seconds until a saved film goes on, at the most."""
        return max(self.production.states, default=0.0) * self.kept / DISK


def _share(count: int, devices: int) -> float:
    return max(shares(count, devices)) / count


@cache
def work(model: str) -> Work:
    """As `scale.work_of` has it."""
    return work_of(GEOMETRIES[model])


@cache
def _ranged(model: str) -> Ranged | None:
    """Its adapter, of one layer, where that looks back less far at some steps."""
    geometry = GEOMETRIES[model]
    adapter = geometry.family.adapter(geometry.family.network(geometry.shortened(1).config, device="meta", dtype=torch.bfloat16), None)
    return adapter if isinstance(adapter, Ranged) else None


@cache
def _levels(model: str) -> tuple[float, ...]:
    geometry = GEOMETRIES[model]
    return tuple(geometry.job.sigmas(Sized.of(geometry)))
