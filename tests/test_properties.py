"""Whatever is asked for: a film with what was promised, or a sentence that says what to change. Never another error, and soon."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.named import policy_named as kv_named
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.models import FAMILIES
from flowcache_core.models.bundle import Bundle
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.policies import POLICIES
from flowcache_core.policies.named import policy_named
from flowcache_core.policies.planned import Planned
from flowcache_core.run.generate import Given, Job, decode, generate, generate_upstream
from flowcache_core.run.report import COMPUTED, NOT_RUN, RunReport
from flowcache_core.run.run import Run
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.plan import Plan
from flowcache_core.sampling.planner import plan_for, plan_in_part
from flowcache_core.sampling.schedule import ChunkSchedule, Section, sections_of
from flowcache_core.sampling.solvers import SOLVERS
from flowcache_core.settings import described
from tests.driven import Driven
from tests.faults import tiny_bundle

SOON_S = 10.0
MANY = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
RUNS = settings(MANY, max_examples=150)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return tiny_bundle()


def answered(call: Callable[[], Any]) -> Any:
    """What comes of the call; None where it is refused with a sentence of ours. Any other error is a failure, and so is a long wait."""
    begun = time.perf_counter()
    try:
        return call()
    except (ValueError, TypeError) as refused:
        said, kind = str(refused), type(refused)
    finally:
        assert time.perf_counter() - begun < SOON_S
    assert kind in (ValueError, TypeError), "none that is derived from these"
    assert len(said.split()) > 4, said
    assert "\n" not in said
    assert len(said) < 1500, said
    return None


# schedules and plans

COUNT = st.integers(-2, 40) | st.sampled_from([0, 1, 10**6, 10**9])
SCHEDULE = st.fixed_dictionaries(
    {"frames": COUNT, "chunk_frames": st.integers(-1, 9), "steps": COUNT, "ar_step": COUNT},
    optional={"window": st.none() | st.integers(-1, 12), "prefix": st.integers(-1, 12), "suffix": st.integers(-1, 6)},
)
SHARE = st.floats(0.0, 1.2)


def check_schedule(schedule: ChunkSchedule) -> None:
    """Every frame lies in one chunk, every chunk makes all of its steps once, in order, and no row is empty."""
    spans = [schedule.span(k) for k in range(schedule.chunks)]
    assert [start for start, _ in spans] == [sum(frames for _, frames in spans[:k]) for k in range(len(spans))]
    assert sum(frames for _, frames in spans) == schedule.frames
    assert all(frames > 0 for _, frames in spans)
    steps: dict[int, list[int]] = {}
    for row in schedule.rows:
        assert row.active
        assert row.first <= row.active[0].index <= row.active[-1].index < row.last <= schedule.chunks
        for chunk in row.active:
            steps.setdefault(chunk.index, []).append(chunk.step)
    assert steps == {k: list(range(schedule.steps)) for k in range(schedule.given, schedule.chunks)}


@MANY
@given(values=SCHEDULE)
def test_every_schedule_is_whole_or_refused(values: dict[str, Any]) -> None:
    schedule = answered(lambda: ChunkSchedule(**values))
    if schedule is not None:
        check_schedule(schedule)


WINDOWS = st.fixed_dictionaries(
    {
        "frames": COUNT,
        "chunk_frames": st.integers(-1, 6),
        "steps": COUNT,
        "ar_step": COUNT,
        "length": st.integers(-1, 30),
        "overlap": st.integers(-1, 12),
    },
    optional={"prefix": st.integers(-1, 12), "suffix": st.integers(-1, 6)},
)


@MANY
@given(values=WINDOWS)
def test_windows_cover_a_film_or_are_refused(values: dict[str, Any]) -> None:
    windows: tuple[Section, ...] | None = answered(lambda: sections_of(**values))
    if windows is None:
        return
    assert windows[0].start == 0
    assert windows[-1].end == values["frames"]
    for before, after in pairwise(windows):
        assert before.start < after.start <= before.end
        assert after.schedule.prefix == before.end - after.start
    for window in windows[:4]:
        check_schedule(window.schedule)


@MANY
@given(values=SCHEDULE, share=SHARE, part=st.floats(0.05, 1.0), together=st.booleans())
def test_a_plan_is_in_step_and_within_its_share(values: dict[str, Any], share: float, part: float, together: bool) -> None:
    schedule = answered(lambda: ChunkSchedule(**values))
    if schedule is None or schedule.chunk_steps > 2000:
        return
    plan = plan_for(schedule, share, together=together) if part > 0.9 or together else plan_in_part(schedule, share, part)
    plan.check(schedule)
    least = plan_for(schedule, 0.0, together=together) if plan.part == 1 else plan_in_part(schedule, 0.0, part)
    assert plan.share(schedule) <= max(share, least.share(schedule)) + 1e-6
    assert Plan.from_dict(plan.as_dict()).as_dict() == plan.as_dict()


# noise levels

LEVEL = st.floats(-0.5, 1.5) | st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf, 1e30, 1e-30, 5e-324, 1 - 1e-16, 1 - 1e-7, 0.5])


def tidy(levels: list[float]) -> list[float]:
    """Falling to 0, as schedulers make them, however near to each other."""
    return [*sorted({level for level in levels if 0 < level <= 1}, reverse=True), 0.0]


LEVELS = st.lists(LEVEL, max_size=8) | st.lists(LEVEL, max_size=8).map(tidy)


@MANY
@given(levels=LEVELS, solver=st.sampled_from(SOLVERS), skip=st.booleans())
def test_noise_levels_are_integrated_or_refused(bundle: Bundle, levels: list[float], solver: Any, skip: bool) -> None:
    """A network that knows the film: the film comes out, whatever the steps between, also where they lay fresh noise on it."""
    schedule = answered(lambda: ChunkSchedule(4, 2, len(levels) - 1, 1))
    if schedule is None:
        return
    run = answered(lambda: Run(SKYREELS, bundle.adapter(), schedule, tuple(levels), (16, 2, 2), policy=Planned(share=0.6) if skip else None))
    if run is None:
        return
    clean = torch.linspace(-1, 1, 4).view(1, 1, 4, 1, 1).expand(1, 2, 4, 2, 2)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = levels[0] * noise + (1 - levels[0]) * clean

    def known(x: Tensor, chunk: Any) -> Tensor:
        return (x - clean[:, :, chunk.start : chunk.start + chunk.frames]) / (1.0 if chunk.committing else levels[chunk.step])

    film = sample_chunks(Driven(known, exact=run.plan, schedule=schedule), noisy, schedule, run.sigmas, solver())
    assert torch.isfinite(film).all()
    if len(levels) < 4:
        torch.testing.assert_close(film, clean.contiguous(), rtol=1e-2, atol=1e-2)


@MANY
@given(steps=COUNT, shift=st.floats(), denoise=st.floats())
def test_the_schedulers_levels_fall_or_are_refused(steps: int, shift: float, denoise: float) -> None:
    for family in FAMILIES:
        answered(lambda noise=family.noise: noise.levels(min(steps, 5000), shift, denoise))


# settings


def setting_of(rule: Any, default: Any) -> st.SearchStrategy[Any]:
    if rule.options:
        return st.sampled_from([*rule.options, "nonsense", ""])
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, str):
        return st.sampled_from(["", "nonsense", "../x", "\0"])
    low, high = (0.0 if rule.low is None else rule.low), (100.0 if rule.high is None else rule.high)
    odd = st.sampled_from([low, high, low - 1, high + 1, math.nan, math.inf])
    return odd | (st.integers(int(low), min(int(high), 50)) if isinstance(default, int) else st.floats(low, min(high, 50.0)))


def settings_of_kind(kind: Any) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: setting_of(rule, kind.__dataclass_fields__[name].default) for name, rule in described(kind).items()}
    return st.fixed_dictionaries({}, optional=fields)


POLICY = st.sampled_from(POLICIES).flatmap(lambda kind: st.tuples(st.just(kind), settings_of_kind(kind)))
KV = st.sampled_from(KV_POLICIES).flatmap(lambda kind: st.tuples(st.just(kind), settings_of_kind(kind)))
BUDGET = settings_of_kind(Compressor)
WORDS = st.sampled_from(["share=0.3", "share", "=", "threshold=nan", "threshold=1e999", "order=9" + "9" * 5000, "a=b", "\0", "warmup_steps=1.5"])


@MANY
@given(kind=st.sampled_from([*(kind.name for kind in POLICIES), "nobody", ""]), text=st.lists(WORDS | st.text(max_size=9), max_size=3).map(" ".join))
def test_a_policy_by_name_is_made_or_refused(kind: str, text: str) -> None:
    answered(lambda: policy_named(kind, text))
    answered(lambda: kv_named(kind, text))


@MANY
@given(policy=POLICY, kv=KV, budget=BUDGET)
def test_settings_are_taken_or_refused(policy: Any, kv: Any, budget: dict[str, Any]) -> None:
    answered(lambda: policy[0](**policy[1]))
    score = answered(lambda: kv[0](**kv[1]))
    if score is not None:
        answered(lambda: Compressor(score, **budget))


# whole runs

JOB = st.fixed_dictionaries(
    {"frames": st.sampled_from([1, 5, 9, 13, 17, 21]) | st.integers(-1, 25), "steps": st.integers(-1, 7), "ar_step": st.integers(-1, 7)},
    optional={
        "cfg": st.sampled_from([0.0, 1.0, 3.0]), "shift": st.sampled_from([1.0, 8.0]), "size": st.sampled_from([0, 16, 20, 32, -16]),
        "solver": st.sampled_from(["unipc", "euler", "nobody"]), "fps": st.sampled_from([16, 24, 25]), "addnoise": st.sampled_from([-1, 0, 20, 1000]),
        "denoise": st.sampled_from([1.0, 0.5, 0.0]), "overlap": st.integers(-1, 12),
    },
)  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    with torch.no_grad():
        yield


def make(bundle: Bundle, job: Job, policy: Any, compressor: Any, bidirectional: bool, prefix: int, suffix: int) -> tuple[Given, Tensor, RunReport]:
    def frames(count: int) -> Tensor | None:
        return torch.randn(1, 16, count, job.size // 8, job.size // 8) if count and job.size > 0 else None

    given = Given(frames(prefix), frames(suffix))
    if bidirectional:
        return given, *generate_upstream(bundle, job, given=given, policy=policy)
    return given, *generate(bundle, job, policy, given=given, compressor=compressor)


@RUNS
@given(
    job=JOB,
    policy=st.none() | POLICY,
    kv=st.none() | st.tuples(KV, BUDGET),
    bidirectional=st.booleans(),
    prefix=st.integers(0, 3),
    suffix=st.integers(0, 2),
)
def test_every_run_keeps_its_promises_or_is_refused(
    bundle: Bundle, job: dict[str, Any], policy: Any, kv: Any, bidirectional: bool, prefix: int, suffix: int
) -> None:
    asked, film = answered(lambda: policy and policy[0](**policy[1])), Job("red circle moves right", **{"size": 16, **job})
    score = answered(lambda: kv and kv[0][0](**kv[0][1]))
    compressor = answered(lambda: Compressor(score, **kv[1])) if score else None
    with quiet():
        made = answered(lambda: make(bundle, film, asked, compressor, bidirectional, prefix, suffix))
    if made is None:
        return
    given, latents, report = made
    assert torch.isfinite(latents).all()
    if given.start is not None:
        assert torch.equal(latents[:, :, :prefix], given.start)
    if given.end is not None:
        assert torch.equal(latents[:, :, -suffix:], given.end)
    done = (report.map != NOT_RUN).sum(1)
    assert set(done.tolist()) <= {0, film.steps}, "every chunk makes each of its steps once"
    assert int((done > 0).sum()) >= 1
    assert 0 < report.share <= 1
    if asked is None:
        assert ((report.map == COMPUTED) == (report.map != NOT_RUN)).all()
    if compressor is not None and report.history.frames and report.expected:
        assert report.kv_peak_bytes <= report.expected.kv
    report.text()
    assert decode(bundle, latents[:, :, :1]).isfinite().all()
