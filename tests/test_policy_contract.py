"""What every cache policy promises: each one in POLICIES is held to it by whole runs of the bundled model, and a new one by its name there."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import FrozenInstanceError, fields, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import flowcache_core.run.run as running
from flowcache_core.demo.run import ARMS, policy_of, run_arm
from flowcache_core.models.bundle import Bundle
from flowcache_core.policies import POLICIES
from flowcache_core.policies.named import in_words, policy_named
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.run import run as runs
from flowcache_core.run.generate import Job, generate
from flowcache_core.run.report import NOT_RUN, REUSED
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.settings import described, settings_of

JOB = Job("red circle moves left", frames=17, steps=24, size=32, cfg=1.0)
"""Two chunks, the second of them short; the first becomes history."""
SPANS, TOKENS = (3, 2), 4
"""Latent frames of the chunks, and tokens of a frame."""
CHUNK_STEPS = len(SPANS) * JOB.steps
Run = Callable[..., tuple[Tensor, Session]]

every = pytest.mark.parametrize("kind", POLICIES, ids=lambda kind: kind.name)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def run(bundle: Bundle) -> Run:
    """A film and the session that made it, which is over by then. `steps`: after so many chunk-steps the run is stopped."""

    def make(policy: CachePolicy | None, steps: int = CHUNK_STEPS + 1) -> tuple[Tensor, Session]:
        opened: list[Session] = []
        left = iter(range(steps - 1))

        class Seen(Session):
            def __enter__(self) -> Session:
                opened.append(self)
                return super().__enter__()

        def on_step(chunk: Chunk) -> None:
            if next(left, None) is None:
                raise Stopped

        film = torch.zeros(0)
        with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
            patch.setattr(running, "Session", Seen)
            film, _ = generate(bundle, JOB, policy, on_step)
        (session,) = opened
        return film, session

    return make


@pytest.fixture(scope="module")
def once(run: Run) -> Run:
    """The same, made once for all tests."""
    return cache(run)


@every
def test_its_film_is_a_film_and_comes_again_bit_for_bit(kind: type[CachePolicy], run: Run, once: Run, bundle: Bundle) -> None:
    film, _ = once(kind())
    assert film.shape == JOB.noise(bundle).shape
    assert torch.isfinite(film).all()
    assert torch.equal(run(kind())[0], film)


@every
def test_where_it_never_reuses_it_makes_the_uncached_film_bit_for_bit(
    kind: type[CachePolicy], run: Run, once: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made one chunk after the other, as that is; chunks in one pass round otherwise."""
    policy = kind.uncached()
    assert type(policy) is kind
    film, session = once(policy)
    torch.testing.assert_close(film, once(None)[0], rtol=0, atol=1e-3)
    monkeypatch.setattr(runs, "SMALL", 0)
    assert torch.equal(run(policy)[0], run(None)[0])
    assert session.report.tokens_computed == session.report.tokens
    assert session.report.chunk_steps_computed == session.report.chunk_steps == CHUNK_STEPS


@every
def test_its_defaults_save_something_and_every_chunk_step_is_counted_once(kind: type[CachePolicy], once: Run) -> None:
    report = once(kind())[1].report
    assert report.tokens_computed < report.tokens or kind() == kind.uncached()
    assert report.tokens == once(None)[1].report.tokens
    assert (report.map != NOT_RUN).all()
    assert report.chunk_steps == CHUNK_STEPS
    assert report.chunk_steps_computed + report.chunk_steps_refreshed + int((report.map == REUSED).sum()) == report.chunk_steps
    commits = SPANS[0] * TOKENS
    ran = sum(float(shares.sum()) * frames * TOKENS for shares, frames in zip(report.shares, SPANS, strict=True))
    assert report.tokens_computed == pytest.approx(ran + commits)
    assert report.visits is not None
    assert int(report.visits.sum()) == report.tokens_computed - commits
    assert (report.visits[:, 0, 0] >= 1).all()


@every
@pytest.mark.parametrize("stopped", [False, True], ids=["to its end", "stopped"])
def test_nothing_is_kept_after_its_run(kind: type[CachePolicy], run: Run, once: Run, stopped: bool) -> None:
    policy = kind()
    _, session = run(policy, 12) if stopped else once(policy)
    assert len(session.state) == 0
    assert not session.state.edges
    assert not session.state.memory._things
    assert session._kv.bytes == 0
    assert policy == kind()


@every
def test_it_is_frozen_and_its_settings_describe_and_check_themselves(kind: type[CachePolicy]) -> None:
    policy: Any = kind()
    for field in fields(policy):
        with pytest.raises(FrozenInstanceError):
            setattr(policy, field.name, field.default)
    for name, rule in described(kind).items():
        default = getattr(policy, name)
        assert rule.help.endswith("."), name
        if isinstance(default, bool):
            continue
        assert default in rule.options if rule.options else rule.low <= default <= rule.high, name
        outside = "nonsense" if rule.options else rule.high + 1
        with pytest.raises(ValueError, match=rf"{name} is '?{outside}'?: (use one of|it must lie between)"):
            replace(policy, **{name: outside})


@every
def test_its_name_alone_is_the_policy_as_it_is_and_its_settings_written_out_change_nothing(kind: type[CachePolicy]) -> None:
    assert policy_named(kind.name) == kind()
    assert settings_of(kind).keys() == described(kind).keys(), "every setting can be written"
    assert policy_named(kind.name, ", ".join(f"{name}={default}" for name, default in settings_of(kind).items())) == kind()
    title, *told = in_words(kind())
    assert title == kind.title
    assert [line.partition("=")[0] for line in told] == list(described(kind))


def test_names_and_titles_are_its_own_and_no_arm_of_the_demo_takes_its_name() -> None:
    assert len({kind.name for kind in POLICIES}) == len({kind.title for kind in POLICIES}) == len(POLICIES)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]*", kind.name) for kind in POLICIES)
    assert not {kind.name for kind in POLICIES} & set(ARMS)


@every
def test_it_is_an_arm_of_the_demo(kind: type[CachePolicy], bundle: Bundle) -> None:
    assert policy_of(kind.name) == kind()
    film, report = run_arm(bundle, JOB, kind.name)
    assert torch.isfinite(film).all()
    assert report.chunk_steps == CHUNK_STEPS
