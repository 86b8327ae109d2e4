"""What every family has to keep to, and a family that keeps to it in ways of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowcache_core import models
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.kv.scores.salience import Salience
from flowcache_core.models import FAMILIES
from flowcache_core.models.bundle import NETWORK, Bundle
from flowcache_core.models.checkpoint import load_network_file, recognise
from flowcache_core.models.family import Family
from flowcache_core.models.shards import open_checkpoint
from flowcache_core.policies import POLICIES
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import Motion
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.policies.target import Target
from flowcache_core.run.generate import Job, generate, generate_upstream
from flowcache_core.run.run import Place, Run
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.given import GivenNoise
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Renoise
from tests.toy_family import TOY, ThreeBranches, ToyAdapter, toy_network

JOB = Job("a toy", frames=96, steps=8, seed=5, size=64, cfg=7.5, ar_step=2, shift=3.0)
LATENTS = 24
DECIDING = {Chunkwise: Chunkwise(signature="latent", warmup_steps=2), Target: None, Motion: Motion(base=Chunkwise(signature="latent"))}
"""Where the defaults need a time signature, which this family does not have: other settings, or None for a refusal."""


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle(TOY, toy_network(), nn.Identity(), TOY.layout)


@pytest.mark.parametrize("family", [*FAMILIES, TOY], ids=lambda family: family.name)
def test_a_family_counts_frames_levels_and_branches_consistently(family: Family) -> None:
    for latents in (1, 2, 7):
        assert family.frames.latent(family.frames.pixel(latents)) == latents == family.frames.require(family.frames.pixel(latents))
    below, above = family.frames.nearest(50, family.layout.chunk_frames)
    assert below <= 50 <= above
    assert family.frames.require(below) % family.layout.chunk_frames == 0
    levels = family.noise.levels(9, family.noise.shift)
    assert len(levels) == 10
    assert levels[-1] == 0
    assert list(levels) == sorted(levels, reverse=True)
    assert 0 <= family.noise.commit < levels[-2]
    branches = family.guidance.branches(3.0)
    velocity = torch.randn(2, 3)
    torch.testing.assert_close(family.guidance.combine([velocity] * len(branches), 3.0, 0.7), velocity)


@pytest.mark.parametrize("family", [*FAMILIES, TOY], ids=lambda family: family.name)
def test_a_refused_length_comes_with_two_that_are_made(family: Family) -> None:
    chunk = family.layout.chunk_frames
    for frames in (0, 6, 50, 58, 98):
        with pytest.raises(ValueError, match=r": use \d+ or \d+$") as refused:
            family.require_frames(frames, chunk)
        named = [int(count) for count in str(refused.value).rpartition(": use ")[2].split(" or ")]
        assert [family.frames.pixel(family.require_frames(count, chunk)) for count in named] == named
        assert frames < named[1]


@pytest.mark.parametrize("solver", [None, Renoise()])
def test_the_toy_makes_a_film(bundle: Bundle, solver: Renoise | None) -> None:
    film, report = generate(bundle, JOB, integrator=solver)
    assert film.shape == (1, 16, LATENTS, 8, 8)
    assert torch.isfinite(film).all()
    assert report.chunk_steps == report.chunk_steps_computed == 4 * JOB.steps
    assert report.commits == 3
    assert torch.equal(film, generate(bundle, JOB, integrator=solver)[0])
    assert not torch.equal(film, generate(bundle, replace(JOB, seed=6), integrator=solver)[0])


def test_every_evaluation_runs_three_branches_and_commits_at_the_commit_level(bundle: Bundle) -> None:
    watched: list[ToyAdapter] = []

    def watch(adapter, sigmas):  # type: ignore[no-untyped-def]
        watched.append(adapter)
        return adapter

    generate(bundle, JOB, adapter=watch)
    calls = watched[0].calls
    assert {branches for _, _, branches in calls} == {3}
    assert {timestep for chunk, timestep, _ in calls if chunk.committing} == {1 - TOY.noise.commit}
    levels = JOB.sigmas(bundle)
    assert all(timestep == 1 - levels[chunk.step] for chunk, timestep, _ in calls if not chunk.committing)


def test_text_differs_by_chunk(bundle: Bundle) -> None:
    class Same(ToyAdapter):
        def text_of(self, text, chunk, chunks):  # type: ignore[no-untyped-def]
            return super().text_of(text, replace(chunk, index=0), chunks)

    film, same = (generate(bundle, JOB, adapter=lambda adapter, sigmas, kind=kind: kind(bundle.network))[0] for kind in (ToyAdapter, Same))
    assert not torch.allclose(film[:, :, 6:12], same[:, :, 6:12])


class Deaf(ToyAdapter):
    def text_of(self, text: Tensor, chunk: Chunk, chunks: int) -> Tensor:
        return text.mean(1, keepdim=True)


class Alone(ThreeBranches):
    def combine(self, velocities: Sequence[Tensor], scale: float, sigma: float) -> Tensor:
        return velocities[2]


def sampled(bundle: Bundle, family: Family, x: Tensor) -> Tensor:
    """Chunk after chunk, with the solver that adds noise."""
    schedule = ChunkSchedule(x.shape[2], 6, 6, 6, 4, pixels=family.frames)
    network = family.adapter(bundle.network, None)
    run = Run(family, network, schedule, family.noise.levels(6, 3.0), (16, 8, 8), given=GivenNoise(0, 3), solver=Renoise())
    context = bundle.text("a toy")
    return run.sample(x, lambda turn, part: turn.denoise(part, context, ("prompt",)))[0]


def test_a_chunk_that_sees_itself_alone_depends_on_no_other(bundle: Bundle) -> None:
    """Neither by the network nor by the noise that the solver adds."""
    family, x = replace(TOY, guidance=Alone(), adapter=Deaf), torch.randn(1, 16, 18, 8, 8)
    film = sampled(bundle, family, x)
    assert torch.equal(film[:, :, :6], sampled(bundle, family, x[:, :, :6]))
    other = x.clone()
    other[:, :, :6] += 1
    assert torch.equal(film[:, :, 6:], sampled(bundle, family, other)[:, :, 6:])
    guided = replace(family, guidance=ThreeBranches())
    assert not torch.equal(sampled(bundle, guided, x)[:, :, 6:], sampled(bundle, guided, other)[:, :, 6:])


@pytest.mark.parametrize("kind", POLICIES, ids=lambda kind: kind.name)
def test_every_cache_policy_runs_on_the_toy(bundle: Bundle, kind: type[CachePolicy]) -> None:
    policy = DECIDING[kind] if kind in DECIDING else kind()
    if policy is None:
        with pytest.raises(ValueError, match="signature time follows the time modulation, which toy does not have: set signature to latent"):
            generate(bundle, JOB, kind())
        return
    film, report = generate(bundle, replace(JOB, steps=12), policy)
    assert torch.isfinite(film).all()
    assert report.chunk_steps == 4 * 12
    assert 0 < report.tokens_computed <= report.tokens


@pytest.mark.parametrize("kind", KV_POLICIES, ids=lambda kind: kind.name)
def test_every_kv_policy_runs_on_the_toy(bundle: Bundle, kind: type) -> None:
    if kind is Salience:
        with pytest.raises(ValueError, match="head"):
            generate(bundle, JOB, compressor=Compressor(kind(), budget=1.5))
        return
    film, report = generate(bundle, replace(JOB, frames=192, ar_step=8, steps=4), compressor=Compressor(kind(), budget=1.5))
    assert torch.isfinite(film).all()
    assert max(report.history.tokens) == 1.5 * 6 * 16


def test_seconds_of_a_budget_are_counted_in_the_frames_of_the_family(bundle: Bundle) -> None:
    _, report = generate(bundle, replace(JOB, ar_step=8, steps=2), compressor=Compressor(KV_POLICIES[0](), budget=1.5, unit="seconds"))
    assert max(report.history.tokens) == 1.5 * 24 / 4 * 16


def test_a_plan_computes_less_and_everything_is_everything(bundle: Bundle) -> None:
    whole, _ = generate(bundle, JOB)
    assert torch.equal(whole, generate(bundle, JOB, Planned(share=1.0))[0])
    _, report = generate(bundle, JOB, Planned(share=0.5))
    assert report.share <= 0.5


def test_a_network_that_only_looks_back_is_refused_bidirectional_sections(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="toy looks back only"):
        generate_upstream(bundle, JOB)


def test_more_texts_than_one_are_refused_where_guidance_is_inside(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="Toy is guided inside the run and takes one text, and 2 were given"):
        Run(TOY, bundle.adapter(), JOB.schedule(bundle), JOB.sigmas(bundle), (16, 8, 8), Place(branches=2))


def test_a_film_that_does_not_divide_is_refused_with_the_nearest(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="98 frames are not 4n: use 96 or 100"):
        generate(bundle, replace(JOB, frames=98))


def test_a_file_is_recognised_as_its_family_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "FAMILIES", (*FAMILIES, TOY))
    save_file(toy_network().state_dict(), tmp_path / "toy.safetensors")
    toy, sky = open_checkpoint(tmp_path / "toy.safetensors"), open_checkpoint(NETWORK)
    assert recognise(toy.stored, "toy").family is TOY
    assert recognise(sky.stored, "sky").family is FAMILIES[0]
    network = load_network_file(tmp_path / "toy.safetensors")
    assert all(torch.equal(v, toy_network().state_dict()[k]) for k, v in network.state_dict().items())
    with pytest.raises(ValueError, match=r"toy: .*"):
        recognise(toy.stored, "toy", family="skyreels-v2-df")
    with pytest.raises(ValueError, match=r"toy is said to be of the family 'gone': there are skyreels-v2-df, magi-1, .*, krea-realtime, toy"):
        recognise(toy.stored, "toy", family="gone")


def test_families_of_the_same_shapes_are_told_apart_by_metadata_or_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = replace(TOY, name="twin", title="Twin")
    monkeypatch.setattr(models, "FAMILIES", (*FAMILIES, TOY, twin))
    weights = toy_network().state_dict()
    with pytest.raises(ValueError, match="toy could be Toy or Twin, which have the same shapes: choose one in the input family"):
        recognise(weights, "toy")
    assert recognise(weights, "toy", {"architecture": "twin"}).family is twin
    assert recognise(weights, "toy", {"architecture": "twin"}, "toy").family is TOY


def test_metadata_of_another_tool_say_nothing() -> None:
    stored = open_checkpoint(NETWORK).stored
    assert recognise(stored, "sky", {"architecture": "stable-diffusion-v1"}).family is FAMILIES[0]


def test_branch_texts_are_made_once_a_run(bundle: Bundle) -> None:
    made: list[int] = []

    class Counting(ToyAdapter):
        def branch_texts(self, context: Tensor, branches: Sequence[str]) -> Tensor:
            made.append(len(branches))
            return super().branch_texts(context, branches)

    generate(bundle, JOB, adapter=lambda adapter, sigmas: Counting(bundle.network))  # type: ignore[arg-type,return-value]
    assert made == [3]
