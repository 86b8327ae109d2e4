"""Plans: in step, within their budget, plain data; the loop under a plan; the integrator between computed steps."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowcache_core.policies.planned import Planned
from flowcache_core.run.report import RunReport
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.path import Path
from flowcache_core.sampling.plan import FORMAT, Plan, attended
from flowcache_core.sampling.planner import evenly, least_share, plan_for, plan_in_part
from flowcache_core.sampling.profile import DISTILLED, Profile
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler, Multistep, Solver, UniPC
from flowcache_core.sampling.walk import CellWalk
from tests.driven import Driven, sample_section

Cached = Callable[..., tuple[Tensor, RunReport]]


@st.composite
def schedules(draw: st.DrawFn, windows: bool = False) -> ChunkSchedule:
    """Any schedule that can be run: given frames at both ends, a short last chunk, a window or none."""
    steps, size = draw(st.integers(1, 24)), draw(st.integers(1, 4))
    frames = draw(st.integers(1, 6 * size))
    prefix = draw(st.integers(0, frames - 1))
    suffix = draw(st.integers(0, frames - prefix - 1))
    window = draw(st.none() | st.integers(2, 4)) if windows else None
    try:
        return ChunkSchedule(frames, size, steps, draw(st.integers(0, steps + 2)), window, min(prefix, (window or 99) * size), suffix)
    except ValueError:
        return ChunkSchedule(frames, size, steps, steps, None, prefix, suffix)


def test_the_plan_of_the_worked_example() -> None:
    """47 of 152 chunk evaluations for three chunks that start five rows apart: the published example of docs/architecture.md."""
    assert plan_for(ChunkSchedule(9, 3, 50, 5), 47 / 152).computed == (
        (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 41, 43, 45, 47, 49),
        (1, 7, 13, 19, 22, 25, 28, 31, 36, 40, 44, 47, 49),
        (2, 8, 14, 20, 23, 26, 31, 35, 39, 42, 45, 47, 49),
    )


def test_the_first_chunk_is_nearly_whole_where_that_leaves_enough() -> None:
    """At least .3 of the other chunks' steps; and whole where they have more than two thirds of theirs."""
    assert [[len(steps) for steps in plan_for(ChunkSchedule(9, 3, 50, 5), share).computed] for share in (0.5, 0.53, 0.56, 0.9)] == [
        [30, 22, 22], [46, 16, 16], [47, 18, 18], [50, 42, 42],
    ]  # fmt: skip


def test_rows_of_a_window_are_denser_at_both_ends_than_in_the_middle() -> None:
    """Of 60 rows of three chunks that start five rows apart, 34: how many of the first, the middle and the last twelve."""
    schedule = ChunkSchedule(9, 3, 50, 5)
    plan = plan_for(schedule, 34 / 60, together=True)
    rows = [number for number, row in enumerate(schedule.rows) if any(plan.computes(chunk) for chunk in row.active)]
    first, middle, last = (sum(begin <= number < begin + 12 for number in rows) for begin in (0, 24, 48))
    assert len(rows) == 34
    assert first > middle < last


CASES = st.one_of(st.tuples(schedules(windows=True), st.just(False)), st.tuples(schedules(), st.just(True)))
"""A schedule, and whether attention is bidirectional: then there is no window."""


@settings(max_examples=150, deadline=None)
@given(case=CASES, share=st.floats(0.01, 1.0))
def test_whatever_is_computed_all_it_attends_to_is_computed_in_that_row(case: tuple[ChunkSchedule, bool], share: float) -> None:
    schedule, together = case
    plan = plan_for(schedule, share, together=together)
    assert plan.check(schedule) is plan
    for row in schedule.rows:
        for chunk in row.active:
            if plan.computes(chunk):
                assert all(plan.computes(other) for other in attended(schedule, row, chunk, together))


@settings(max_examples=60, deadline=None)
@given(case=CASES, share=st.floats(0.01, 1.0))
def test_models_that_were_taught_their_last_step_compute_it(case: tuple[ChunkSchedule, bool], share: float) -> None:
    schedule, together = case
    plan = plan_for(replace(schedule, profile=DISTILLED), share, together=together)
    assert all(steps[-1] == schedule.steps - 1 for steps in plan.computed if steps)


@pytest.mark.parametrize(("together", "lasts"), [(False, [47, 42, 45]), (True, [44, 46, 41])])
def test_a_small_budget_is_not_spent_on_the_last_steps(together: bool, lasts: list[int]) -> None:
    """Of 50 steps an eighth ends before the last, where another evaluation is worth more earlier on; two fifths end with it."""
    more, few = ([steps[-1] for steps in plan_for(ChunkSchedule(9, 3, 50, 5), share, together).computed] for share in (0.4, 0.133))
    assert more == [49, 49, 49]
    assert few == lasts


