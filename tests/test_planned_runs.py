"""Runs that keep to a plan, with a KV cache and in bidirectional sections: what they compute, count and say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flowcache_core.sampling.loop as loop
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.policies import Chunkwise, Motion
from flowcache_core.policies.planned import Planned, share_of
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.run.report import RunReport
from flowcache_core.run.sections import SectionSession
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.given import CLEAN, GivenNoise
from flowcache_core.sampling.loop import frame_seconds, sample_chunks, sample_sections
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.plan import read_plan
from flowcache_core.sampling.planner import plan_in_part
from flowcache_core.sampling.schedule import ChunkSchedule, Row, Section, sections_of
from flowcache_core.sampling.solvers import Solver, UniPC
from tests.driven import Driven, DrivenSections

Noise = Callable[..., Tensor]


@dataclass
class Runs:
    """Makes films of one network, either way."""

    net: SkyReelsV2
    text: Tensor

    def causal(self, noise: Tensor, schedule: ChunkSchedule, policy: CachePolicy | None = None, given: GivenNoise = CLEAN,
               solver: Solver | None = None) -> tuple[Tensor, RunReport]:  # fmt: skip
        levels = flow_sigmas(schedule.steps)
        with Session(SkyReelsAdapter(self.net), schedule, levels, (noise.shape[3], noise.shape[4]), policy=policy) as session:
            session.forecast(noise.device)

            def predict(x: Tensor, chunk: Chunk) -> Tensor:
                return session.denoise(x, chunk, self.text, ("cond",))

            film = sample_chunks(Driven(predict, session), noise, schedule, levels, solver or UniPC(), given)
        return film, session.report

    def sections(self, noise: Tensor, sections: Sequence[Section], policy: CachePolicy | None = None,
                given: GivenNoise = CLEAN) -> tuple[Tensor, RunReport]:  # fmt: skip
        levels = flow_sigmas(sections[0].schedule.steps)
        with SectionSession(SkyReelsAdapter(self.net), sections, (noise.shape[3], noise.shape[4]), policy=policy) as session:
            session.forecast()

            def predict(x: Tensor, sigmas: tuple[float, ...], row: Row) -> Tensor:
                return session.denoise(x, sigmas, self.text, ("cond",))

            film = sample_sections(DrivenSections(predict, session), noise, sections, levels, UniPC(), given)
        return film, session.report


@pytest.fixture
def runs(net: SkyReelsV2, texts: Tensor) -> Runs:
    return Runs(net, texts[:1])


SCHEDULES = [
    ChunkSchedule(9, 3, 12, 2),
    ChunkSchedule(8, 3, 12, 0),
    ChunkSchedule(11, 3, 12, 5, 3, prefix=4, suffix=1),
    ChunkSchedule(10, 3, 12, 12, 1),
]
FILMS = [
    sections_of(9, 3, 12, 2, 9, 2),
    sections_of(8, 3, 12, 0, 9, 2),
    sections_of(9, 3, 12, 3, 9, 2, prefix=4, suffix=1),
    sections_of(20, 3, 12, 2, 9, 2),
    sections_of(19, 3, 12, 1, 9, 4, prefix=1, suffix=2),
]
LIGHT = GivenNoise(20, 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_plan_of_everything_equals_no_plan_bit_for_bit(runs: Runs, noise_of: Noise, schedule: ChunkSchedule) -> None:
    noise = noise_of(schedule.frames)
    (one, plain), (other, planned) = (runs.causal(noise, schedule, policy, LIGHT) for policy in (None, Planned(share=1.0)))
    assert torch.equal(one, other)
    assert plain.as_dict()["map"] == planned.as_dict()["map"]
    assert (plain.plans, planned.share) == ((), 1.0)


@pytest.mark.parametrize("sections", FILMS)
def test_a_plan_of_every_row_equals_no_plan_bit_for_bit(runs: Runs, noise_of: Noise, sections: tuple[Section, ...]) -> None:
    noise = noise_of(sections[-1].end)
    (one, plain), (other, planned) = (runs.sections(noise, sections, policy, LIGHT) for policy in (None, Planned(share=1.0)))
    assert torch.equal(one, other)
    assert plain.as_dict()["map"] == planned.as_dict()["map"]
    assert (plain.chunk_steps, plain.tokens) == (planned.chunk_steps_computed, planned.tokens_computed)


@pytest.mark.parametrize("share", [0.55, 0.4, 0.13])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_was_planned_and_forecast_is_what_is_computed_and_counted(runs: Runs, noise_of: Noise, schedule: ChunkSchedule, share: float) -> None:
    film, report = runs.causal(noise_of(schedule.frames), schedule, Planned(share=share))
    (plan,) = report.plans
    assert torch.isfinite(film).all()
    assert report.share == pytest.approx(plan.share(schedule))
    assert ((report.map == 2) == (report.planned == 1)).all()
    assert report.chunk_steps == schedule.chunk_steps
    assert report.notes[0].startswith(
        f"{report.chunk_steps_computed} of {schedule.chunk_steps} chunk-steps will be computed, {report.share:.0%} of all tokens"
    )
    assert f"computed {report.chunk_steps_computed} of {report.chunk_steps} chunk-steps, {report.share:.0%} of all tokens" in report.summary()
    assert report.host_syncs == 0


@pytest.mark.parametrize("share", [0.55, 0.4, 0.13])
@pytest.mark.parametrize("sections", FILMS)
def test_every_row_of_a_window_is_computed_whole_or_skipped_and_counted_so(
    runs: Runs, noise_of: Noise, sections: tuple[Section, ...], share: float
) -> None:
    noise, schedules = noise_of(sections[-1].end), [section.schedule for section in sections]
    film, report = runs.sections(noise, sections, Planned(share=share), LIGHT)
    assert torch.isfinite(film).all()
    for section, plan in zip(sections, report.plans, strict=True):
        plan.check(section.schedule)
        for row in section.schedule.rows:
            assert len({report.map[chunk.index + section.index, chunk.step] for chunk in row.active}) == 1
    assert report.share == pytest.approx(share_of(report.plans, schedules))
    assert ((report.map == 2) == (report.planned == 1)).all()
    rows = sum(len(one.rows) for one in schedules)
    assert f" of {rows} rows ({report.chunk_steps_computed} of {report.chunk_steps} chunk-steps) will be computed" in report.notes[0]
    assert f"{report.share:.0%} of all tokens" in report.notes[0]
    given = sections[0].schedule.prefix, sections[-1].schedule.suffix
    assert torch.equal(film[:, :, : given[0]], noise[:, :, : given[0]])
    assert torch.equal(film[:, :, noise.shape[2] - given[1] :], noise[:, :, noise.shape[2] - given[1] :])


def test_each_evaluation_of_the_network_is_one_that_the_plan_names(runs: Runs, noise_of: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def counted(adapter: SkyReelsAdapter, *given: object, way: Callable[..., object] = SkyReelsAdapter.whole) -> object:
        nonlocal calls
        calls += 1
        return way(adapter, *given)

    monkeypatch.setattr(SkyReelsAdapter, "whole", counted)
    _, report = runs.sections(noise_of(20), FILMS[3], Planned(share=0.4))
    rows = [row for plan, w in zip(report.plans, FILMS[3], strict=True) for row in w.schedule.rows if any(plan.computes(c) for c in row.active)]
    assert calls == len(rows)


@pytest.mark.parametrize("budget", [1e-3, 2.5, 1e5])
def test_a_budget_in_seconds_makes_the_film_of_the_plan_it_settles_on(
    runs: Runs, noise_of: Noise, monkeypatch: pytest.MonkeyPatch, budget: float
) -> None:
    """A frame that takes 10 ms: the timing itself leaves no trace in film or counts."""
    monkeypatch.setattr(loop, "seconds_of", lambda evaluate, chunk, device: (evaluate(chunk), 0.01 * 9)[1])
    for make, what in ((runs.causal, SCHEDULES[2]), (runs.sections, FILMS[4])):
        frames = what.frames if isinstance(what, ChunkSchedule) else what[-1].end
        film, report = make(noise_of(frames), what, Planned(seconds=budget), LIGHT)  # type: ignore[operator]
        exact = report.plans if report.plans[0].together else report.plans[0]
        again, other = make(noise_of(frames), what, Planned(exact=exact), LIGHT)  # type: ignore[operator]
        assert torch.equal(film, again)
        assert (report.as_dict()["map"], report.tokens, report.tokens_computed) == (other.as_dict()["map"], other.tokens, other.tokens_computed)
        assert report.notes[0].split(":")[0] == other.notes[0]
        assert f"so {budget:g} s are " in report.notes[1]
        assert ("cannot be reached" in report.notes[0]) == (budget == 1e-3)
        assert (report.share == 1) == (budget == 1e5)


def test_a_budget_in_seconds_is_kept_in_steps_of_whole_evaluations(noise_of: Noise) -> None:
    schedule, sections = ChunkSchedule(15, 3, 50, 5), sections_of(40, 3, 50, 5, 15, 5)
    for budget in (3.0, 4.0, 5.0):
        policy = Planned(seconds=budget)
        one = policy.timed(schedule, 0.01)
        assert budget - 0.03 < 0.01 * one.frames_computed(schedule) <= budget
        schedules = [section.schedule for section in sections]
        frames = sum(plan.frames_computed(each) for plan, each in zip(policy.plans(schedules, 0.01), schedules, strict=True))
        assert budget - 0.15 * len(sections) < 0.01 * frames <= budget


@pytest.mark.parametrize(("make", "what", "network", "more"), [("causal", SCHEDULES[0], "forward", 3), ("causal", SCHEDULES[3], "forward", 2),
                                                              ("sections", FILMS[0], "whole", 2)])  # fmt: skip
def test_a_timing_is_a_warm_up_and_one_evaluation_or_two(
    runs: Runs, noise_of: Noise, monkeypatch: pytest.MonkeyPatch, make: str, what: Any, network: str, more: int
) -> None:
    """Two where the second chunk is denoised beside the first."""
    calls, real = [0], getattr(SkyReelsAdapter, network)

    def counted(*args: Any) -> Any:
        calls[-1] += 1
        return real(*args)

    monkeypatch.setattr(SkyReelsAdapter, network, counted)
    frames = what.frames if isinstance(what, ChunkSchedule) else what[-1].end
    for policy in (Planned(seconds=1e6), Planned(share=1.0)):
        getattr(runs, make)(noise_of(frames), what, policy)
        calls.append(0)
    timed, untimed, _ = calls
    assert timed - untimed == more


def test_a_chunk_that_sees_more_takes_longer_by_what_the_second_one_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame takes 1 s, and 0.1 s for each that its chunk sees."""
    schedule = ChunkSchedule(15, 3, 10, 3, 4)
    seen = {k: sum(schedule.span(k)) - schedule.span(schedule.oldest(k))[0] for k in range(5)}
    assert seen == {0: 3, 1: 6, 2: 9, 3: 12, 4: 12}
    monkeypatch.setattr(loop, "seconds_of", lambda evaluate, chunk, device: chunk.frames * (1 + 0.1 * seen[chunk.index]))
    assert frame_seconds(schedule, lambda chunk: None, torch.device("cpu")) == pytest.approx(1 + 0.1 * sum(seen.values()) / 5)
    alone = replace(schedule, ar_step=10)
    assert frame_seconds(alone, lambda chunk: None, torch.device("cpu")) == pytest.approx(1.3)


