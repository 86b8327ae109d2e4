"""A run that is stopped and goes on, as tests of saved states have it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores.salience import HeadInfo, SalienceHead
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.run.report import RunReport
from flowcache_core.run.run import Film, Run
from flowcache_core.run.states import States
from flowcache_core.run.turn import Turn
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule

STEPS, SIDE = 5, 4
LONG = ChunkSchedule(12, 3, STEPS, 2, window=3)
"""Four chunks in a window of three that rolls on."""
ASIDE = {"wall_s", "seconds", "notes", "saves"}
"""What a report may tell otherwise of a film that was made in pieces."""
Evaluate = Callable[[Turn, Tensor], Tensor]


class Stopped(Exception):
    pass


@dataclass
class Setup:
    """A run, its noise, and who evaluates."""

    run: Run
    noise: Tensor
    evaluate: Evaluate
    evaluations: int = 0
    """Of the run that was made last."""

    def make(self, states: States | None = None, evaluations: int | None = None, observer: Any = None) -> tuple[Tensor, RunReport]:
        """`evaluations`: after so many the run is stopped."""
        self.evaluations = 0

        def counted(turn: Turn, x: Tensor) -> Tensor:
            if self.evaluations == evaluations:
                raise Stopped
            self.evaluations += 1
            return self.evaluate(turn, x)

        return self.run.sample(self.noise, counted, observer, states)

    def make_in_pieces(self, folder: Path, evaluations: Iterable[int]) -> tuple[Tensor, RunReport]:
        for piece in evaluations:
            with pytest.raises(Stopped):
                self.make(States(folder), piece)
        return self.make(States(folder))


def same(one: tuple[Tensor, RunReport], other: tuple[Tensor, RunReport]) -> None:
    assert torch.equal(one[0], other[0])
    mine, theirs = ({key: value for key, value in report.as_dict().items() if key not in ASIDE} for _, report in (one, other))
    assert mine == theirs
    for name in ("visits", "drift", "planned"):
        assert np.array_equal(getattr(one[1], name), getattr(other[1], name)), name


def goes_on(setup: Setup, folder: Path) -> RunReport:
    """Stopped twice, the second time before the first state of its own may be there."""
    whole, count = setup.make(), setup.evaluations
    made = setup.make_in_pieces(folder, (count * 6 // 10, count // 4))
    assert setup.evaluations < count
    same(whole, made)
    assert any(note.startswith("goes on from a saved state") for note in made[1].notes), made[1].notes
    assert not folder.exists(), "a finished film leaves nothing"
    return made[1]


def stopped(made: Setup, folder: Path, evaluations: int = 14) -> Path:
    with pytest.raises(Stopped):
        made.make(States(folder), evaluations)
    (path,) = folder.glob("*.safetensors")
    return path


def resumable(make_net: Callable[..., SkyReelsV2], texts: Tensor, noise_of: Callable[..., Tensor]) -> Callable[..., Setup]:
    """`apart`: the host runs the branches one after the other."""
    nets = cache(lambda layers: make_net(layers=layers))

    def make(film: Film = LONG, policy: CachePolicy | None = None, kv: Compressor | None = None, films: int = 1,
             apart: bool = False, layers: int = 1, **settings: Any) -> Setup:  # fmt: skip
        steps = film.steps if isinstance(film, ChunkSchedule) else film[0].schedule.steps
        run = Run(SKYREELS, SkyReelsAdapter(nets(layers)), film, flow_sigmas(steps), (16, SIDE, SIDE), policy=policy, compressor=kv, **settings)

        def evaluate(turn: Turn, x: Tensor) -> Tensor:
            context = texts.repeat_interleave(films, 0)
            if apart:
                cond, uncond = (turn.denoise(x, context[k * films : (k + 1) * films], (name,)) for k, name in enumerate(("cond", "uncond")))
            else:
                cond, uncond = turn.denoise(x.repeat(2, 1, 1, 1, 1), context, ("cond", "uncond")).chunk(2)
            return uncond + 3 * (cond - uncond)

        return Setup(run, noise_of(film.frames if isinstance(film, ChunkSchedule) else film[-1].end, batch=films), evaluate)

    return make


def save_head(path: Path) -> Path:
    """A salience head of one layer with random weights."""
    SalienceHead(HeadInfo(1, 128, 16, 3, "a test", "none", "none", 0, "none")).save(path)
    return path
