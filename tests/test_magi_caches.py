"""Caches on films of MAGI-1 with random weights: reuse, plans, refreshed tokens, the KV cache and budgets of history."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from flowcache_core.kernels.tokens import mask_over
from flowcache_core.kv.cache import KVSizes, KVStore
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.keeper import Keeper
from flowcache_core.kv.layout import Layout, capacity
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.kv.scores.salience import Salience
from flowcache_core.kv.scores.streaming import StreamingLLM
from flowcache_core.models.adapter import Call
from flowcache_core.models.family import Family
from flowcache_core.models.magi import Magi, MagiConfig
from flowcache_core.models.magi_adapter import ALONE, NULL, TEXT, MagiAdapter
from flowcache_core.models.magi_family import MAGI, MAGI_DISTILLED, MagiNoise, is_last_stage, magi
from flowcache_core.policies import POLICIES
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import PRESETS, Motion
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.presets import MAGI_RULES, PLANS, preset
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.policies.target import Target
from flowcache_core.policies.thresholds import decision_table
from flowcache_core.run.generate import generate
from flowcache_core.run.run import Place, Run
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.planner import least_share
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler, UniPC
from tests.test_memory import Ledger
from tests.tiny_magi import CLOSE, FAMILIES, FRAME, GATED, GRID, JOB, PLAIN, Noting, bundle_of, tiny_magi


class Keeping(MagiAdapter):
    """Sees as far back as ever, but lets nothing go."""

    def reach(self, chunk: Chunk) -> int | None:
        return None

    def seen(self, chunk: Chunk, branch: Hashable) -> int | None:
        return 1 if branch == ALONE else super().reach(chunk)


@pytest.mark.parametrize("ar_step", [1, 2, 4])
@FAMILIES
def test_a_ring_of_five_chunks_makes_the_film_of_the_full_buffer(family: Family, ar_step: int) -> None:
    job, bundle, distilled = replace(JOB, frames=240, steps=4, ar_step=ar_step), bundle_of(family), family is MAGI_DISTILLED
    film, report = generate(bundle, job)
    everything = replace(bundle, layout=replace(bundle.layout, window=10))
    whole, all_of_it = generate(everything, job, adapter=lambda _, sigmas: Keeping(bundle.network, distilled=distilled))
    assert torch.equal(film, whole)
    chunk = 2 * PLAIN.layers * PLAIN.kv_heads * PLAIN.head_dim * 6 * FRAME * 4
    branches = 1 if distilled else 2
    assert report.expected is not None
    assert report.kv_peak_bytes == report.expected.kv == 5 * branches * chunk
    assert all_of_it.kv_peak_bytes == 10 * branches * chunk


@pytest.mark.parametrize(
    ("config", "grid", "gib"),
    [(MagiConfig(3072, 12288, 34, 8), (90, 90), 7.88), (MagiConfig(6144, 16384, 48, 8, channels=32, gated=True), (90, 160), 19.78)],
)
@pytest.mark.parametrize("chunks", [5, 60])
def test_the_kv_cache_of_a_released_model_is_as_documented(config: MagiConfig, grid: tuple[int, int], gib: float, chunks: int) -> None:
    with torch.device("meta"):
        network = Magi(config, dtype=torch.bfloat16)
    schedule = ChunkSchedule(6 * chunks, 6, 16, 4, 5, pixels=MAGI.frames, aligned=True)
    for family, branches in ((MAGI_DISTILLED, 1), (MAGI, 2)):
        run = Run(family, family.adapter(network, None), schedule, family.noise.levels(16, 3.0), (16, *grid), Place(text_tokens=200, itemsize=2))
        assert run.held.kv / 2**30 == pytest.approx(branches * gib, abs=0.01)


HELD: dict[str, tuple[Family, CachePolicy | None, Compressor | None, int]] = {
    "base": (MAGI, None, None, 2),
    "one after the other": (MAGI, None, None, 8),
    "residual": (MAGI_DISTILLED, Chunkwise(0.2, 2, signature="latent", replay="residual"), None, 2),
    "motion, base": (MAGI, Motion(base=Chunkwise(signature="latent")), None, 2),
    "budget": (MAGI_DISTILLED, None, Compressor(KV_POLICIES[0](), budget=1.5), 2),
}


@pytest.mark.parametrize("name", HELD)
def test_a_run_holds_what_its_footprint_said(name: str) -> None:
    """To one part in ten, and never more: predictions are counted for all branches at all steps."""
    family, policy, compressor, ar_step = HELD[name]
    bundle, job, most = bundle_of(family), replace(JOB, frames=168, ar_step=ar_step, solver="unipc"), 0
    ledger = Ledger(*bundle.network.parameters())

    class Weighed(MagiAdapter):
        def forward(self, call, attend):  # type: ignore[no-untyped-def]
            nonlocal most
            most = max(most, ledger.held(call.x) - call.x[:1].nbytes)  # without the chunk, once for each branch and as it was handed over
            return super().forward(call, attend)

    with ledger:
        _, report = generate(bundle, job, policy, compressor=compressor,
                             adapter=lambda _, sigmas: Weighed(bundle.network, distilled=family is MAGI_DISTILLED))  # fmt: skip
    assert report.expected is not None
    assert 0.9 * report.expected.held <= most <= 1.01 * report.expected.held


DECIDING = {Chunkwise: Chunkwise(signature="latent", warmup_steps=2), Target: None, Motion: Motion(base=Chunkwise(signature="latent"))}


@pytest.mark.parametrize("kind", POLICIES, ids=lambda kind: kind.name)
@FAMILIES
def test_every_cache_policy_runs_or_is_refused_with_the_reason(family: Family, kind: type[CachePolicy]) -> None:
    policy = DECIDING[kind] if kind in DECIDING else kind()
    if policy is None:
        with pytest.raises(ValueError, match="signature time follows the time modulation, which magi-1 does not have: set signature to latent"):
            generate(bundle_of(family), JOB, kind())
        return
    film, report = generate(bundle_of(family), replace(JOB, steps=12, ar_step=3), policy)
    assert torch.isfinite(film).all()
    assert 0 < report.tokens_computed <= report.tokens


@FAMILIES
def test_reuse_goes_on_where_branches_fall_away(family: Family) -> None:
    """Warm-up and last step are computed; of a distilled model the first step of the last quarter too, in which a branch comes in."""
    rule = Chunkwise(10.0, warmup_steps=2, max_reuse=1000, signature="latent")
    _, report = generate(bundle_of(family), JOB, rule)
    assert report.chunk_steps_computed == 4 * (3 if family is MAGI else 4)


@pytest.mark.parametrize("config", [PLAIN, GATED], ids=["4.5B", "24B"])
def test_refreshed_tokens_equal_those_of_a_full_forward(config: Any) -> None:
    adapter, schedule = MagiAdapter(tiny_magi(config)), ChunkSchedule(12, 6, 4, 1, 5)
    store = KVStore(KVSizes.of(adapter, 1, capacity(schedule, FRAME)), Layout(schedule, FRAME), seen=adapter.seen)
    text = adapter.text(adapter.branch_texts(torch.randn(1, 3, 12), (TEXT, NULL)))
    for chunk in (schedule.at(0, 1), schedule.at(1, 0)):
        call = Call(torch.randn(2, 16, 6, 8, 8), 0.8, chunk, text, 24, (TEXT, NULL))
        velocity, residual = adapter.forward(call, store.attention(call.branches, chunk))
        for tokens in (torch.arange(6 * FRAME), torch.tensor([0, 5, 17, 95])):
            some, of_some = adapter.refresh(call, tokens, store.attention(call.branches, chunk, tokens))
            chosen = mask_over(velocity, tokens, (6, *GRID))
            torch.testing.assert_close(some, torch.where(chosen, velocity, 0.0), **CLOSE)
            torch.testing.assert_close(of_some, residual[:, tokens], **CLOSE)
        torch.testing.assert_close(adapter.replay(call, residual), velocity, **CLOSE)


@FAMILIES
def test_a_plan_is_computed_and_held_as_forecast(family: Family) -> None:
    """In part too, where all branches run at every step."""
    for policy in (Planned(share=0.5), Multirate(share=0.5)):
        _, report = generate(bundle_of(family), replace(JOB, steps=16, ar_step=4), policy)
        assert report.share <= 0.5
        assert report.expected is not None
        assert report.kv_peak_bytes <= report.expected.kv


@FAMILIES
def test_threshold_zero_is_exact(family: Family) -> None:
    film, _ = generate(bundle_of(family), JOB)
    cached, report = generate(bundle_of(family), JOB, Chunkwise(0.0, signature="latent"))
    assert torch.equal(film, cached)
    assert report.chunk_steps_computed == report.chunk_steps


@pytest.mark.parametrize("kind", KV_POLICIES, ids=lambda kind: kind.name)
def test_every_kv_policy_bounds_history(kind: type) -> None:
    if kind is Salience:
        with pytest.raises(ValueError, match="head"):
            generate(bundle_of(MAGI_DISTILLED), JOB, compressor=Compressor(kind(), budget=1.5))
        return
    job = replace(JOB, frames=168, steps=4, ar_step=1)
    film, report = generate(bundle_of(MAGI_DISTILLED), job, compressor=Compressor(kind(), budget=1.5))
    assert torch.isfinite(film).all()
    assert max(report.history.tokens) == 1.5 * 6 * FRAME


@pytest.mark.parametrize("soft", [0.0, 0.25])
@pytest.mark.parametrize("policy", [Multirate(share=0.5), PRESETS["magi-1"]], ids=["plan", "rule"])
@FAMILIES
def test_branches_that_look_back_on_nothing_settle_as_all_do(
    family: Family, policy: CachePolicy, soft: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch of the chunk alone has a cache where tokens run alone, and no clean pass shows it to the keeper."""
    settle, settled = Keeper.settle, set()

    def looked(keeper: Keeper, chunk: Chunk, branch: Hashable, stays: int) -> Any:
        out = settle(keeper, chunk, branch, stays)
        settled.add(branch)
        assert all((kept.tokens.diff(dim=1) > 0).all() for kept in keeper._kept[branch]), "a slot counts twice"
        return out

    monkeypatch.setattr(Keeper, "settle", looked)
    job = replace(JOB, frames=96, steps=8, ar_step=2)
    film, _ = generate(bundle_of(family), job, policy, compressor=Compressor(StreamingLLM(), budget=1.5, sink=1, recent=0 if soft else 1, soft=soft))
    assert torch.isfinite(film).all()
    assert ALONE in settled


