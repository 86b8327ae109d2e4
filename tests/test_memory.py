"""What a run really holds, by an account of every storage that an operation makes: not by the formula that forecasts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from flowcache_core.kv.cache import KVSizes
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.layout import capacity
from flowcache_core.kv.named import policy_named
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import Motion
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.protocol import CachePolicy, PartPolicy
from flowcache_core.run.footprint import Footprint, footprint
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import UniPC
from tests.driven import Driven
from tests.ledger import Ledger
from tests.toy_family import TOY, ToyAdapter, toy_network

CHANNELS, SIDE = 16, 8
BRANCHES = ("cond", "uncond")
FILM_FRAME = 2 * 4 * CHANNELS * SIDE**2 + 4 * (SIDE // 2) ** 2
"""Bytes of one more latent frame of the film itself: twice its latents, and how often each of its tokens ran."""
RULE = Chunkwise(0.6, 2)
RESIDUAL = Chunkwise(0.6, 2, replay="residual")


def motion(measure: str, base: Chunkwise = RULE) -> Motion:
    """At these thresholds and eight steps some are replayed, and some in part."""
    return Motion(0.6, base=base, coarse=0.3, measure=measure, min_refresh=0.0)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    """A film with two branches in one batch."""

    policy: CachePolicy | None = None
    frames: int = 9
    steps: int = 8
    ar_step: int = 3
    window: int | None = None
    kv: str = ""
    dtype: str = "as computed"

    @property
    def schedule(self) -> ChunkSchedule:
        return ChunkSchedule(self.frames, 3, self.steps, self.ar_step, self.window)

    def held(self, net: SkyReelsV2, texts: Tensor) -> tuple[Footprint, int]:
        """What it was said to hold, and the most that was alive whenever the network was about to run."""
        adapter, schedule, levels = SkyReelsAdapter(net), self.schedule, flow_sigmas(self.steps)
        ledger, most = Ledger(*net.parameters(), texts), 0
        budget, bounded = None, None
        if self.kv:
            budget = Compressor(policy_named(self.kv, ""), 2.0, dtype=self.dtype).budget_for(adapter, schedule, (SIDE, SIDE), 24, 2, 4)  # type: ignore[arg-type]
            bounded = budget.bytes(KVSizes.of(adapter, 1, capacity(schedule, adapter.tokens_per_frame(SIDE, SIDE), budget.slots)), 2, 4)
        plan = self.policy.plan(schedule) if isinstance(self.policy, PartPolicy) else None
        said = footprint(adapter, schedule, (CHANNELS, SIDE, SIDE), 2, 2 * texts.shape[1], 4, self.policy, bounded=bounded, plan=plan)
        with ledger, Session(adapter, schedule, levels, (SIDE, SIDE), policy=self.policy, budget=budget) as session:

            def predict(x: Tensor, chunk: Chunk) -> Tensor:
                nonlocal most
                most = max(most, ledger.held(x))
                cond, uncond = session.denoise(x.repeat(2, 1, 1, 1, 1), chunk, texts, BRANCHES).chunk(2)
                return uncond + 3 * (cond - uncond)

            noise = torch.randn(1, CHANNELS, self.frames, SIDE, SIDE)
            sample_chunks(Driven(predict, session), noise, schedule, levels, UniPC())  # fmt: skip
        return said, most


RUNS: dict[str, Run] = {
    "uncached": Run(),
    "uncached in a window": Run(None, 18, 4, 2, window=2),
    "planned": Run(Planned(share=0.5)),
    "velocity": Run(RULE),
    "residual": Run(RESIDUAL),
    "latent signature": Run(Chunkwise(0.1, 2, signature="latent")),
    **{f"motion {measure}": Run(motion(measure)) for measure in ("clean", "noisy", "output", "change")},
    **{f"motion {measure}, residual": Run(motion(measure, RESIDUAL)) for measure in ("clean", "noisy", "output", "change")},
    "motion-plan": Run(Multirate(share=0.5), steps=12),
    "budget": Run(None, 30, 4, 2, kv="importance-redundancy"),
    "budget beyond the horizon": Run(None, 30, 4, 2, window=2, kv="even"),
    "budget int8": Run(None, 30, 4, 2, kv="importance-redundancy", dtype="int8"),
    "budget int4, residual": Run(RESIDUAL, 18, 8, 3, kv="r-kv", dtype="int4"),
    "budget motion-plan": Run(Multirate(share=0.5), 18, 12, 3, kv="even"),
    "all chunks together": Run(RULE, ar_step=0),
    "last chunk short": Run(RESIDUAL, frames=11),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_holds_what_its_footprint_said(name: str, net: SkyReelsV2, texts: Tensor) -> None:
    """To one part in twenty, and never more, but for what a budget notes of every chunk: a few bytes, and the turn of one that lies far back."""
    said, held = RUNS[name].held(net, texts)
    assert 0.95 * said.held <= held <= (1.01 if RUNS[name].kv else 1) * said.held


def test_the_text_is_counted_as_the_network_keeps_it() -> None:
    """Here not as keys and values of every layer, and not in the heads of self-attention; each chunk adds one word to it."""
    network, schedule, levels, words = toy_network(), ChunkSchedule(4, 2, 4, 4), TOY.noise.levels(4, 3.0), 500
    adapter, contexts = ToyAdapter(network), torch.randn(3, words, network.config.text_dim)
    assert adapter.text_channels not in (2 * adapter.layers * adapter.heads * adapter.head_dim, 2 * adapter.layers * adapter.width)
    expected = footprint(adapter, schedule, (CHANNELS, SIDE, SIDE), 3, 3 * words, 4, None)
    ledger, most = Ledger(*network.parameters(), contexts), 0
    with ledger, Session(adapter, schedule, levels, (SIDE, SIDE)) as session:

        def predict(x: Tensor, chunk: Chunk) -> Tensor:
            nonlocal most
            most = max(most, ledger.held(x))
            return session.denoise(x.repeat(3, 1, 1, 1, 1), chunk, contexts, ("text", "null", "alone"))[:1]

        sample_chunks(Driven(predict, session), torch.randn(1, CHANNELS, 4, SIDE, SIDE), schedule, levels, UniPC())
    assert expected.text > expected.held / 2
    word = 3 * adapter.text_channels * 4
    assert 0.95 * expected.held <= most <= expected.held + word


LONG: dict[str, Callable[[int], Run]] = {
    "uncached": lambda frames: Run(None, frames, 4, 2, window=2),
    "chunkwise": lambda frames: Run(RESIDUAL, frames, 6, 3, window=2),
    "motion": lambda frames: Run(motion("output"), frames, 6, 3, window=2),
    "motion-plan": lambda frames: Run(Multirate(share=0.5), frames, 8, 4, window=2),
    "budget": lambda frames: Run(None, frames, 4, 2, kv="importance-redundancy"),
    "budget beyond the horizon": lambda frames: Run(None, frames, 4, 2, window=2, kv="even"),
}


@pytest.mark.parametrize("name", LONG)
def test_a_longer_film_needs_no_more_memory(name: str, net: SkyReelsV2, texts: Tensor) -> None:
    """But for its own latents; what is noted of every chunk adds up to less than half a latent frame here."""
    (_, short), (_, long) = (LONG[name](frames).held(net, texts) for frames in (18, 36))
    assert 0 <= long - short - 18 * FILM_FRAME < FILM_FRAME / 2


@pytest.mark.parametrize("measure", ["clean", "noisy", "output"])
def test_of_a_chunk_before_only_its_last_frame_is_kept(measure: str, net: SkyReelsV2, texts: Tensor) -> None:
    rule = motion(measure)
    frame = {"output": net.config.dim * (SIDE // 2) ** 2}.get(measure, CHANNELS * SIDE**2) * 4
    sizes, levels, schedule = set(), flow_sigmas(8), ChunkSchedule(9, 3, 8, 3)
    with Session(SkyReelsAdapter(net), schedule, levels, (SIDE, SIDE), policy=rule) as session:

        def predict(x: Tensor, chunk: Chunk) -> Tensor:
            sizes.update(edge.untyped_storage().nbytes() for edge in session.state.edges.values())
            return session.denoise(x, chunk, texts[:1], ("cond",))

        noise = torch.randn(1, CHANNELS, 9, SIDE, SIDE)
        sample_chunks(Driven(predict, session), noise, schedule, levels, UniPC())
    assert sizes == {frame}


@pytest.mark.parametrize("replay", ["velocity", "residual"])
def test_what_motion_watches_in_the_output_is_held_once_and_forecast(replay: str, net: SkyReelsV2, texts: Tensor) -> None:
    """A residual that is kept to be replayed is not kept again to be watched."""
    rule = motion("output", replace(RULE, replay=replay))
    (said, with_motion), (_, without) = (Run(policy).held(net, texts) for policy in (rule, rule.base))
    residual, edge = (4 * frames * (SIDE // 2) ** 2 * net.config.dim for frames in (9, 1))
    assert with_motion <= said.held
    assert with_motion - without < residual * (replay == "velocity") + 4 * edge