def test_a_small_budget_is_spread_over_the_chunks() -> None:
    """The first chunk has at most twice the evaluations of the others, but where it is nearly whole."""
    schedule = ChunkSchedule(15, 5, 50, 5)
    assert [[len(steps) for steps in plan_for(schedule, share).computed] for share in (0.116, 0.133, 0.174)] == [
        [7, 4, 4], [8, 5, 5], [10, 7, 7],
    ]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(case=CASES, share=st.floats(0.01, 1.0))
def test_the_budget_is_kept(case: tuple[ChunkSchedule, bool], share: float) -> None:
    schedule, together = case
    full, plan = Plan.full(schedule, together).frames_computed(schedule), plan_for(schedule, share, together=together)
    computed, wanted = plan.frames_computed(schedule), share * full
    assert computed <= max(wanted, least_share(schedule, together) * full) + 1e-3
    assert plan.share(schedule) == computed / full


@pytest.mark.parametrize(
    "schedule", [ChunkSchedule(9, 3, 50, 5), ChunkSchedule(15, 3, 50, 5), ChunkSchedule(9, 3, 30, 3), ChunkSchedule(9, 3, 50, 50)]
)
@pytest.mark.parametrize("share", [0.12, 0.2, 0.3, 0.4, 0.56, 0.7])
def test_the_budget_is_used_within_one_chunk_step(schedule: ChunkSchedule, share: float) -> None:
    full = Plan.full(schedule).frames_computed(schedule)
    assert share * full - plan_for(schedule, share).frames_computed(schedule) < 3


@settings(max_examples=60, deadline=None)
@given(case=CASES)
def test_the_whole_budget_is_the_uncached_run(case: tuple[ChunkSchedule, bool]) -> None:
    schedule, together = case
    plan = plan_for(schedule, 1.0, together=together)
    assert plan == Plan.full(schedule, together)
    assert plan.is_full


@settings(max_examples=60, deadline=None)
@given(case=CASES, share=st.floats(0.01, 1.0))
def test_a_plan_survives_json(case: tuple[ChunkSchedule, bool], share: float) -> None:
    schedule, together = case
    plan = plan_for(schedule, share, together=together)
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 16, 20, 24, 50, 100, 300, 1000])
@pytest.mark.parametrize("share", [0.04, 0.13, 0.3, 0.4, 0.55])
def test_no_number_of_steps_is_refused(steps: int, share: float) -> None:
    schedule = ChunkSchedule(9, 3, steps, min(5, steps))
    assert plan_for(schedule, share).check(schedule).share(schedule) <= max(share, least_share(schedule)) + 1e-6


def test_two_steps_of_fifty_are_four_percent() -> None:
    schedule = ChunkSchedule(9, 3, 50, 50)
    assert [len(steps) for steps in plan_for(schedule, 0.04).computed] == [2, 2, 2]


