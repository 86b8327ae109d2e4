"""Guidance that evaluates a step again, with blocks skipped: it sees what the step sees, and leaves the film's history as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores import Even, ImportanceRedundancy
from flowcache_core.models.skyreels import Block, SkyReelsConfig, SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import Motion
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.run.run import Run
from flowcache_core.run.turn import Turn
from flowcache_core.sampling.noise import flow_sigmas, timestep
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler

STEPS, SCALE = 8, 3.0
FILM = ChunkSchedule(9, 3, STEPS, 4, 2)
POLICIES = [None, Chunkwise(threshold=0.2, warmup_steps=2), Chunkwise(threshold=0.2, warmup_steps=2, replay="residual"), Planned(share=0.5),
            Multirate(share=0.4), Motion()]  # fmt: skip


class Skipping(SkyReelsV2):
    """The network of the tests, of which one block can be skipped."""

    skipped: int | None = None

    def through(self, layer: int, block: Block, tokens: Tensor, *given: Any) -> Tensor:
        return tokens if layer == self.skipped else super().through(layer, block, tokens, *given)


@pytest.fixture
def skipping(make_net: Callable[..., SkyReelsV2]) -> Skipping:
    plain = make_net(layers=3)
    net = Skipping(SkyReelsConfig(128, 256, 3, plain.config.text_dim, fps=True))
    net.load_state_dict(plain.state_dict())
    return net.eval().requires_grad_(False)


@pytest.fixture
def run(skipping: Skipping) -> Run:
    return Run(SKYREELS, SkyReelsAdapter(skipping), FILM, flow_sigmas(STEPS), (16, 4, 4), solver=Euler())


def plainly(texts: Tensor) -> Callable[[Turn, Tensor], Tensor]:
    return lambda turn, x: turn.denoise(x, texts[:1], ("cond",))


def skipped(net: Skipping, turn: Turn, x: Tensor, texts: Tensor) -> Tensor:
    net.skipped = 1
    try:
        return turn.denoise(x, texts[:1], ("cond",), "skip")
    finally:
        net.skipped = None


def guided(net: Skipping, texts: Tensor, scale: float = SCALE) -> Callable[[Turn, Tensor], Tensor]:
    """Skip-layer guidance: away from what the network says without one of its blocks."""

    def evaluate(turn: Turn, x: Tensor) -> Tensor:
        whole = turn.denoise(x, texts[:1], ("cond",))
        return whole + scale * (whole - skipped(net, turn, x, texts))

    return evaluate


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.title if policy else "uncached")
def test_an_aside_changes_nothing_of_the_step_and_has_its_effect(
    run: Run, skipping: Skipping, noise_of: Any, texts: Tensor, policy: CachePolicy | None
) -> None:
    run = replace(run, policy=policy)
    film, report = run.sample(noise_of(9), plainly(texts))
    beside, other = run.sample(noise_of(9), guided(skipping, texts, scale=0.0))
    assert torch.equal(film, beside)
    assert (report.map == other.map).all()
    guided_film, told = run.sample(noise_of(9), guided(skipping, texts))
    assert torch.isfinite(guided_film).all()
    assert (guided_film - film).abs().mean() > 0.01 * film.abs().mean()
    assert any("guidance asked for" in note for note in told.notes)


@pytest.mark.parametrize("score", [Even(), ImportanceRedundancy()])
@pytest.mark.parametrize("stored", ["as computed", "int8"])
def test_it_leaves_a_bounded_history_alone(run: Run, skipping: Skipping, noise_of: Any, texts: Tensor, score: Any, stored: Any) -> None:
    run = replace(run, compressor=Compressor(score, 1.0, sink=0, dtype=stored))
    film, _ = run.sample(noise_of(9), plainly(texts))
    assert torch.equal(film, run.sample(noise_of(9), guided(skipping, texts, scale=0.0))[0])


def test_skip_layer_guidance_is_what_it_is_by_hand(run: Run, skipping: Skipping, noise_of: Any, texts: Tensor) -> None:
    """Chunk by chunk, one after the other, with keys and values of the finished chunks in lists and attention over their concatenation."""
    one_by_one = replace(run, film=replace(FILM, ar_step=STEPS))
    film, _ = one_by_one.sample(noise_of(9), guided(skipping, texts))

    net, text, levels, x = skipping, skipping.text_kv(texts[:1]), flow_sigmas(STEPS), noise_of(9)
    before: list[list[tuple[Tensor, Tensor]]] = []
    for chunk in range(3):
        part = x[:, :, 3 * chunk : 3 * chunk + 3]

        def velocity(part: Tensor, sigma: float, without: int | None, kept: list[tuple[Tensor, Tensor]], start: int = 3 * chunk) -> Tensor:
            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
                kept.append((k, v))
                keys, values = (torch.cat([*(old[layer][which] for old in before[-1:]), new], 2) for which, new in enumerate((k, v)))
                return torch.nn.functional.scaled_dot_product_attention(q, keys, values)

            net.skipped = without
            return net(part, torch.tensor([[timestep(sigma)]]), text, attend, start)

        for now, then in pairwise(levels):
            whole = velocity(part, now, None, [])
            part = part + (then - now) * (whole + SCALE * (whole - velocity(part, now, 1, [])))
        fresh: list[tuple[Tensor, Tensor]] = []
        velocity(part, 0.0, None, fresh)
        before.append(fresh)
        x[:, :, 3 * chunk : 3 * chunk + 3] = part
    net.skipped = None
    torch.testing.assert_close(film, x, atol=1e-3, rtol=1e-3)


def test_skipping_in_place_of_a_branch_runs_too(run: Run, skipping: Skipping, noise_of: Any, texts: Tensor) -> None:
    """Where the branch has only the evaluation with the block skipped, that one is the step's; commits are whole."""

    def evaluate(turn: Turn, x: Tensor) -> Tensor:
        return turn.denoise(x, texts[:1], ("cond",)) if turn.committing else skipped(skipping, turn, x, texts)

    for policy in POLICIES:
        film, report = replace(run, policy=policy).sample(noise_of(9), evaluate)
        assert torch.isfinite(film).all()
        assert not any("guidance asked for" in note for note in report.notes)


def test_half_a_repetition_is_refused(run: Run, noise_of: Any, texts: Tensor) -> None:
    def evaluate(turn: Turn, x: Tensor) -> Tensor:
        turn.denoise(x, texts[:1], ("cond",))
        return turn.denoise(x.repeat(2, 1, 1, 1, 1), texts, ("cond", "other"))[:1]

    with pytest.raises(RuntimeError, match="bypass that node"):
        run.sample(noise_of(9), evaluate)
