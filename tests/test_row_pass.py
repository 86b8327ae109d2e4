"""The chunks of a row in one pass through the network: the film and the report of one chunk after the other, with fewer evaluations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowcache_core.bench.around import Around
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores.even import Even
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import Motion
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.planned import Planned
from flowcache_core.run import run as runs
from flowcache_core.run.report import RunReport
from flowcache_core.run.run import Place, RowTurn, Run
from flowcache_core.run.turn import Turn
from flowcache_core.sampling import loop
from flowcache_core.sampling.given import GivenNoise
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule

STEPS = 6
ROLLING = ChunkSchedule(21, 3, STEPS, 3, 2)
FILMS: dict[str, dict[str, Any]] = {
    "all together": {"film": ChunkSchedule(9, 3, STEPS, 0, 3)},
    "one behind the other": {"film": ChunkSchedule(9, 3, STEPS, 2, 3)},
    "rolling": {"film": ROLLING},
    "given start": {"film": ChunkSchedule(10, 3, STEPS, 1, 4, prefix=1), "given": GivenNoise(20, 3)},
    "given end": {"film": ChunkSchedule(11, 3, STEPS, 1, 4, suffix=2)},
    "planned": {"film": ChunkSchedule(9, 3, STEPS, 1, 3), "policy": Planned(share=0.5)},
    "planned, rolling": {"film": ROLLING, "policy": Planned(share=0.6)},
    "two films": {"film": ChunkSchedule(9, 3, STEPS, 1, 3), "films": 2},
}


class Counted:
    """Evaluates two branches; counts the passes and the chunks that went through."""

    def __init__(self, texts: Tensor) -> None:
        self.texts, self.passes, self.chunks = texts.double(), 0, 0

    def __call__(self, turn: Turn, x: Tensor) -> Tensor:
        self.passes, self.chunks = self.passes + 1, self.chunks + (len(turn.chunks) if isinstance(turn, RowTurn) else 1)
        films = len(x)
        text = self.texts.repeat_interleave(films, 0)
        cond, uncond = turn.denoise(x.repeat(2, 1, 1, 1, 1), text, ("cond", "uncond")).chunk(2)
        return uncond + 3 * (cond - uncond)


@pytest.fixture
def run(net: SkyReelsV2) -> Callable[..., Run]:
    def make(films: int = 1, **changes: Any) -> Run:
        adapter = SkyReelsAdapter(copy.deepcopy(net).double(), torch.float64)
        usual = Run(SKYREELS, adapter, ChunkSchedule(9, 3, STEPS, 1, 3), flow_sigmas(STEPS), (16, 4, 4), Place(films, 2, alike=True))
        return replace(usual, **changes)

    return make


def both(run: Run, texts: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[Tensor, RunReport, Counted], ...]:
    """In one pass, and one chunk after the other."""
    made = []
    noise = torch.randn(run.place.films, 16, run.schedule.frames, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for small in (runs.SMALL, 0):
        monkeypatch.setattr(runs, "SMALL", small)
        evaluate, mine = Counted(texts), replace(run)
        assert mine.in_one_pass == bool(small)
        made.append((*mine.sample(noise, evaluate), evaluate))
    return tuple(made)


@pytest.mark.parametrize("name", FILMS)
def test_film_and_report_are_those_of_one_chunk_after_the_other(
    name: str, run: Callable[..., Run], texts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (film, report, row), (apart, usual, each) = both(run(**FILMS[name]), texts, monkeypatch)
    assert float((film - apart).norm() / apart.norm()) < 1e-12
    assert (row.chunks, each.chunks) == (each.passes, each.passes)
    assert row.passes < each.passes
    for what in ("map", "planned", "visits", "row_of", "shares"):
        assert np.array_equal(getattr(report, what), getattr(usual, what)), what
    assert (report.tokens, report.tokens_computed, report.commits, report.kv_peak_bytes, report.host_syncs) == (
        usual.tokens, usual.tokens_computed, usual.commits, usual.kv_peak_bytes, usual.host_syncs,
    )  # fmt: skip
    assert (report.clock.steps > 0).sum() == (usual.clock.steps > 0).sum()


def test_a_row_does_not_see_what_comes_after_it(run: Callable[..., Run], texts: Tensor) -> None:
    """Of two films that differ in the noise of the last chunk the others are the same."""
    mine, noise = run(film=ChunkSchedule(9, 3, STEPS, 0, 3)), torch.randn(1, 16, 9, 4, 4, dtype=torch.float64)
    other = torch.cat([noise[:, :, :6], torch.randn_like(noise[:, :, 6:])], 2)
    one, two = (mine.sample(x, Counted(texts))[0] for x in (noise, other))
    assert torch.equal(one[:, :, :6], two[:, :, :6])
    assert not torch.allclose(one[:, :, 6:], two[:, :, 6:])


def refused() -> dict[str, dict[str, Any]]:
    return {
        "decided on the way": {"policy": Chunkwise()},
        "by token": {"policy": Motion()},
        "in part": {"policy": Multirate()},
        "a budget of history": {"compressor": Compressor(Even(), 2.0)},
        "texts that change": {"recache": frozenset({1})},
        "uneven guidance": {"place": Place(1, 2)},
        "large pictures": {"place": Place(64, 2, alike=True), "latent": (16, 64, 64)},
        "several devices": {"spread": SimpleNamespace(place=0)},
    }


@pytest.mark.parametrize("name", refused())
def test_what_is_made_one_chunk_after_the_other(name: str, run: Callable[..., Run]) -> None:
    assert run().in_one_pass
    mine = object.__new__(Run)
    vars(mine).update({**{k: getattr(run(), k) for k in run().__dataclass_fields__}, **refused()[name]})  # nothing else is asked of the run
    assert not mine.in_one_pass


def test_a_measured_adapter_sees_every_chunk(run: Callable[..., Run]) -> None:
    usual = run()
    assert not replace(usual, adapter=Around(usual.adapter)).in_one_pass


def test_the_longest_evaluation_is_that_of_the_fullest_row(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(film=ChunkSchedule(9, 3, STEPS, 4, 3)).longest == 6
    monkeypatch.setattr(runs, "SMALL", 0)
    assert run(film=ChunkSchedule(9, 3, STEPS, 4, 3)).longest == 3


def test_seconds_are_those_of_one_pass(run: Callable[..., Run], texts: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes as long as one chunk here: a budget that one chunk after the other would use up is then enough for every step."""
    monkeypatch.setattr(loop, "seconds_of", lambda evaluate, chunk, device: (evaluate(chunk), 0.3)[1])
    mine = run(film=ChunkSchedule(9, 3, STEPS, 0, 3), policy=Planned(seconds=0.3 * (STEPS + 2)))
    (_, row, _), (_, apart, _) = both(mine, texts, monkeypatch)
    assert row.tokens_computed == row.tokens
    assert apart.tokens_computed < apart.tokens


def test_an_evaluation_that_fails_leaves_the_next_run_right(run: Callable[..., Run], texts: Tensor) -> None:
    mine, noise = run(), torch.randn(1, 16, 9, 4, 4, dtype=torch.float64)

    def failing(turn: Turn, x: Tensor) -> Tensor:
        if isinstance(turn, RowTurn) and turn.step == 2:
            raise KeyboardInterrupt
        return Counted(texts)(turn, x)

    film, _ = mine.sample(noise, Counted(texts))
    with pytest.raises(KeyboardInterrupt):
        mine.sample(noise, failing)
    assert torch.equal(mine.sample(noise, Counted(texts))[0], film)
