"""`bench magi`: equal compute with branches counted, every arm, and the demo of the second bundled model; on random weights."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

from flowcache_core.bench import frontier, magi
from flowcache_core.bench.around import Around
from flowcache_core.bench.frontier import Film, affordable, fewer, rows, share_of, steps_for, tokens
from flowcache_core.bench.magi import ALONE, AT_SHARES, SHARES, films, measure, run_arm, stock
from flowcache_core.models.bundle import BUNDLED, Bundle
from flowcache_core.models.family import Bundled
from flowcache_core.models.magi_family import MAGI
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.planned import Planned
from flowcache_core.run.generate import Job, generate
from tests.tiny_magi import tiny_magi
from tests.toy_family import no_vae, words

SMALL = replace(stock(48, 16, 3.0), size=32)
FILM = Film(SMALL, "red circle moves left", 3, tuple(AT_SHARES), (0.5,))


class Pixels(nn.Module):
    """The first three channels, four times as high and wide."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(tiny_magi().rope.bands[:1].clone(), requires_grad=False)

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].repeat_interleave(4, 3).repeat_interleave(4, 4)


@pytest.fixture(scope="module")
def tiny() -> Bundle:
    return Bundle(replace(MAGI, bundled=Bundled("tiny", "tiny", no_vae, words)), tiny_magi(), Pixels(), MAGI.layout)


class Counting(Around):
    """Counts the latent frames that pass through the network, those of every branch."""

    def __init__(self, inner: Any, counted: list[float]) -> None:
        super().__init__(inner)
        self.counted = counted

    def forward(self, call: Any, attend: Any) -> Any:
        self.counted.append(len(call.x) * call.x.shape[2])
        return self.inner.forward(call, attend)

    def refresh(self, call: Any, some: Tensor, attend: Any) -> Any:
        self.counted.append(len(call.x) * len(some) / self.inner.tokens_per_frame(*call.x.shape[3:]))
        return self.inner.refresh(call, some, attend)


@pytest.mark.parametrize("policy", [None, Planned(share=0.6), Multirate(share=0.6)], ids=["uncached", "plan", "in part"])
def test_tokens_are_counted_as_often_as_there_are_branches_of_them(tiny: Bundle, policy: Any) -> None:
    job, counted = FILM.job, list[float]()
    _, uncached = generate(tiny, job)
    _, report = generate(tiny, job, policy, adapter=lambda adapter, sigmas: Counting(adapter, counted))  # type: ignore[arg-type,return-value]
    plan = report.plans[0] if report.plans else None
    assert 3 * tokens(tiny, job, SMALL, plan) == pytest.approx(sum(counted))
    assert share_of(tiny, job, report, uncached) == pytest.approx(tokens(tiny, job, SMALL, plan) / tokens(tiny, job, SMALL))


@pytest.mark.parametrize("share", SHARES)
def test_fewer_steps_are_such_as_the_model_takes_and_plans_cost_no_more(tiny: Bundle, share: float) -> None:
    setting = stock(72, 32, 3.0)
    job = setting.job("", 0)
    n = steps_for(tiny, job, setting, share)
    most = tokens(tiny, fewer(job, n), setting)
    assert n % 4 == 0
    assert most >= share * tokens(tiny, job, setting)
    for rule in (Planned, Multirate):
        plan = affordable(tiny, job, setting, n, rule).plan(job.schedule(tiny))
        assert 0.9 * most < tokens(tiny, job, setting, plan) <= most + 1e-6


@pytest.mark.parametrize("arm", [*AT_SHARES, *ALONE])
def test_every_arm_makes_a_film(tiny: Bundle, arm: str) -> None:
    film = replace(FILM, setting=replace(SMALL, frames=96)) if arm in ALONE else FILM
    _, uncached = frontier.make(tiny, film.job, film.setting)
    latents, report = run_arm(tiny, film, arm, 0.5)
    assert latents.isfinite().all()
    share = share_of(tiny, film.job, report, uncached)
    if arm in AT_SHARES and arm != "published-increment":
        assert 0.4 < share <= share_of(tiny, film.job, run_arm(tiny, film, "steps", 0.5)[1], uncached) + 1e-6
    elif arm in ("no-ranges", "kv-5", "kv-6"):
        assert share == 1
    else:
        assert share < 1
    if arm in ("kv-5", "kv-6"):
        assert max(report.history.tokens) == (int(arm[-1]) - 4) * 6 * 4  # chunks of six frames of four tokens


def test_a_film_is_measured_in_every_arm(tiny: Bundle) -> None:
    two = [replace(FILM, prompt=prompt, arms=("steps", "default"), setting=replace(SMALL, steps=8, ar_step=2)) for prompt in ("a", "b")]
    found = rows([entry for film in two for entry in measure(tiny, film)])
    assert [(row["arm"], row["share"], row["prompts"]) for row in found] == [("uncached", 1.0, 2), ("steps", 0.5, 2), ("default", 0.5, 2)]
    assert all(math.isfinite(row["psnr_converged"]) for row in found)
    assert found[0]["psnr"] == 100


def arguments(*texts: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    magi.add_arguments(parser)
    return parser.parse_args(texts)


def test_arms_without_a_share_are_run_on_a_few_longer_films() -> None:
    made = films(arguments("--prompts", "5"))
    assert [film.setting.frames for film in made] == [magi.FRAMES] * 5 + [magi.LONG] * magi.LONG_FILMS
    assert [film.arms for film in made] == [tuple(AT_SHARES)] * magi.CONTROLS + [magi.MAIN] * (5 - magi.CONTROLS) + [tuple(ALONE)] * magi.LONG_FILMS
    assert {film.arms for film in films(arguments("--arms", "steps,default"))} == {("steps", "default")}
    with pytest.raises(ValueError, match="no arm is called teacache: there are steps, steps-euler"):
        films(arguments("--arms", "teacache"))


def test_a_job_has_the_usual_settings_of_its_family() -> None:
    for family in BUNDLED.values():
        job = Job.usual(family, "a toy", seed=2)
        assert (job.frames, job.steps, job.cfg, job.shift) == (family.usual.frames, family.usual.steps, family.usual.cfg, family.noise.shift)
        assert (job.solver, job.addnoise) == (family.published.solver, family.published.given_noise)
        fewer_steps = Job.usual(family, "a toy", steps=8)
        assert fewer_steps.ar_step == family.published.stagger(8)
    assert Job.usual(BUNDLED["tiny-skyreels"], "a toy") == Job("a toy")