@pytest.mark.parametrize(("values", "said"), [
    ({}, "this is no plan"), ([1, 2], "this is no plan"), (None, "this is no plan"), ({"format": "flowcache-plan-0"}, "this is no plan"),
    ({"format": FORMAT, "steps": 0, "computed": []}, "damaged"), ({"format": FORMAT, "steps": 5, "computed": [[0, "4"]]}, "damaged"),
    ({"format": FORMAT, "steps": True, "computed": []}, "damaged"), ({"format": FORMAT, "steps": 5, "computed": [[4]], "together": 1}, "damaged"),
])  # fmt: skip
def test_what_is_no_plan_is_refused(values: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan.from_dict(values)


@pytest.mark.parametrize(("plan", "said"), [
    (Plan(9, ((0, 9), (0, 9))), "2 chunks of 9 steps, this run has 2 chunks of 10 steps"), (Plan(10, ((0, 9),)), "1 chunks of 10"),
    (Plan(10, ((0, 9), ())), "must rise"), (Plan(10, ((9, 0), (9,))), "must rise"), (Plan(10, ((0, 10), (9,))), "at most 9"),
    (Plan(10, ((0, 9), (1, 9))), "row 5 computes chunk 2 at step 2, but not chunk 1"),
])  # fmt: skip
def test_a_plan_of_another_schedule_is_refused(plan: Plan, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan.check(ChunkSchedule(6, 3, 10, 3))


def test_a_plan_of_given_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="its frames are given"):
        Plan(4, ((0,), (0, 3))).check(ChunkSchedule(6, 3, 4, 1, prefix=3))


def test_evenly_is_fewer_steps_on_a_finer_schedule() -> None:
    plan = evenly(ChunkSchedule(9, 3, 30, 3), 15)
    assert plan.computed == (tuple(range(0, 30, 2)), tuple(range(1, 30, 2)), tuple(range(0, 30, 2)))


@pytest.mark.parametrize("solver", [UniPC(), Euler()])
@pytest.mark.parametrize("schedule", [ChunkSchedule(9, 3, 8, 3), ChunkSchedule(7, 3, 6, 0, prefix=2, suffix=1)])
def test_a_full_plan_is_the_uncached_film_bit_for_bit(cached: Cached, noise_of: Callable[..., Tensor], solver: Solver,
                                                      schedule: ChunkSchedule) -> None:  # fmt: skip
    noise = noise_of(schedule.frames)
    plain, _ = cached(noise, schedule, solver)
    planned, report = cached(noise, schedule, solver, Planned(share=1.0))
    assert torch.equal(plain, planned)
    assert report.share == 1


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_report_counts_what_the_plan_said(cached: Cached, noise_of: Callable[..., Tensor], share: float) -> None:
    schedule = ChunkSchedule(10, 3, 20, 4)
    _, report = cached(noise_of(10), schedule, UniPC(), Planned(share=share))
    plan = plan_for(schedule, share)
    assert report.share == pytest.approx(plan.share(schedule))
    assert [tuple(i for i, digit in enumerate(row) if digit == 2) for row in report.map] == list(plan.computed)
    assert report.host_syncs == 0


def test_a_plan_keeps_nothing_to_replay(cached: Cached, noise_of: Callable[..., Tensor]) -> None:
    assert Planned().keeps is None
    schedule = ChunkSchedule(9, 3, 12, 3)
    plain, planned = (cached(noise_of(9), schedule, UniPC(), policy)[1].kv_peak_bytes for policy in (None, Planned(share=0.4)))
    assert planned == plain


def test_the_network_is_asked_at_the_computed_steps_alone() -> None:
    schedule, asked = ChunkSchedule(6, 3, 12, 4), []
    sigmas, plan = flow_sigmas(12), plan_for(ChunkSchedule(6, 3, 12, 4), 0.5)

    def predict(x: Tensor, chunk: object) -> Tensor:
        asked.append((chunk.index, chunk.step))
        return torch.sin(x)

    sample_chunks(Driven(predict, exact=plan), torch.randn(1, 2, 6, 2, 2), schedule, sigmas, UniPC())
    assert sorted(asked) == sorted([(k, step) for k in range(2) for step in plan.computed[k]] + [(0, 12)])


def test_rows_are_skipped_as_a_whole_in_a_bidirectional_window() -> None:
    schedule, levels, rows = ChunkSchedule(6, 3, 12, 4), flow_sigmas(12), []
    plan = plan_for(schedule, 0.5, together=True)

    def predict(x: Tensor, per_frame: tuple[float, ...], row: object) -> Tensor:
        rows.append(row)
        for chunk in row.active:
            assert set(per_frame[chunk.start : chunk.start + chunk.frames]) == {levels[chunk.step]}
        return torch.sin(x)

    sample_section(predict, torch.randn(1, 2, 6, 2, 2), schedule, levels, UniPC(), plan=plan)
    assert len(rows) == 8 == round(0.5 * len(schedule.rows))
    assert [tuple(c.step for row in rows for c in row.active if c.index == k) for k in range(2)] == list(plan.computed)


Field = Callable[[Tensor, float], Tensor]


def walk(field: Field, x: Tensor, path: Path, kind: Solver) -> Tensor:
    memory = kind.start(torch.Generator())
    for number, sigma in enumerate(path.sigmas[:-1]):
        x = kind.step(x, field(x, sigma), number, path, memory)
    return x


def flow(seed: int = 0) -> tuple[Field, Tensor]:
    """Velocity of the straight flow from noise to a mixture of two points, whose clean latent is known everywhere; smooth and nonlinear."""
    points = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def field(x: Tensor, sigma: float) -> Tensor:
        apart = ((x[None] - (1 - sigma) * points[:, None]) ** 2).sum(-1) / (2 * (sigma**2 + 0.3 * (1 - sigma) ** 2))
        weights = torch.softmax(-apart, 0)
        clean = 0.7 * (weights[..., None] * points[:, None]).sum(0) + 0.3 * (1 - sigma) * x / ((1 - sigma) ** 2 + sigma**2)
        return (x - clean) / sigma

    return field, torch.randn(16, 8, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


def ragged(steps: int, rng: random.Random) -> tuple[int, ...]:
    """Of groups of four steps two or three, with the first and the last."""
    kept = {0, steps - 1}
    for at in range(0, steps, 4):
        kept.update(rng.sample(range(at, min(at + 4, steps)), 2))
    return tuple(sorted(kept))


def error(kind: Solver, steps: int, field: Field, x: Tensor, kept: tuple[int, ...] | None = None) -> float:
    """Against a fine reference of the same flow, down to the same last level."""
    levels = flow_sigmas(steps, 3.0)
    path = Path(levels, kept or tuple(range(steps)))
    end = 2 / 3  # the clean step from the last level to 0 is of first order for every solver, so all stop before it
    stop = next(i for i, s in enumerate(path.sigmas) if s < 1 - end)
    memory, truth = kind.start(torch.Generator()), reference(field, x, levels[0], path.sigmas[stop])
    for number in range(stop):
        x = kind.step(x, field(x, path.sigmas[number]), number, path, memory)
    return float((x - truth).norm() / truth.norm())


def reference(field: Field, x: Tensor, start: float, end: float, steps: int = 4000) -> Tensor:
    """Runge-Kutta of fourth order in float64."""
    h = (end - start) / steps
    for i in range(steps):
        s = start + i * h
        a = field(x, s)
        b = field(x + h / 2 * a, s + h / 2)
        c = field(x + h / 2 * b, s + h / 2)
        d = field(x + h * c, s + h)
        x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


@pytest.mark.parametrize("spacing", ["even", "ragged"])
def test_multistep_is_of_second_order_on_steps_of_any_length(spacing: str) -> None:
    field, x = flow()
    kept = {n: ragged(n, random.Random(0)) if spacing == "ragged" else None for n in (64, 256)}
    coarse, fine = (error(Multistep(), n, field, x, kept[n]) for n in (64, 256))
    order = math.log(coarse / fine, 4)
    assert order > 1.75, f"{coarse:.2e} with 64 levels, {fine:.2e} with 256: order {order:.2f}"
    euler = [error(Euler(), n, field, x, kept[n]) for n in (64, 256)]
    assert 0.8 < math.log(euler[0] / euler[1], 4) < 1.3, "the check itself: Euler is of first order"


def test_a_larger_budget_is_nearer_to_the_truth() -> None:
    """On the analytic flow, for one chunk; the mean over flows falls at every share."""
    levels, errors = flow_sigmas(50, 8.0), []
    for share in (0.1, 0.16, 0.25, 0.4, 0.6):
        path = Path(levels, plan_for(ChunkSchedule(3, 3, 50, 5), share).computed[0])
        total = 0.0
        for seed in range(4):
            field, x = flow(seed)
            truth = walk(field, x, Path.whole(flow_sigmas(800, 8.0)), Multistep())
            total += float((walk(field, x, path, Multistep()) - truth).norm())
        errors.append(total)
    assert errors == sorted(errors, reverse=True)


def test_a_constant_clean_latent_is_reached_exactly_from_any_start() -> None:
    levels, clean, noise = flow_sigmas(20), torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for steps in ((0, 7, 19), (3, 4, 19), (0, 19), (6, 19), (19,)):
        x = (1 - levels[0]) * clean + levels[0] * noise
        for kind in (Multistep(), Euler(), UniPC()):
            out = walk(lambda x, sigma: (x - clean) / sigma, x, Path(levels, steps), kind)
            torch.testing.assert_close(out, clean, rtol=1e-9, atol=1e-9)


def test_clean_latents_on_a_line_of_the_clock_are_integrated_exactly() -> None:
    """D = a + b u: the weights of two nodes reproduce the integral that a fine quadrature gives."""
    levels = flow_sigmas(50)
    path = Path(levels, (8, 14, 19, 27, 40, 49))
    for number in range(1, 4):
        ratio, (w0, w1) = path.weights(number, (number - 1, number))
        start, end = path.sigmas[number], path.sigmas[number + 1]
        assert ratio == pytest.approx(end / start)
        assert w0 + w1 == pytest.approx(1 - end / start), "a constant D moves x by the exact step"
        steps = range(path.steps[number], path.steps[number + 1])
        total = 0.0
        for step in steps:
            n = 2000
            for i in range(n):
                part = (i + 0.5) / n
                sigma = math.exp((1 - part) * math.log(levels[step]) + part * math.log(levels[step + 1]))
                total += (step + part) / sigma * (math.log(levels[step]) - math.log(levels[step + 1])) / n
        assert w0 * path.steps[number - 1] + w1 * path.steps[number] == pytest.approx(end * total, rel=1e-6)


def test_sums_are_the_steps_of_eulers_method_where_clean_latents_are_on_a_line_of_the_clock() -> None:
    levels = flow_sigmas(50)
    a, b, noise = torch.randn(3, 6, dtype=torch.float64)

    def field(x: Tensor, sigma: float) -> Tensor:
        return (x - a - b * levels.index(sigma) / 50) / sigma

    def before_the_last(path: Path, kind: Solver) -> Tensor:
        """Of the last step only its own clean latent is left."""
        memory, x = kind.start(torch.Generator()), noise
        for number, sigma in enumerate(path.sigmas[:-2]):
            x = kind.step(x, field(x, sigma), number, path, memory)
        return x

    whole = before_the_last(Path.whole(levels), Euler())
    skipped = Path(levels, (0, 1, 2, 3, 4, 8, 14, 19, 27, 40, 48, 49))
    by_sums, at_once = (before_the_last(skipped, Euler(sums=sums).skipping) for sums in (True, False))
    assert not torch.allclose(at_once, whole, rtol=1e-3)
    torch.testing.assert_close(by_sums, whole, rtol=1e-9, atol=1e-9)
    assert walk(field, noise, Path.whole(levels), Euler(sums=True)).equal(walk(field, noise, Path.whole(levels), Euler()))


@pytest.mark.parametrize("kind", [Multistep(), Multistep(sums=True)])
def test_nothing_is_interpolated_across_a_jump(kind: Solver) -> None:
    """Clean latents that change once, and are constant before and behind: exact, where a line across would not be."""
    levels, jump = flow_sigmas(20), 12
    before, behind, noise = torch.randn(3, 6, dtype=torch.float64)
    x = (1 - levels[0]) * before + levels[0] * noise

    def field(x: Tensor, sigma: float) -> Tensor:
        return (x - (behind if levels.index(sigma) >= jump else before)) / sigma

    def at_the_end(jumps: tuple[int, ...]) -> Tensor:
        path, memory, y = Path(levels, (0, 3, 7, 12, 17, 19), jumps), kind.start(torch.Generator()), x
        for number in range(4):
            y = kind.step(y, field(y, path.sigmas[number]), number, path, memory)
        return y

    here, end = levels[jump], levels[17]
    wanted = end / here * ((1 - here) * before + here * noise) + (1 - end / here) * behind
    torch.testing.assert_close(at_the_end((jump,)), wanted, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(at_the_end(()), wanted, rtol=1e-3)


STAGED = Profile(knots=((0.0, 1.0), (50.0, 1.0)), changes=(0.75,))


@given(st.integers(1, 12), st.integers(1, 7), st.sampled_from([1, 2, 4]), st.floats(0.0, 1.0))
@settings(deadline=None, max_examples=40)
def test_every_chunk_is_computed_at_its_jump(quarter: int, chunks: int, together: int, share: float) -> None:
    """In step, and within the budget where that allows a step more than the first, the last and that at the jump."""
    steps = 4 * quarter
    schedule = ChunkSchedule(2 * chunks, 2, steps, steps // together, 5, aligned=True, profile=STAGED)
    assert schedule.jumps == (3 * quarter,)
    for plan in (plan_for(schedule, share), plan_in_part(schedule, share, 0.25)):
        plan.check(schedule)
        assert all(set(schedule.jumps) <= set(done) and done[-1] == steps - 1 for done in plan.computed)
        assert not any(set(schedule.jumps) & set(some) for some in plan.partial)
        assert plan.share(schedule) <= max(share, least_share(schedule)) + 1e-6


def test_contradicting_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="leave one of them out"):
        Planned(seconds=5.0, exact=Plan(4, ((0, 3),)))
    with pytest.raises(ValueError, match="share is"):
        Planned(share=0.0)


def test_cells_end_as_their_chunk_does() -> None:
    """All cells at the computed steps of a plan: the film of the chunk, down to the last step near noise level 0."""
    levels, steps = flow_sigmas(50), (0, 9, 20, 33, 44, 49)
    field, x = flow()
    truth = walk(field, x, Path(levels, steps), Multistep())
    cells, film = CellWalk(2, levels, len(levels) - 2), x[None, :, None, None]
    for step in steps:
        arrived = cells.arrive(film, step)
        film, _ = cells.step(film, arrived, field(arrived[0, :, 0, 0], levels[step])[None, :, None, None], step, None)
    torch.testing.assert_close(film[0, :, 0, 0], truth, rtol=1e-10, atol=1e-10)