@pytest.mark.parametrize("make", ["causal", "sections"])
def test_a_run_that_is_interrupted_while_it_is_timed_leaves_nothing(runs: Runs, noise_of: Noise, make: str) -> None:
    text, runs.text = runs.text, torch.zeros(1, 8, 3)
    what = SCHEDULES[0] if make == "causal" else FILMS[0]
    with pytest.raises(RuntimeError):
        getattr(runs, make)(noise_of(9), what, Planned(seconds=1.0))
    runs.text = text
    film, _ = getattr(runs, make)(noise_of(9), what, Planned(share=0.4))
    assert torch.equal(film, getattr(runs, make)(noise_of(9), what, Planned(share=0.4))[0])


# plans that were made elsewhere


def test_a_plan_goes_through_the_json_of_a_report_and_comes_back(runs: Runs, noise_of: Noise) -> None:
    film, report = runs.causal(noise_of(9), SCHEDULES[0], Planned(share=0.4))
    for text in (json.dumps(report.as_dict()), json.dumps(report.as_dict()["plan"])):
        plan = read_plan(text)
        assert plan == report.plans[0]
        assert torch.equal(film, runs.causal(noise_of(9), SCHEDULES[0], Planned(exact=plan))[0])
    film, report = runs.sections(noise_of(20), FILMS[3], Planned(share=0.4))
    plan = read_plan(json.dumps(report.as_dict()))
    assert plan == report.plans
    assert torch.equal(film, runs.sections(noise_of(20), FILMS[3], Planned(exact=plan))[0])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", r"the plan is no JSON \(.* in line 1, column 2\): give it what Cache Report writes as json"),
        ("[]", "this is no plan: a plan is a JSON object"),
        ("5", "this is no plan"),
        ('{"plan": null}', "this report is of a run without a plan"),
        ('{"map": []}', "this is no plan"),
        ('[{"format": "flowcache-plan-1", "steps": 0, "computed": []}]', "the plan is damaged"),
    ],
)
def test_what_is_no_plan_is_refused_with_what_it_should_be(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_plan(text)


def test_a_plan_of_another_run_is_refused_with_both_numbers() -> None:
    causal, sections = SCHEDULES[0], [section.schedule for section in FILMS[3]]
    plan, plans = Planned(share=0.4).plan(causal), Planned(share=0.4).plans(sections)
    with pytest.raises(ValueError, match="the plan is for 3 chunks of 12 steps, this run has 3 chunks of 10 steps"):
        Planned(exact=plan).plan(replace(causal, steps=10))
    with pytest.raises(ValueError, match="out of step"):
        Planned(exact=plan).plan(replace(causal, ar_step=5))
    with pytest.raises(ValueError, match=r"the plan is for block-causal attention, and this run is bidirectional: .* set attention to block-causal"):
        Planned(exact=plan).plans(sections)
    with pytest.raises(ValueError, match="the plan is for bidirectional attention, and this run is block-causal"):
        Planned(exact=plans).plan(causal)
    with pytest.raises(ValueError, match=f"the plan is for {len(plans)} sections, and this film has 1"):
        Planned(exact=plans).plans(sections[:1])
    with pytest.raises(ValueError, match="leave one of them out"):
        Planned(exact=plan, seconds=3.0)


@pytest.mark.parametrize("policy", [Chunkwise(), Motion()])
def test_a_policy_that_decides_for_every_chunk_is_refused_in_a_window(net: SkyReelsV2, policy: CachePolicy) -> None:
    with pytest.raises(ValueError, match=f"{policy.title} decides for every chunk by itself"):
        SectionSession(SkyReelsAdapter(net), FILMS[0], (4, 4), policy=policy)


def test_nothing_is_said_of_plans_where_there_is_none(runs: Runs, noise_of: Noise) -> None:
    for _, report in (runs.causal(noise_of(9), SCHEDULES[0]), runs.sections(noise_of(9), FILMS[0])):
        assert (report.notes, report.as_dict()["plan"]) == ((), None)


def test_a_plan_in_part_is_refused_as_a_plan_by_chunk() -> None:
    schedule = ChunkSchedule(9, 3, 50, 5)
    plan = plan_in_part(schedule, 0.13, 0.25)
    assert any(plan.partial)
    with pytest.raises(ValueError, match="use that one with the same budget, or the plan of a run of Chunkwise Cache"):
        Planned(exact=plan).plan(schedule)
