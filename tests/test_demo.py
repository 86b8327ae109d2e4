"""The bundled model: it loads, it is small, and it makes films."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flowcache_core.models.bundle import BUNDLED, NETWORK, VAE, Bundle, files_of, load_bundle
from flowcache_core.policies import Chunkwise, Planned
from flowcache_core.run.generate import Given, Job, decode, generate, generate_upstream
from flowcache_core.run.report import RunReport
from flowcache_core.run.run import Run
from flowcache_core.run.turn import Turn
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule, Section, sections_of
from flowcache_core.show.metrics import psnr

pytestmark = pytest.mark.skipif(not (NETWORK.exists() and VAE.exists()), reason="the bundled weights are not in flowcache_core/models/weights")

JOB = Job("red circle moves right", frames=9, steps=4, seed=3, size=64)
Film = Callable[..., tuple[Tensor, RunReport]]


@pytest.fixture(scope="module")
def film(bundle: Bundle) -> Film:
    """JOB with changes -> latents, report; two chunks when `frames` is 21."""

    def make(policy: Chunkwise | None = None, **changes: object) -> tuple[Tensor, RunReport]:
        return generate(bundle, replace(JOB, **changes), policy)  # type: ignore[arg-type]

    return make


def test_the_weights_are_small_enough_to_ship() -> None:
    assert all(files_of(family)[0].stat().st_size <= 16_000_000 for family in BUNDLED.values())
    assert VAE.stat().st_size <= 5_000_000


def test_the_bundle_knows_its_chunks(bundle: Bundle) -> None:
    assert (bundle.layout.chunk_frames, bundle.layout.window) == (3, 5)
    assert bundle.text("red circle").shape == (1, 32, bundle.network.config.text_dim)


def test_the_same_seed_makes_the_same_film_and_another_seed_another(bundle: Bundle, film: Film) -> None:
    a, b, c = film()[0], film()[0], film(seed=4)[0]
    assert a.shape == (1, 16, 3, 8, 8)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    pixels = decode(bundle, a)
    assert pixels.shape == (9, 3, 64, 64)
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_default_chunkwise_computes_less_than_uncached(film: Film) -> None:
    plain, whole = film(frames=21, steps=24)
    cached, report = film(Chunkwise(), frames=21, steps=24)
    assert whole.chunk_steps_computed == whole.chunk_steps == report.chunk_steps == 48
    assert report.chunk_steps_computed < 48
    assert report.share < 1
    assert not torch.equal(plain, cached)
    assert torch.isfinite(cached).all()


def test_default_chunkwise_measures_drift_in_every_dtype() -> None:
    """A latent that is changed in place behind the measurement would look as if it stood still."""
    for dtype in (torch.float32, torch.bfloat16):
        _, report = generate(load_bundle(dtype), replace(JOB, steps=12), Chunkwise(warmup_steps=2, threshold=10))
        assert (report.drift[0, 2:8] > 0).all(), dtype


def test_threshold_zero_is_exact(film: Film) -> None:
    assert torch.equal(film(frames=21)[0], film(Chunkwise(threshold=0), frames=21)[0])


def test_guidance_one_needs_half_the_cache_and_gives_another_film(film: Film) -> None:
    (alone, less), (guided, more) = film(cfg=1.0), film(cfg=3.0)
    assert less.kv_peak_bytes * 2 == more.kv_peak_bytes
    assert torch.isfinite(alone).all()
    assert not torch.equal(alone, guided)


def test_the_empty_prompt_is_a_film_and_guidance_against_itself_changes_nothing(film: Film) -> None:
    (a, _), (b, _) = film(prompt="", cfg=1.0), film(prompt="", cfg=6.0)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_all_chunks_together_run_one_row_per_step(bundle: Bundle, film: Film) -> None:
    latents, report = film(frames=21, ar_step=0)
    assert len(replace(JOB, frames=21, ar_step=0).schedule(bundle).rows) == JOB.steps
    assert torch.isfinite(latents).all()
    assert report.chunk_steps == 2 * JOB.steps


def test_the_upstream_way_runs_idle_chunks_too(bundle: Bundle) -> None:
    latents, report = generate_upstream(bundle, replace(JOB, frames=21, ar_step=2))
    assert latents.shape == (1, 16, 6, 8, 8)
    assert report.chunk_steps_computed == 2 * (JOB.steps + 2)
    assert report.kv_peak_bytes == 0


@pytest.mark.parametrize(
    ("film", "longest"), [(ChunkSchedule(8, 3, 4, 2), 3), (ChunkSchedule(9, 3, 4, 2, prefix=1, suffix=1), 3), (sections_of(20, 3, 4, 2, 9, 2), 9)]
)
def test_a_run_knows_its_length_before_it_begins(bundle: Bundle, film: ChunkSchedule | tuple[Section, ...], longest: int) -> None:
    run = Run(bundle.family, bundle.adapter(), film, flow_sigmas(4), (16, 4, 4))
    shown: list[Tensor] = []
    x = torch.randn(1, 16, film.frames if isinstance(film, ChunkSchedule) else film[-1].end, 4, 4)
    made: set[int] = set()
    text = bundle.text("red circle")
    watch = SimpleNamespace(begin=lambda report, said: None, step=lambda report, chunk, clean, whole: (shown.append(clean), made.add(chunk.index)))

    def evaluate(turn: Turn, part: Tensor) -> Tensor:
        assert part.shape[2] <= run.longest == longest
        return turn.denoise(part, text, ("prompt",))

    _, report = run.sample(x, evaluate, watch)
    assert run.steps == len(shown)
    assert run.chunks == max(made) + 1 == len(report.map)


@pytest.mark.parametrize("film", [ChunkSchedule(8, 3, 4, 2), sections_of(20, 3, 4, 2, 9, 2)])
def test_an_observer_is_shown_what_follows_from_a_timing(bundle: Bundle, film: ChunkSchedule | tuple[Section, ...]) -> None:
    run = Run(bundle.family, bundle.adapter(), film, flow_sigmas(4), (16, 4, 4), policy=Planned(seconds=1e5))
    shown: list[tuple[str, ...]] = []
    watch = SimpleNamespace(begin=lambda report, notes: shown.append(tuple(notes)), step=lambda report, chunk, clean, whole: None)
    x = torch.randn(1, 16, film.frames if isinstance(film, ChunkSchedule) else film[-1].end, 4, 4)
    _, report = run.sample(x, lambda turn, part: turn.denoise(part, bundle.text("red circle"), ("prompt",)), watch)
    before, after = shown
    assert before[0].startswith("the network may take 100000 s: one evaluation will be timed")
    assert after[0].startswith("all ")
    assert report.notes == (*after, *before[1:])


def test_one_chunk_is_the_same_upstream_and_here(bundle: Bundle, film: Film) -> None:
    """Where there is no other chunk to look at, the two ways are one."""
    ours, theirs = film()[0], generate_upstream(bundle, JOB)[0]
    assert psnr(decode(bundle, ours), decode(bundle, theirs)) > 45


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_both_solvers_make_a_film_in_one_step(film: Film, solver: str) -> None:
    assert torch.isfinite(film(solver=solver, steps=1)[0]).all()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"frames": 20}, "20 frames are not 4n + 1: use 17 or 21"),
        ({"frames": 0}, "0 frames are not 4n + 1: use 1 or 5"),
        ({"fps": 25}, "25 frames per second were asked for: the network has learnt 16 and 24"),
        ({"denoise": 0.5}, "denoise 0.5 starts from a given film, and none was given"),
        ({"addnoise": 1000}, "addnoise_condition 1000 lies outside 0..999"),
        ({"size": 100}, "a picture of 100 pixels does not fit: use a multiple of 16, such as 96"),
        ({"size": 0}, "a picture of 0 pixels does not fit: use a multiple of 16, such as 16"),
        ({"steps": 0}, "0 steps were asked for"),
        ({"solver": "heun"}, "no solver is called 'heun'"),
        ({"ar_step": -1}, "ar_step -1 is negative"),
    ],
)
def test_a_film_that_cannot_be_made_is_refused(film: Film, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        film(**changes)


@pytest.mark.parametrize("frames", [1, 5, 13, 33])
def test_every_length_of_four_n_plus_one_makes_a_film(film: Film, frames: int) -> None:
    latents, _ = film(frames=frames, steps=2, size=32)
    assert latents.shape[2] == (frames - 1) // 4 + 1
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("make", [generate, generate_upstream])
def test_given_frames_come_out_as_they_went_in(bundle: Bundle, make: Callable[..., tuple[Tensor, RunReport]]) -> None:
    source = torch.randn(1, 16, 3, 4, 4)
    given = Given(start=source[:, :, :1], end=source[:, :, 2:])
    latents, _ = make(bundle, replace(JOB, frames=33, steps=2, size=32), given=given)
    assert torch.equal(latents[:, :, :1], source[:, :, :1])
    assert torch.equal(latents[:, :, -1:], source[:, :, 2:])


def test_less_denoising_stays_nearer_to_the_given_film(bundle: Bundle) -> None:
    source = torch.randn(1, 16, 3, 4, 4)
    job = replace(JOB, steps=3, size=32)
    near, far = (generate(bundle, replace(job, denoise=d), given=Given(film=source))[0] for d in (0.05, 0.9))
    assert (near - source).abs().mean() < (far - source).abs().mean() / 2


def test_given_latents_of_another_size_are_refused(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match=re.escape("the given first frames have latents of shape (1, 16, 1, 6, 6), but (1, 16, 1, 4, 4) are needed")):
        generate(bundle, replace(JOB, size=32), given=Given(start=torch.zeros(1, 16, 1, 6, 6)))
