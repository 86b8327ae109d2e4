"""A wanted computed share: the threshold is found exactly where changes are known, and by a controller where they are not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from torch import Tensor

from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.policies import Chunkwise
from flowcache_core.policies.protocol import Compute, Outlook, Signature
from flowcache_core.policies.state import RunState
from flowcache_core.policies.target import Found, Pace, Target, straight_changes
from flowcache_core.policies.thresholds import ReuseState, computed_from, decision_table, least_computed, nearest_threshold
from flowcache_core.run.report import RunReport
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler
from tests.driven import Driven, decided

Changes = Callable[[int, int], float]


def random_changes(rng: random.Random, steps: int) -> list[float]:
    return [0.0, *(rng.choice([0.0, 0.01, 0.1]) * rng.random() for _ in range(steps - 1))]


def random_rule(rng: random.Random) -> Chunkwise:
    low, high = sorted((rng.choice([0.0, 0.2]), rng.choice([0.6, 1.0])))
    return Chunkwise(warmup_steps=rng.choice([1, 3, 6]), max_reuse=rng.choice([1, 4, 1000]), start_percent=low, end_percent=high, signature="time")


def test_counting_is_the_decision_table_counted() -> None:
    rng = random.Random(0)
    for _ in range(200):
        steps = rng.randint(2, 40)
        rule, changes, threshold = random_rule(rng), random_changes(rng, steps), rng.choice([0.0, 1e-9, 0.02, 0.2, math.inf])
        table = decision_table(rule, threshold, changes)
        assert computed_from(rule, threshold, changes) == sum(table)
        at = rng.randrange(steps)
        row = next((n for n in range(at) if table[at - 1 - n]), at)
        drift = 0.0
        for change in changes[at - row : at]:
            drift += change
        assert computed_from(rule, threshold, changes, ReuseState(at, drift, row, sum(table[:at]))) == sum(table[at:])


def test_no_threshold_comes_nearer_to_the_share_than_the_one_that_is_found() -> None:
    rng = random.Random(1)
    for _ in range(60):
        steps = rng.randint(2, 24)
        rule, changes, share = random_rule(rng), random_changes(rng, steps), rng.random()
        sums = {sum(changes[a:b]) for a in range(steps) for b in range(a + 1, steps + 1)}
        every = [0.0, math.inf, *(s * f for s in sums for f in (1 - 1e-9, 1 + 1e-9))]
        best = min(abs(computed_from(rule, t, changes) - share * steps) for t in every)
        found = computed_from(rule, nearest_threshold(rule, changes, share), changes)
        assert abs(found - share * steps) == pytest.approx(best)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 1.0])
def test_under_the_time_signature_the_run_computes_what_was_forecast_for_the_share(
    net: SkyReelsV2, cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor], share: float
) -> None:
    policy = Target(share=share, warmup_steps=2, signature="time")
    _, report = cached(noise_of(6), ChunkSchedule(6, 3, 24, 4), policy=policy)
    changes = SkyReelsAdapter(net).time_changes(flow_sigmas(24)[:-1], 24, "cpu")  # type: ignore[arg-type]
    (said, *_) = policy.forecast(Outlook(2, flow_sigmas(24), lambda: changes))
    assert said.startswith(f"{report.chunk_steps_computed} of 48 chunk-steps will be computed")
    assert abs(report.chunk_steps_computed / 48 - share) <= 0.5 / 24 + 1e-9
    assert report.host_syncs == 0


class Drifting:
    """Signals of a run whose latents drift as `changes` says; nothing about them is known in advance."""

    def __init__(self, schedule: ChunkSchedule, changes: Changes) -> None:
        self.outlook = Outlook(schedule.chunks, flow_sigmas(schedule.steps), lambda: pytest.fail("the time signature is not asked for"))
        self.changes, self.at = changes, (0, 0)

    def change(self, signature: Signature) -> float:
        return math.inf if self.at[1] == 0 else self.changes(*self.at)


def play(policy: Target, schedule: ChunkSchedule, changes: Changes) -> tuple[dict[int, str], RunState]:
    """A whole run without tensors -> per chunk one letter per step, and what the run remembers."""
    state, signals, made = RunState(), Drifting(schedule, changes), dict.fromkeys(range(schedule.chunks), "")
    for row in schedule.rows:
        for chunk in row.active:
            signals.at = chunk.index, chunk.step
            decision = decided(policy, chunk, signals, state.of(chunk.index))
            made[chunk.index] += "C" if isinstance(decision, Compute) else "r"
            if chunk.step == chunk.steps - 1:
                state.drop(chunk.index)
    return made, state


def drifts(kind: str, steps: int, rng: random.Random) -> Changes:
    straight, gain = straight_changes(flow_sigmas(steps)), rng.choice([0.1, 1.0, 5.0])
    noisy = [[rng.uniform(0.3, 1.7) for _ in range(steps)] for _ in range(12)]

    def change(k: int, j: int) -> float:
        shape = {"flat": 0.05, "straight": straight[j], "faster": straight[j] * (1 + k), "jump": straight[j] * (1 if j < steps // 2 else 6)}[kind]
        return gain * shape * noisy[k][j]

    return change


@pytest.mark.parametrize("kind", ["flat", "straight", "faster", "jump"])
def test_under_the_latent_signature_the_run_meets_the_share(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(12):
        steps, chunks = rng.choice([16, 24, 50]), rng.choice([1, 2, 5])
        schedule = ChunkSchedule(3 * chunks, 3, steps, rng.choice([0, 2, 5, steps]))
        settings = {"warmup_steps": rng.choice([1, 5]), "max_reuse": rng.choice([3, 8, 1000])}
        least = least_computed(Chunkwise(**settings), steps) / steps  # type: ignore[arg-type]
        policy = Target(share=rng.uniform(least, 1.0), signature="latent", **settings)  # type: ignore[arg-type]
        made, state = play(policy, schedule, drifts(kind, steps, rng))
        share = sum(row.count("C") for row in made.values()) / schedule.chunk_steps
        assert abs(share - policy.share) <= 0.02 + 1 / schedule.chunk_steps
        for row in made.values():
            assert row.startswith("C" * policy.warmup_steps)
            assert row.endswith("C")
            assert max(len(run) for run in row.split("C")) <= policy.max_reuse
        assert not state.memory.of(Pace, lambda: pytest.fail("the controller lives in the run")).flying


def test_a_steady_run_is_paced_evenly() -> None:
    """Where the latents drift as expected no chunk pays for another."""
    straight = straight_changes(flow_sigmas(50))
    made, state = play(Target(share=0.45, signature="latent"), ChunkSchedule(15, 3, 50, 5), lambda k, j: straight[j])
    counts = [row.count("C") for row in made.values()]
    assert max(counts) - min(counts) <= 1
    (said,) = Target(share=0.45, signature="latent").findings(state.memory)
    assert said.startswith("target 45%: the threshold lay between ")


def test_a_target_is_met_in_a_real_run_and_leaves_nothing_on_the_policy(
    net: SkyReelsV2, cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor]
) -> None:
    policy = Target(share=0.5, warmup_steps=3, signature="latent")
    reports = [cached(noise_of(9), ChunkSchedule(9, 3, 24, 4), policy=policy)[1] for _ in range(2)]
    assert abs(reports[0].chunk_steps_computed / reports[0].chunk_steps - 0.5) <= 0.02
    assert reports[0].as_dict()["map"] == reports[1].as_dict()["map"]
    assert policy == Target(share=0.5, warmup_steps=3, signature="latent")
    assert "the threshold lay between" in reports[0].text()


@pytest.mark.parametrize("signature", ["latent", "time"])
def test_an_interrupted_run_leaves_no_controller_behind(
    net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor], signature: Signature
) -> None:
    schedule, sigmas = ChunkSchedule(6, 3, 12, 4), flow_sigmas(12)
    session = Session(SkyReelsAdapter(net), schedule, sigmas, (4, 4), policy=Target(share=0.7, warmup_steps=2, signature=signature))

    def predict(x: Tensor, chunk: Chunk) -> Tensor:
        if chunk.step == 9:
            raise KeyboardInterrupt
        return session.denoise(x, chunk, texts[:1], ("cond",))

    with pytest.raises(KeyboardInterrupt), session:
        sample_chunks(Driven(predict, session), noise_of(6), schedule, sigmas, Euler())
    assert session.state.memory.find(Pace) is None
    assert session.state.memory.find(Found) is None
    assert len(session.state) == 0


def test_a_share_of_one_is_the_uncached_run(cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor]) -> None:
    plain, _ = cached(noise_of(6), ChunkSchedule(6, 3, 12, 4))
    for signature in ("latent", "time"):
        film, report = cached(noise_of(6), ChunkSchedule(6, 3, 12, 4), policy=Target(share=1.0, signature=signature))  # type: ignore[arg-type]
        assert (film == plain).all()
        assert report.chunk_steps_computed == 24


@pytest.mark.parametrize("signature", ["latent", "time"])
def test_a_share_out_of_reach_is_refused_with_the_smallest_before_anything_runs(net: SkyReelsV2, signature: Signature) -> None:
    policy = Target(share=0.1, warmup_steps=5, max_reuse=8, signature=signature)
    with pytest.raises(ValueError, match=r"share of 10% cannot be reached: with warmup_steps 5, max_reuse 8 and 50 steps per chunk at least 10 of 50 "
                                         r"are computed \(20%, at most 5\.00x\)"):  # fmt: skip
        policy.check_run(50)
    with pytest.raises(ValueError, match="cannot be reached"):
        Session(SkyReelsAdapter(net), ChunkSchedule(6, 3, 50, 5), flow_sigmas(50), (4, 4), policy=policy)
    Target(share=0.2, warmup_steps=5, max_reuse=8).check_run(50)


def test_a_target_needs_a_rule_that_never_computes_more_at_a_larger_threshold() -> None:
    with pytest.raises(ValueError, match="a target cannot be found with rescale unclamped"):
        Target(signature="time", rescale="unclamped")


def test_a_target_keeps_the_other_settings() -> None:
    rule = Chunkwise(0.2, 3, 4, "time", "residual", 1, 0.1, 0.9, "clamped")
    target = Target.of(rule, 0.4)
    assert (target.share, target.warmup_steps, target.replay, target.rescale, target.end_percent) == (0.4, 3, "residual", "clamped", 0.9)


def test_expected_changes_are_those_of_a_straight_flow() -> None:
    """Between pure noise and pure data of unit variance, by hand: at sigma 1 the latent is noise, at 0.5 its size is sqrt(1/2)."""
    assert straight_changes((1.0, 0.5, 0.25, 0.0)) == pytest.approx((0.0, 0.5 * math.sqrt(2), 0.25 * math.sqrt(2) / math.sqrt(0.5)))
