"""Cache policies: when a chunk is computed, and what a reused step replays."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache_core.models.adapter import Call
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.network import Attend
from flowcache_core.policies import Always, Chunkwise
from flowcache_core.policies.protocol import CachePolicy, Compute, Reuse, Signals, Signature
from flowcache_core.policies.state import ChunkState
from flowcache_core.run.report import RunReport
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas, timestep
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler, UniPC
from flowcache_core.settings import setting
from tests.driven import Driven, decided
from tests.formula import Fields

STEPS = 40
FREE = {"warmup_steps": 1, "max_reuse": 1000}


class Drift:
    """Signals that follow a given sequence of changes."""

    def __init__(self, changes: list[float]) -> None:
        self.changes, self.at = changes, 0

    def change(self, signature: Signature) -> float:
        return self.changes[self.at]


def decisions(policy: CachePolicy, changes: list[float]) -> str:
    """One letter per step: C computed, r reused."""
    state, signals, out = ChunkState(), Drift(changes), ""
    for step in range(len(changes)):
        signals.at = step
        out += "C" if isinstance(decided(policy, Chunk(0, 0, 3, step, len(changes)), signals, state), Compute) else "r"
    return out


def random_changes(rng: random.Random, steps: int = STEPS) -> list[float]:
    return [0.0, *(rng.uniform(0.0, rng.choice([0.02, 0.1, 0.5])) for _ in range(steps - 1))]


def accumulate(changes: list[float], threshold: float) -> str:
    """The bare rule: add up, compute at the threshold, start again from zero; the first and the last step always run."""
    drift, out = 0.0, "C"
    for change in changes[1:-1]:
        drift += change
        out += "C" if drift >= threshold else "r"
        drift = 0.0 if out[-1] == "C" else drift
    return out + "C"


def test_decisions_follow_the_accumulated_drift() -> None:
    rng = random.Random(1)
    for _ in range(50):
        changes, threshold = random_changes(rng), rng.uniform(0.01, 1.0)
        assert decisions(Chunkwise(threshold=threshold, **FREE), changes) == accumulate(changes, threshold)


def test_threshold_zero_computes_everything_and_an_endless_one_almost_nothing() -> None:
    assert decisions(Chunkwise(threshold=0), [0.0] * 10) == "C" * 10
    assert decisions(Chunkwise(threshold=10, **FREE), [0.0] * 10) == "CrrrrrrrrC"


@pytest.mark.parametrize("settings", [{}, FREE, {"start_percent": 0.3, "end_percent": 0.8}, {"warmup_steps": 3, "max_reuse": 2}])
def test_on_one_drift_sequence_a_larger_threshold_never_computes_more(settings: dict[str, Any]) -> None:
    rng = random.Random(2)
    for _ in range(100):
        changes = random_changes(rng)
        thresholds = sorted(rng.uniform(0, 1) for _ in range(6))
        computed = [decisions(Chunkwise(threshold=t, **settings), changes).count("C") for t in (0.0, *thresholds)]
        assert computed == sorted(computed, reverse=True), (thresholds, changes)


@pytest.mark.parametrize("warmup", [1, 5, 7])
def test_warm_up_steps_and_the_last_step_are_always_computed(warmup: int) -> None:
    got = decisions(Chunkwise(threshold=10, warmup_steps=warmup, max_reuse=1000), [0.0] * 20)
    assert got == "C" * warmup + "r" * (19 - warmup) + "C"


@pytest.mark.parametrize("longest", [1, 2, 5])
def test_never_more_reused_steps_in_a_row_than_allowed(longest: int) -> None:
    got = decisions(Chunkwise(threshold=10, warmup_steps=1, max_reuse=longest), [0.0] * 30)
    assert max(len(run) for run in got.split("C")) == longest


def test_nothing_is_reused_outside_the_share_of_steps() -> None:
    got = decisions(Chunkwise(threshold=10, start_percent=0.25, end_percent=0.5, **FREE), [0.0] * 20)
    assert {i for i, letter in enumerate(got) if letter == "r"} == set(range(5, 11))


def test_always_computes_and_keeps_nothing() -> None:
    assert decisions(Always(), [0.0] * 5) == "CCCCC"
    assert Always().keeps is None


@pytest.mark.parametrize("settings", [{"replay": "velocity", "order": 1}, {"replay": "residual", "order": 0}])
def test_a_reuse_says_what_and_how(settings: dict[str, Any]) -> None:
    policy, state, signals = Chunkwise(threshold=10, warmup_steps=1, **settings), ChunkState(), Drift([0.0] * 9)
    made = [decided(policy, Chunk(0, 0, 3, step, 9), signals, state) for step in range(2)]
    assert made == [Compute(), Reuse(settings["replay"], settings["order"])]
    assert policy.keeps == settings["replay"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"threshold": -0.1}, r"threshold is -0\.1: it must lie between 0\.0 and 10\.0"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"threshold": 11}, "threshold is 11: it must lie between"),
        ({"warmup_steps": 0}, "warmup_steps is 0: it must lie between 1 and 1000"),
        ({"max_reuse": 0}, "max_reuse is 0: it must lie between 1 and 1000"),
        ({"order": 2}, "order is 2: it must lie between 0 and 1"),
        ({"signature": "depth"}, "signature is 'depth': use one of latent, time"),
        ({"replay": "latent"}, "replay is 'latent': use one of velocity, residual"),
        ({"end_percent": 1.5}, r"end_percent is 1\.5: it must lie between 0\.0 and 1\.0"),
        ({"start_percent": 0.6, "end_percent": 0.4}, r"start_percent 0\.6 lies after end_percent 0\.4: swap them"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_range(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Chunkwise(**settings)


def test_a_setting_carries_its_own_help_and_range() -> None:
    rule = setting(3, "A number.", low=1, high=5).metadata["setting"]
    assert (rule.help, rule.low, rule.high, rule.advanced) == ("A number.", 1, 5, False)


# what a whole run does with it


@pytest.mark.parametrize("solver", [Euler(), UniPC()])
@pytest.mark.parametrize("settings", [{}, {"replay": "residual"}, {"signature": "latent"}, {"order": 0}])
def test_threshold_zero_is_exact(
    cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor], solver: Any, settings: dict[str, Any]
) -> None:
    schedule = ChunkSchedule(8, 3, 6, 2)
    plain, _ = cached(noise_of(8), schedule, solver)
    film, report = cached(noise_of(8), schedule, solver, Chunkwise(threshold=0, **settings))
    assert torch.equal(film, plain)
    assert report.chunk_steps_computed == report.chunk_steps == 18


@pytest.mark.parametrize("settings", [{}, {"replay": "residual"}, {"signature": "time", "threshold": 2.0}, {"order": 0}])
def test_reuse_stays_near_the_computed_film(
    cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor], settings: dict[str, Any]
) -> None:
    schedule = ChunkSchedule(6, 3, 24, 4)
    plain, _ = cached(noise_of(6), schedule)
    film, report = cached(noise_of(6), schedule, policy=Chunkwise(**{"threshold": 0.02, "warmup_steps": 2, "signature": "latent", **settings}))
    assert report.chunk_steps_computed < report.chunk_steps
    assert 0 < (film - plain).abs().mean() < 0.2 * plain.abs().mean()


def test_the_map_of_a_run_keeps_the_rules(cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor]) -> None:
    _, report = cached(noise_of(6), ChunkSchedule(6, 3, 30, 4), policy=Chunkwise(threshold=10, warmup_steps=4, max_reuse=6))
    assert report.as_dict()["map"] == ["2222" + "1111112" * 3 + "1111" + "2"] * 2


def test_time_signature_waits_for_nothing_and_follows_the_table(
    net: SkyReelsV2, cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor]
) -> None:
    sigmas = flow_sigmas(24)
    e0 = [net.modulation(torch.tensor([[timestep(s)]]), 24, torch.float32)[1] for s in sigmas[:-1]]
    changes = [0.0, *(float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(e0))]
    threshold = sum(changes) / 6
    expected = accumulate(changes, threshold).replace("C", "2").replace("r", "1")
    _, report = cached(noise_of(6), ChunkSchedule(6, 3, 24, 4), policy=Chunkwise(threshold=threshold, signature="time", **FREE))
    assert "12" in expected[:-1]
    assert report.as_dict()["map"] == [expected, expected]
    assert report.host_syncs == 0


def test_latent_signature_is_the_change_between_steps_at_one_wait_each(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    schedule, sigmas = ChunkSchedule(3, 3, 12), flow_sigmas(12)
    path: list[Tensor] = []

    def predict(x: Tensor, chunk: Chunk) -> Tensor:
        path.append(x.clone())
        return session.denoise(x, chunk, texts[:1], ("cond",))

    policy = Chunkwise(threshold=0.02, warmup_steps=2, max_reuse=1000, signature="latent")
    with Session(SkyReelsAdapter(net), schedule, sigmas, (4, 4), policy=policy) as session:
        sample_chunks(Driven(predict, session), noise_of(3), schedule, sigmas, Euler())
    changes = [0.0, *(float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(path))]
    expected = decisions(policy, changes).replace("C", "2").replace("r", "1")
    assert "12" in expected[:-1], "drift alone makes a step compute"
    assert session.report.as_dict()["map"] == [expected]
    assert 0 < session.report.host_syncs <= schedule.chunk_steps


@pytest.mark.parametrize("groups", [((0,), (1,)), ((0, 1),)])
def test_all_branches_follow_one_decision(
    net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor], groups: tuple[tuple[int, ...], ...]
) -> None:
    """The policy is asked once per chunk and step, and both branches compute or both reuse."""
    asked: list[tuple[int, int]] = []
    ran: list[tuple[int, int, int]] = []

    class Alternating(Chunkwise):
        def decide(self, chunk: Chunk, signals: Signals, state: ChunkState) -> Compute | Reuse:
            asked.append((chunk.index, chunk.step))
            return Reuse() if len(asked) % 2 == 0 and chunk.step else Compute()

    class Counting(SkyReelsAdapter):
        def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
            ran.append((call.chunk.index, call.chunk.step, len(call.x)))
            return super().forward(call, attend)

    schedule, sigmas = ChunkSchedule(6, 3, 6, 2), flow_sigmas(6)
    with Session(Counting(net), schedule, sigmas, (4, 4), policy=Alternating()) as session:

        def predict(x: Tensor, chunk: Chunk) -> Tensor:
            return torch.cat([session.denoise(x.repeat(len(g), 1, 1, 1, 1), chunk, texts[list(g)], g) for g in groups]).mean(0, keepdim=True)

        sample_chunks(Driven(predict, session), noise_of(6), schedule, sigmas, Euler())
    assert len(asked) == len(set(asked)) == schedule.chunk_steps
    for k in range(2):
        for j in range(6):
            branches = sum(n for chunk, step, n in ran if (chunk, step) == (k, j))
            assert branches == (2 if session.report.map[k, j] == 2 else 0)


def sample_field(field: Callable[[float], Tensor], policy: CachePolicy | None, noise: Tensor) -> tuple[Tensor, RunReport]:
    schedule, sigmas = ChunkSchedule(3, 3, 20), flow_sigmas(20)
    with Session(Fields(field), schedule, sigmas, (2, 2), policy=policy) as session:
        out = sample_chunks(Driven(lambda x, chunk: session.denoise(x, chunk, x, ("cond",)), session), noise, schedule, sigmas, Euler())
    return out, session.report


@pytest.mark.parametrize("replay", ["velocity", "residual"])
@pytest.mark.parametrize("order", [0, 1])
def test_reusing_a_constant_velocity_is_exact_because_the_step_size_is_the_current_one(replay: str, order: int) -> None:
    noise, velocity = torch.randn(2, 1, 16, 3, 2, 2, dtype=torch.float64)
    policy = Chunkwise(threshold=10, warmup_steps=2, signature="time", replay=replay, order=order, max_reuse=1000)  # type: ignore[arg-type]
    film, report = sample_field(lambda sigma: velocity, policy, noise)
    assert report.chunk_steps_computed == 3
    torch.testing.assert_close(film, noise - flow_sigmas(20)[0] * velocity, rtol=1e-12, atol=1e-12)


def test_order_one_is_exact_where_the_velocity_is_linear_in_the_noise_level() -> None:
    noise, a, b = torch.randn(3, 1, 16, 3, 2, 2, dtype=torch.float64)
    plain, _ = sample_field(lambda sigma: a + sigma * b, None, noise)
    settings: dict[str, Any] = {"threshold": 10, "warmup_steps": 2, "signature": "time", "max_reuse": 1000}
    films = [sample_field(lambda sigma: a + sigma * b, Chunkwise(order=order, **settings), noise)[0] for order in (0, 1)]
    torch.testing.assert_close(films[1], plain, rtol=1e-9, atol=1e-9)
    assert (films[0] - plain).abs().max() > 1e-3


def test_a_line_needs_two_points() -> None:
    state = ChunkState()
    state.keep("a", 0.9, torch.tensor(1.0))
    assert state.predict("a", 0.1, order=1) == 1.0
    state.keep("a", 0.8, torch.tensor(2.0))
    assert state.predict("a", 0.6, order=1).item() == pytest.approx(4.0)
    assert state.predict("a", 0.6, order=0) == 2.0
    state.keep("a", 0.7, torch.tensor(0.0))
    assert len(state.predictions["a"]) == 2
    assert state.predict("a", 0.6, order=1).item() == pytest.approx(-2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("partly", [False, True])
def test_a_line_is_drawn_in_one_buffer_and_leaves_what_is_kept_alone(dtype: torch.dtype, partly: bool) -> None:
    """Bit for bit the formula, whether all of it or some of it was computed last."""
    state, (a, b, c) = ChunkState(), torch.randn(3, 1, 16, 3, 4, 4).to(dtype)
    state.keep("a", 0.9, a)
    state.keep("a", 0.8, b)
    if partly:
        state.keep("a", 0.7, c, torch.rand(1, 1, 3, 4, 4) > 0.5)
    before, last = state.predictions["a"]
    kept = before.value.clone(), last.value.clone()
    along = (0.6 - last.sigma) / (last.sigma - before.sigma)
    assert torch.equal(state.predict("a", 0.6, order=1), last.value + (along * (last.value - before.value)).to(dtype))
    assert torch.equal(before.value, kept[0])
    assert torch.equal(last.value, kept[1])
