"""The published rule of SkyReels-V2 against a plain reference, the table of presets, and what is forecast of a run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_polynomials import POLYNOMIALS
from flowcache_core.policies import Always, Chunkwise
from flowcache_core.policies.forecast import free_steps, headroom
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.presets import CUSTOM, PLANS, PRESETS, RULES, describe, on_signature, preset
from flowcache_core.policies.protocol import CachePolicy, Compute, Forecasts, Outlook, Signature
from flowcache_core.policies.state import ChunkState
from flowcache_core.policies.target import Target
from flowcache_core.run.report import RunReport
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.planner import least_share
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler
from tests.driven import Driven, decided

SMALL, LARGE = (POLYNOMIALS[1536, 30], POLYNOMIALS[5120, 40])
PUBLISHED = [
    ("flowcache-slow", 0.1, True),
    ("flowcache-fast", 0.15, True),
    ("flowcache-slow-exact", 0.1, False),
    ("flowcache-fast-exact", 0.15, False),
]


class Known:
    """Signals whose time changes are a given sequence."""

    def __init__(self, changes: Sequence[float], polynomial: Sequence[float]) -> None:
        self.changes, self.at = changes, 0
        self.outlook = Outlook(1, (*(1.0,) * len(changes), 0.0), lambda: changes, tuple(polynomial))

    def change(self, signature: Signature) -> float:
        return self.changes[self.at] if signature == "time" else float("inf")


def decisions(policy: CachePolicy, changes: Sequence[float], polynomial: Sequence[float] = ()) -> str:
    state, signals, out = ChunkState(), Known(changes, polynomial), ""
    for step in range(len(changes)):
        signals.at = step
        out += "C" if isinstance(decided(policy, Chunk(0, 0, 3, step, len(changes)), signals, state), Compute) else "r"
    return out


def reference(changes: Sequence[float], coefficients: Sequence[float], threshold: float, clamp: bool) -> str:
    """The published rule as it is described: a counter, an accumulator and a polynomial, for one branch of one chunk."""
    rescale, retained, last = np.poly1d(coefficients), 5, len(changes) - 1
    accumulated, made = 0.0, []
    for counter in range(len(changes)):
        if counter < retained or counter >= last:
            calculate, accumulated = True, 0.0
        else:
            step = float(rescale(changes[counter]))
            accumulated += max(step, 0.0) if clamp else step
            calculate = not accumulated < threshold
            if calculate:
                accumulated = 0.0
        made.append("C" if calculate else "r")
    return "".join(made)


def rising(steps: int) -> list[float]:
    """Changes as the figures of the paper show them: from nearly nothing to about a sixth, the steps of the schedule growing."""
    return [0.0, *(0.003 + 0.165 * (step / steps) ** 4 for step in range(1, steps))]


@pytest.mark.parametrize("polynomial", [SMALL, LARGE], ids=["1.3B", "14B"])
@pytest.mark.parametrize("steps", [30, 50])
@pytest.mark.parametrize(("name", "threshold", "clamp"), PUBLISHED)
def test_published_presets_decide_as_the_published_rule(name: str, threshold: float, clamp: bool, steps: int, polynomial: Sequence[float]) -> None:
    rng = random.Random(steps)
    seen = set()
    for _ in range(100):
        top = rng.choice([0.005, 0.02, 0.08, 0.17])
        changes = sorted(rng.uniform(0, top) for _ in range(steps)) if rng.random() < 0.5 else [rng.uniform(0, top) for _ in range(steps)]
        expected = reference(changes, polynomial, threshold, clamp)
        assert decisions(preset(name), changes, polynomial) == expected
        seen.add(expected)
    assert len(seen) > 20, "the sequences must tell rules apart"


@pytest.mark.parametrize("steps", [30, 50])
@pytest.mark.parametrize("polynomial", [SMALL, LARGE], ids=["1.3B", "14B"])
def test_published_presets_decide_as_the_published_rule_on_changes_of_networks(
    make_net: Callable[..., SkyReelsV2], polynomial: Sequence[float], steps: int
) -> None:
    for seed in range(3):
        raw = SkyReelsAdapter(make_net(seed)).time_changes(flow_sigmas(steps)[:-1], 24, "cpu")  # type: ignore[arg-type]
        for gain in (0.3, 1.0, 3.0):
            changes = [gain * change for change in raw]
            for name, threshold, clamp in PUBLISHED:
                assert decisions(preset(name), changes, polynomial) == reference(changes, polynomial, threshold, clamp)


GOLDEN = {
    ("1.3B", 30, "flowcache-slow"): "CCCCCrrrrrrrrrCrCrCrCCCCCCCrrC",
    ("1.3B", 30, "flowcache-fast"): "CCCCCrrrrrrrrrrCrrCrCrCCCCrrrC",
    ("1.3B", 30, "flowcache-slow-exact"): "CCCCCrrrrrrrrrrCrCrCCCCCCCCrrC",
    ("1.3B", 30, "flowcache-fast-exact"): "CCCCCrrrrrrrrrrCrrCrCrCCCCrrrC",
    ("1.3B", 50, "flowcache-slow"): "CCCCCrrrrrrrrrrrrrrrrCrrCrCrCrCrCrCCCCCCCCCCrrrrrC",
    ("1.3B", 50, "flowcache-fast"): "CCCCCrrrrrrrrrrrrrrrrrrCrrCrrCrCrCrCrCCCCCCCrrrrrC",
    ("1.3B", 50, "flowcache-slow-exact"): "CCCCCrrrrrrrrrrrrrrrrrrrCrCrCrCrCrCCCCCCCCCCrrrrrC",
    ("1.3B", 50, "flowcache-fast-exact"): "CCCCCrrrrrrrrrrrrrrrrrrrrCrrCrCrCrCrCCCCCCCCrrrrrC",
    ("14B", 30, "flowcache-slow"): "CCCCCrrrrrrrrrrCCCCCCCCCCrrrrC",
    ("14B", 30, "flowcache-fast"): "CCCCCrrrrrrrrrrCrCrCrCCCCrrrrC",
    ("14B", 30, "flowcache-slow-exact"): "CCCCCrrrrrrrrrrrrrrrrCCCCrrrrC",
    ("14B", 30, "flowcache-fast-exact"): "CCCCCrrrrrrrrrrrrrrrrCCCCrrrrC",
    ("14B", 50, "flowcache-slow"): "CCCCCrrrrrrrrrrrrrrrrrrCrCCCCCCCCCCCCCCCCCrrrrrrrC",
    ("14B", 50, "flowcache-fast"): "CCCCCrrrrrrrrrrrrrrrrrrrCrCrCrCrCrCCCCCCCCrrrrrrrC",
    ("14B", 50, "flowcache-slow-exact"): "CCCCCrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrCCCCCrrrrrrrC",
    ("14B", 50, "flowcache-fast-exact"): "CCCCCrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrrCCCCCrrrrrrrC",
}
"""Decisions of `reference` on `rising`, by size of the network, steps and preset."""


@pytest.mark.parametrize(("size", "steps", "name"), GOLDEN)
def test_the_table_of_a_fixed_sequence_never_changes(size: str, steps: int, name: str) -> None:
    polynomial = SMALL if size == "1.3B" else LARGE
    assert decisions(preset(name), rising(steps), polynomial) == GOLDEN[size, steps, name]


def test_clamping_matters_where_the_polynomial_is_negative() -> None:
    """At 0.002 the 1.3B polynomial is -0.025: unclamped, a calm stretch pays for a later change; clamped, it is nothing."""
    changes = [0.002] * 20 + [0.05] * 30
    clamped, exact = (decisions(preset(name), changes, SMALL) for name in ("flowcache-slow", "flowcache-slow-exact"))
    assert clamped.count("C") > exact.count("C")
    assert decisions(preset("flowcache-slow"), [0.002] * 50, SMALL) == "C" * 5 + "r" * 44 + "C"


@pytest.mark.parametrize(("width", "layers", "polynomial"), [(1536, 30, SMALL), (5120, 40, LARGE), (128, 2, ()), (1536, 40, ())])
def test_the_polynomial_is_read_from_the_size_of_the_network(width: int, layers: int, polynomial: Sequence[float]) -> None:
    with torch.device("meta"):
        network = SkyReelsV2(SkyReelsConfig(width, 256, layers))
    assert SkyReelsAdapter(network).polynomial == tuple(polynomial)


def test_without_a_polynomial_changes_are_added_up_as_they_are_and_that_is_said() -> None:
    changes = [0.0] * 5 + [0.03] * 45
    assert decisions(preset("flowcache-slow"), changes) == decisions(Chunkwise(0.1, max_reuse=1000, signature="time"), changes)
    slow = RULES["flowcache-slow"]
    said = slow.forecast(Known(changes, ()).outlook)
    assert "no polynomial was published for this model" in " ".join(said)
    assert "polynomial published for a model of this size, clamped" in " ".join(slow.forecast(Known(changes, SMALL).outlook))


def test_a_polynomial_belongs_to_the_time_signature() -> None:
    with pytest.raises(ValueError, match="rescale clamped was published for the time modulation, but signature is latent: set signature to time"):
        Chunkwise(rescale="clamped", signature="latent")


def test_a_whole_run_with_a_polynomial_follows_the_published_rule(
    net: SkyReelsV2, cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = SkyReelsAdapter(net).time_changes(flow_sigmas(30)[:-1], 24, "cpu")  # type: ignore[arg-type]
    line = (0.1 / max(changes), -0.01)
    monkeypatch.setitem(POLYNOMIALS, (128, 2), line)
    for name, threshold, clamp in PUBLISHED:
        _, report = cached(noise_of(6), ChunkSchedule(6, 3, 30, 4), policy=preset(name))
        expected = reference(changes, line, threshold, clamp).replace("C", "2").replace("r", "1")
        assert "12" in expected[:-2], "drift alone makes a step compute"
        assert report.as_dict()["map"] == [expected, expected]


# the table


def test_every_preset_has_a_name_of_its_own_and_is_described() -> None:
    assert CUSTOM not in PRESETS
    assert [(name, plan.share) for name, plan in PLANS.items()] == [("safe", 0.55), ("balanced", 0.4), ("fast", 0.3), ("turbo", 0.13)]
    assert {*PLANS, "flowcache-slow", "flowcache-fast"} <= PRESETS.keys()
    assert len(set(PRESETS.values())) == len(PRESETS)
    assert describe(preset("flowcache-slow-exact")) == (
        "threshold 0.1, warmup_steps 5, max_reuse 1000, signature time, rescale unclamped, replay residual, order 0"
    )
    assert describe(Target.of(Chunkwise(start_percent=0.1), 0.4)).startswith("target 40% of chunk-steps computed, warmup_steps 5")


def test_an_unknown_preset_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match="there is no preset 'quick': use one of safe, balanced, fast, turbo, flowcache-slow"):
        preset("quick")


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 16, 20, 24])
@pytest.mark.parametrize("name", PLANS)
def test_a_preset_that_plans_serves_any_number_of_steps(name: str, steps: int) -> None:
    """In step, within its budget where that allows two steps of every chunk, and no chunk ends in the first four fifths of its steps."""
    for ar_step in (0, 1, 5):
        for together in (False, True):
            schedule, rule = ChunkSchedule(11, 3, steps, ar_step, prefix=1), preset(name)
            assert isinstance(rule, Planned)
            rule.check_run(steps)
            plan = rule.plan(schedule, together).check(schedule)
            assert plan.share(schedule) <= max(rule.share, least_share(schedule, together)) + 1e-9
            assert all(done[-1] == steps - 1 or done[-1] >= 0.8 * steps for done in plan.computed if done)


def test_a_larger_budget_never_plans_less() -> None:
    schedule = ChunkSchedule(11, 3, 20, 5)
    for together in (False, True):
        shares = [Planned(share=budget / 20).plan(schedule, together).share(schedule) for budget in range(1, 21)]
        assert shares == sorted(shares)
        assert shares[-1] == 1


def test_a_rule_under_the_time_signature_is_told_to_be_a_plan_too() -> None:
    for rule in (Chunkwise(), Target(share=0.4), *RULES.values()):
        assert "is a plan too" in " ".join(on_signature(rule))
    for rule in (Chunkwise(signature="latent"), Chunkwise(threshold=0)):
        assert on_signature(rule) == ()


# what is forecast


@pytest.mark.parametrize("settings", [{}, {"warmup_steps": 2, "max_reuse": 3}, {"start_percent": 0.2, "end_percent": 0.7}])
def test_the_forecast_under_the_time_signature_is_what_happens(
    net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor], settings: dict[str, float]
) -> None:
    noise, schedule, sigmas = noise_of(8), ChunkSchedule(8, 3, 24, 4), flow_sigmas(24)
    for threshold in (0.0, 0.05, 0.3):
        policy = Chunkwise(threshold=threshold, signature="time", **settings)  # type: ignore[arg-type]
        with Session(SkyReelsAdapter(net), schedule, sigmas, (4, 4), policy=policy) as session:
            (said, *_) = session.forecast(noise.device)
            sample_chunks(Driven(lambda x, chunk: session.denoise(x, chunk, texts[:1], ("cond",)), session), noise, schedule, sigmas, Euler())
        done = session.report
        assert f"{done.chunk_steps_computed} of {done.chunk_steps} chunk-steps" in said or (threshold == 0 and "all 72 chunk-steps" in said)
        assert done.notes[0] == said
        assert said.replace("will be", "were to be") in done.text()
        assert done.as_dict()["notes"] == list(done.notes)


def test_under_the_latent_signature_only_a_bound_is_forecast(
    noise_of: Callable[..., Tensor], cached: Callable[..., tuple[Tensor, RunReport]]
) -> None:
    policy = Chunkwise(threshold=10, warmup_steps=4, max_reuse=6, signature="latent")
    (said,) = policy.forecast(Outlook(2, flow_sigmas(30), lambda: pytest.fail("not needed")))
    _, report = cached(noise_of(6), ChunkSchedule(6, 3, 30, 4), policy=policy)
    assert said.startswith(f"at least {report.chunk_steps_computed} of 60 chunk-steps will be computed")


def test_a_policy_that_forecasts_nothing_is_asked_nothing(net: SkyReelsV2) -> None:
    assert not isinstance(Always(), Forecasts)
    with Session(SkyReelsAdapter(net), ChunkSchedule(3, 3, 4), flow_sigmas(4), (4, 4)) as session:
        assert session.forecast(torch.device("cpu")) == ()


@pytest.mark.parametrize(
    ("rule", "steps", "sentences"),
    [
        (Chunkwise(), 4, ["of 4 steps per chunk 4 are always computed, so none can be reused (0%)", "smaller picture or a smaller window"]),
        (Chunkwise(), 6, ["so none can be reused", "a lower warmup_steps (it is 5), a smaller picture or"]),
        (Chunkwise(warmup_steps=1), 8, ["of 8 steps per chunk 2 are always computed, so at most 6", "few steps are a speed-up already"]),
        (Chunkwise(warmup_steps=18), 20, ["so at most 1 can be reused (5%). What helps: a lower warmup_steps (it is 18)"]),
        (Chunkwise(start_percent=0.5, end_percent=0.5), 50, ["so at most 1 can be reused", "a wider start_percent to end_percent"]),
    ],
)
def test_too_few_steps_are_called_too_few_with_what_helps(rule: Chunkwise, steps: int, sentences: list[str]) -> None:
    (said,) = headroom(rule, steps)
    for sentence in sentences:
        assert sentence in said
    assert said in rule.forecast(Outlook(1, flow_sigmas(steps), lambda: [0.0] * steps))


@pytest.mark.parametrize(("rule", "steps"), [(Chunkwise(), 9), (Chunkwise(), 50), (Chunkwise(warmup_steps=16), 20), (Chunkwise(threshold=0), 4)])
def test_where_there_is_something_to_skip_nothing_is_said(rule: Chunkwise, steps: int) -> None:
    assert headroom(rule, steps) == ()


def test_headroom_names_a_way_for_every_setting() -> None:
    for steps in (1, 2, 5, 8, 9, 20):
        for warmup in (1, 3, 30):
            for start, end in ((0.0, 1.0), (0.9, 1.0), (0.0, 0.1)):
                rule = Chunkwise(warmup_steps=warmup, start_percent=start, end_percent=end)
                said = headroom(rule, steps)
                assert bool(said) == (steps <= 8 or free_steps(rule, steps) < 3)
                assert all("What helps: " in s for s in said)