def test_a_budget_with_room_for_all_of_history_equals_none() -> None:
    for family in (MAGI, MAGI_DISTILLED):
        film, _ = generate(bundle_of(family), JOB)
        roomy, _ = generate(bundle_of(family), JOB, compressor=Compressor(KV_POLICIES[0](), budget=6))
        assert torch.equal(film, roomy)


@pytest.mark.parametrize("steps", [4, 8, 12, 16, 32, 64])
@pytest.mark.parametrize("name", PLANS)
def test_a_preset_that_plans_serves_any_number_of_steps(name: str, steps: int) -> None:
    """Within its budget, or at the least that a plan can have; every chunk is computed where guidance changes."""
    for chunks in (1, 4, 9):
        for ar_step in (steps // 4, steps):
            layout, rule = MAGI.layout, preset(name)
            schedule = ChunkSchedule(6 * chunks, 6, steps, ar_step, layout.window, pixels=MAGI.frames, aligned=True, profile=layout.profile)
            MAGI.check(schedule)
            assert isinstance(rule, Planned)
            rule.check_run(steps)
            plan = rule.plan(schedule).check(schedule)
            assert plan.share(schedule) <= max(rule.share, least_share(schedule)) + 1e-9
            assert all(is_last_stage(MAGI.noise.levels(steps, 3.0)[3 * steps // 4]) and 3 * steps // 4 in done for done in plan.computed)


def test_under_euler_a_plan_takes_the_steps_that_it_leaves_out() -> None:
    """As `test_plan.py` says of sums; the full plan is the film itself, and UniPC is run as anywhere."""
    bundle, job = bundle_of(MAGI), replace(JOB, frames=48)
    settled = Run(MAGI, bundle.adapter(), job.schedule(bundle), job.sigmas(bundle), (16, 8, 8), solver=Euler())
    assert settled.solver == Euler(sums=True)
    assert replace(settled, solver=UniPC()).solver == UniPC()
    film, _ = generate(bundle, job)
    assert torch.equal(generate(bundle, job, Planned(share=1.0))[0], film)
    plain = bundle_of(replace(MAGI, solving=lambda solver: solver))
    by_steps, at_once = (generate(one, job, Planned(share=0.6))[0] for one in (bundle, plain))
    assert not torch.equal(by_steps, at_once)


FLOWCACHE = magi(distilled=True, ranges=(), clean_pass=False, near_clean=False)


def test_as_flowcache_ran_it() -> None:
    """No ranges, no clean pass, one branch; its threshold rule reuses, and the last computed step is what later chunks see."""
    adapter = Noting(tiny_magi(PLAIN), distilled=True, ranges=())
    bundle = bundle_of(FLOWCACHE)
    _, report = generate(bundle, JOB, adapter=lambda _, sigmas: adapter)
    assert {(branches, seen) for *_, branches, seen in adapter.calls} == {((TEXT,), (None,))}
    assert len(adapter.calls) == 32
    assert report.commits == 0
    _, long = generate(bundle, replace(JOB, frames=168, steps=4, ar_step=1))
    assert long.kv_peak_bytes == 7 * 6 * FRAME * 2 * PLAIN.layers * PLAIN.kv_heads * PLAIN.head_dim * 4
    job = replace(JOB, steps=16, ar_step=4)
    _, cached = generate(bundle, job, Chunkwise(0.2, warmup_steps=5, max_reuse=1000, signature="latent", order=0))
    assert cached.chunk_steps_computed < cached.chunk_steps
    with pytest.raises(ValueError, match="a budget of history is scored while a finished chunk is passed through the network clean"):
        generate(bundle, JOB, compressor=Compressor(KV_POLICIES[0](), budget=2))


def straight(steps: int) -> list[float]:
    """Relative changes of the latents from step to step, on straight paths from noise to clean latents of the same variance."""
    levels = MagiNoise().levels(steps, 3.0)
    return [math.inf, *((a - b) * math.sqrt(2) / math.hypot(a, 1 - a) for a, b in pairwise(levels[:-1]))]


def as_released(threshold: float, changes: Sequence[float]) -> list[bool]:
    """Which steps FlowCache's code for MAGI-1 computes."""
    out, drift = list[bool](), 0.0
    for step, change in enumerate(changes):
        drift = 0.0 if step < 5 else drift + change
        out.append(step < 5 or drift >= threshold)
        drift = 0.0 if out[-1] else drift
    return out


@pytest.mark.parametrize("name", MAGI_RULES)
def test_the_presets_decide_as_the_released_code_does(name: str) -> None:
    rule = preset(name)
    assert isinstance(rule, Chunkwise)
    changes = straight(64)
    decided = list(decision_table(rule, rule.threshold, changes))
    assert decided == as_released(rule.threshold, changes)
    assert sum(decided) == {"flowcache-magi-slow": 47, "flowcache-magi-fast": 42}[name]
    assert all(decision_table(rule, rule.threshold, straight(16)))


def test_a_preset_runs_as_flowcache_ran_it() -> None:
    job = replace(JOB, frames=48, steps=64, ar_step=16, size=16)
    _, report = generate(bundle_of(FLOWCACHE), job, preset("flowcache-magi-fast"))
    assert 0 < report.chunk_steps_computed < report.chunk_steps
