"""A run that several devices share, of which one asks for every evaluation: what the others have to know of it, and how all evaluate together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..kv.compressor import Compressor
from ..kv.scores import KV_POLICIES
from ..models.adapter import DurationTexts, ModelAdapter
from ..models.bundle import BUNDLED
from ..models.family import Family
from ..policies import OF_PRESETS, POLICIES
from ..policies.protocol import CachePolicy
from ..ranks.world import Spread, World
from ..sampling.frames import Frames
from ..sampling.given import GivenNoise
from ..sampling.profile import Profile
from ..sampling.schedule import ChunkSchedule
from ..sampling.solvers import SOLVERS, Solver
from .remembered import KINDS, Reader, Writer
from .run import Place, Run
from .turn import Turn


@dataclass(frozen=True)
class FilmSettings:
    """What a device has to know of a film: a `Run` without its network and place. Names and order of `branches` are those of the device that asks."""

    family: str
    schedule: ChunkSchedule
    sigmas: tuple[float, ...]
    latent: tuple[int, int, int]
    films: int
    branches: tuple[str, ...]
    text_tokens: int
    itemsize: int
    policy: CachePolicy | None
    compressor: Compressor | None
    fps: int
    given: GivenNoise
    solver: Solver
    scale: float
    recache: frozenset[int]

    @classmethod
    def of(cls, run: Run, branches: Sequence[str]) -> FilmSettings:
        """`run`: of the whole film, as on one device."""
        place = run.place
        return cls(
            run.family.name, run.schedule, run.sigmas, run.latent, place.films, tuple(branches), place.text_tokens, place.itemsize, run.policy,
            run.compressor, run.fps, run.given, run.solver, run.scale, run.recache,
        )  # fmt: skip

    def run(self, network: Any, dtype: torch.dtype, device: torch.device, durations: Tensor | None) -> Run:
        """The same run with a network that is here. `durations`: as `DurationTexts` takes them."""
        family = family_named(self.family)
        adapter: ModelAdapter = family.adapter(network, dtype)
        if durations is not None and isinstance(adapter, DurationTexts):
            adapter = adapter.with_durations(durations)
        weights = sum(weight.nbytes for weight in network.parameters())
        place = Place(self.films, len(self.branches), self.text_tokens, weights, self.itemsize, device)
        return Run(family, adapter, self.schedule, self.sigmas, self.latent, place, self.policy, self.compressor, self.fps, self.given, self.solver,
                   self.scale, self.recache)  # fmt: skip

    def as_json(self) -> Any:
        """Raises ValueError for a policy that is none of this package's."""
        writer = Writer(_kinds())
        try:
            written = writer.write(self, "the film")
        except TypeError as error:
            raise ValueError(f"{error}, so that no other device can be given it") from error
        if writer.tensors:
            raise ValueError("the settings of this film hold tensors, which no other device is given")
        return written

    @classmethod
    def from_json(cls, data: Any) -> FilmSettings:
        settings = Reader(_kinds(), _no_tensor, torch.device("cpu")).read(data)
        assert isinstance(settings, cls)
        return settings


def _no_tensor(place: int) -> Tensor:
    raise ValueError(f"there is no tensor {place}")


@cache
def _kinds() -> Mapping[str, type]:
    every = (FilmSettings, ChunkSchedule, Frames, Profile, GivenNoise, Compressor, *SOLVERS, *POLICIES, *OF_PRESETS, *KV_POLICIES, *KINDS)
    return {kind.__qualname__: kind for kind in every}


def family_named(name: str) -> Family:
    return next(family for family in (*models.FAMILIES, *BUNDLED.values()) if family.name == name)


def shared(run: Run, world: World, split_branches: bool = True) -> Run:
    """A run of the whole film -> this device's part of it. `split_branches`: whether devices may evaluate branches of their own, as they may where
    every branch is evaluated at every step. Raises ValueError, with the way out, for a film that these devices cannot share."""
    if run.sections:
        raise ValueError(
            "where every frame of a section sees every other the film is made on one device: set attention to block-causal, or use one device"
        )
    place, guidance = run.place, run.family.guidance
    texts = place.branches * place.films
    world = world if split_branches or guidance.inside else replace(world, branches=1)
    spread = world.spread(run.family, run.adapter, run.schedule, run.latent[1:], run.branches, place.text_tokens // max(texts, 1), place.itemsize,
                          run.policy, run.scale, run.sigmas)  # fmt: skip
    if not (split_branches or guidance.inside) and spread.mesh.branches > 1:
        raise ValueError(
            f"{world.devices} devices cannot share this film: it has {run.adapter.heads} heads of keys, of which every device needs one, and its "
            "guider does not evaluate every text at every step, as CFGGuider does, so texts cannot be shared: use fewer devices"
        )
    own = place.branches if guidance.inside else len(range(place.branches)[spread.own(place.branches)])
    mine = replace(place, branches=own, text_tokens=place.text_tokens * own // max(place.branches, 1))
    return replace(run, adapter=spread.adapter(run.adapter, run.policy, run.compressor), place=mine,
                   compressor=spread.compressor(run.compressor, run.adapter.heads), spread=spread)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """What all devices evaluate. x: [branches * films, C, F, h, w]; context: the branches' text embeddings; `texts`: which these are."""

    x: Tensor
    context: Tensor
    branches: tuple[str, ...]
    texts: Hashable

    def by(self, turn: Turn, run: Run, every: Sequence[str]) -> Tensor:
        """Velocity of all branches, of which this device evaluates its own. `every`: branches of the film, in order."""
        spread = run.spread
        if run.family.guidance.inside or spread.branches.size == 1 or not set(self.branches) <= set(every):
            return turn.denoise(self.x, self.context, self.branches, None, self.texts)
        mine = own_of(self.branches, spread, every)
        films = len(self.x) // len(self.branches)
        whole = torch.zeros_like(self.x, dtype=torch.float32).unflatten(0, (-1, films))
        if mine:
            rows, names = list(mine), tuple(self.branches[k] for k in mine)
            x, context = (one.unflatten(0, (len(self.branches), -1))[rows].flatten(0, 1) for one in (self.x, self.context))
            whole[rows] = turn.denoise(x, context, names, None, (names, self.texts)).float().unflatten(0, (-1, films))
        return spread.branches.total(whole.flatten(0, 1))


def own_of(branches: Sequence[Hashable], spread: Spread, every: Sequence[Hashable]) -> tuple[int, ...]:
    """Places among `branches` of those that this device evaluates."""
    own = {every[k] for k in range(len(every))[spread.own(len(every))]}
    return tuple(k for k, branch in enumerate(branches) if branch in own)


def own_branches(branches: Iterable[Hashable], spread: Spread, every: Sequence[Hashable]) -> list[Hashable]:
    """Those of them that this device evaluates."""
    some = list(branches)
    return some if spread.branches.size == 1 else [some[k] for k in own_of(some, spread, every)]
