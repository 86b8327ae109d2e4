"""Given frames: they come out as they went in, the network sees them at their own level, and masks are read or refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowcache_core.models.attention import bidirectional
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.policies import Chunkwise
from flowcache_core.run.report import RunReport
from flowcache_core.run.sections import SectionSession
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.given import CLEAN, GivenNoise, given_frames
from flowcache_core.sampling.loop import sample_chunks, sample_sections
from flowcache_core.sampling.noise import flow_sigmas, timestep
from flowcache_core.sampling.schedule import ChunkSchedule, Row, sections_of
from flowcache_core.sampling.solvers import Euler, UniPC
from tests.driven import Driven, DrivenSections, sample_section

Noise = Callable[..., Tensor]
Cached = Callable[..., tuple[Tensor, RunReport]]
ENDS = [(1, 0), (3, 0), (4, 0), (7, 0), (0, 1), (1, 1), (2, 3), (0, 8)]
LENGTHS = (33, 97, 101, 177, 260, 737)


@pytest.fixture
def by_section(net: SkyReelsV2, texts: Tensor) -> Callable[..., tuple[Tensor, RunReport]]:
    """A film as bidirectional sections -> latents, report."""

    def run(noise: Tensor, steps: int = 3, ar_step: int = 1, chunk: int = 3, length: int = 9, overlap: int = 2, prefix: int = 0, suffix: int = 0,
            given: GivenNoise = CLEAN) -> tuple[Tensor, RunReport]:  # fmt: skip
        sections = sections_of(noise.shape[2], chunk, steps, ar_step, length, overlap, prefix, suffix)
        with SectionSession(SkyReelsAdapter(net), sections, (noise.shape[3], noise.shape[4])) as session:

            def predict(x: Tensor, sigmas: tuple[float, ...], row: Row) -> Tensor:
                return session.denoise(x, sigmas, texts[:1], ("cond",))

            film = sample_sections(DrivenSections(predict, session), noise, sections, flow_sigmas(steps), UniPC(), given)
        return film, session.report

    return run


@pytest.mark.parametrize("policy", [None, Chunkwise(threshold=10, warmup_steps=1)])
@pytest.mark.parametrize(("prefix", "suffix"), ENDS)
def test_given_frames_come_out_as_they_went_in(cached: Cached, noise_of: Noise, prefix: int, suffix: int, policy: Chunkwise | None) -> None:
    noise = noise_of(9)
    film, _ = cached(noise, ChunkSchedule(9, 3, 4, 2, prefix=prefix, suffix=suffix), UniPC(), policy)
    end = 9 - suffix
    assert torch.equal(film[:, :, :prefix], noise[:, :, :prefix])
    assert torch.equal(film[:, :, end:], noise[:, :, end:])
    changed = (film != noise).flatten(3).any(3).all((0, 1))
    assert changed.tolist() == [False] * prefix + [True] * (end - prefix) + [False] * suffix


@pytest.mark.parametrize(("prefix", "suffix"), [*ENDS, (11, 1)])
def test_given_frames_come_out_of_sections_as_they_went_in(
    by_section: Callable[..., tuple[Tensor, RunReport]], noise_of: Noise, prefix: int, suffix: int
) -> None:
    noise = noise_of(14, side=2)
    film, _ = by_section(noise, length=13, prefix=prefix, suffix=suffix, given=GivenNoise(50, 3), overlap=3)
    end = 14 - suffix
    assert torch.equal(film[:, :, :prefix], noise[:, :, :prefix])
    assert torch.equal(film[:, :, end:], noise[:, :, end:])
    assert torch.isfinite(film).all()
    assert not torch.equal(film[:, :, prefix:end], noise[:, :, prefix:end])


@pytest.mark.parametrize(("prefix", "suffix"), [(1, 0), (0, 1), (4, 2)])
def test_given_frames_matter(cached: Cached, noise_of: Noise, prefix: int, suffix: int) -> None:
    noise, schedule = noise_of(9), ChunkSchedule(9, 3, 4, 2, prefix=prefix, suffix=suffix)
    other = noise.clone()
    other[:, :, :prefix] *= -1
    other[:, :, 9 - suffix :] *= -1
    moved = slice(9 - suffix - 1, 9 - suffix)
    assert not torch.allclose(cached(noise, schedule)[0][:, :, moved], cached(other, schedule)[0][:, :, moved])


@pytest.mark.parametrize("prefix", [1, 3, 4])
def test_the_cache_after_a_prefix_equals_dense_attention_over_the_film(net: SkyReelsV2, texts: Tensor, cached: Cached, noise_of: Noise, prefix: int,
                                                                      dense: Callable[..., Tensor]) -> None:  # fmt: skip
    schedule, noise = ChunkSchedule(9, 3, 4, 2, prefix=prefix), noise_of(9)
    torch.testing.assert_close(cached(noise, schedule)[0], dense(noise, schedule), rtol=1e-4, atol=1e-4)


def test_the_cache_before_an_end_frame_equals_dense_attention_over_the_film(cached: Cached, dense: Callable[..., Tensor], noise_of: Noise) -> None:
    schedule, noise = ChunkSchedule(8, 3, 4, 2, prefix=1, suffix=1), noise_of(8)
    torch.testing.assert_close(cached(noise, schedule)[0], dense(noise, schedule), rtol=1e-4, atol=1e-4)


def test_an_end_frame_stands_at_its_own_timestep(net: SkyReelsV2, texts: Tensor, noise_of: Noise) -> None:
    """A chunk with a held frame equals the network at one timestep per frame."""
    schedule, sigmas, x = ChunkSchedule(3, 3, 4, suffix=1), flow_sigmas(4), noise_of(3)
    t = timestep(sigmas[1])
    with Session(SkyReelsAdapter(net), schedule, sigmas, (4, 4)) as session:
        ours = session.denoise(x, schedule.at(0, 1), texts[:1], ("cond",))
    theirs = net(x, torch.tensor([[t, t, 0]]), net.text_kv(texts[:1]), bidirectional)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("prefix_sigma", "commit_sigma", "level"), [(0.02, 0.0, 20), (0.02, 0.1, 20), (0.0, 0.1, 100), (0.0, 0.0, 0)])
def test_a_prefix_stands_at_its_light_noise_level_or_as_clean_as_finished_chunks(
    net: SkyReelsV2, texts: Tensor, noise_of: Noise, prefix_sigma: float, commit_sigma: float, level: int
) -> None:
    schedule, x = ChunkSchedule(6, 3, 4, prefix=3), noise_of(3)
    with Session(SkyReelsAdapter(net), schedule, flow_sigmas(4), (4, 4), prefix_sigma=prefix_sigma, commit_sigma=commit_sigma) as session:
        ours = session.denoise(x, schedule.at(0, 4), texts[:1], ("cond",))
    torch.testing.assert_close(ours, net(x, torch.tensor([[level]]), net.text_kv(texts[:1]), bidirectional), rtol=1e-5, atol=1e-5)


def test_the_prefix_is_shown_at_its_light_noise_level_in_every_row(noise_of: Noise) -> None:
    schedule, noise, seen = ChunkSchedule(9, 3, 4, 2, prefix=4, suffix=1), noise_of(9), []

    def predict(x: Tensor, sigmas: tuple[float, ...], row: Row) -> Tensor:
        assert sigmas[:4] == (0.02,) * 4
        assert sigmas[-1] == 0
        assert torch.equal(x[:, :, -1], noise[:, :, -1])
        seen.append(x[:, :, :4])
        return torch.zeros_like(x)

    sample_section(predict, noise, schedule, flow_sigmas(4), Euler(), given=GivenNoise(20, 1))
    assert not torch.equal(seen[0], seen[1]), "fresh noise in every row"
    for x in seen:
        residue = x - 0.98 * noise[:, :, :4]
        assert 0.015 < float(residue.std()) < 0.025


def test_the_cached_way_shows_the_prefix_once_and_lightly_noised(net: SkyReelsV2, noise_of: Noise) -> None:
    schedule, noise, seen = ChunkSchedule(9, 3, 4, 2, prefix=4), noise_of(9), []

    def predict(x: Tensor, chunk: Chunk) -> Tensor:
        if chunk.index < schedule.given:
            seen.append(x)
        return torch.zeros_like(x)

    sample_chunks(Driven(predict, schedule=schedule), noise, schedule, flow_sigmas(4), Euler(), GivenNoise(20, 1))
    residue = torch.cat(seen, 2) - 0.98 * noise[:, :, :4]
    assert len(seen) == schedule.given == 2
    assert 0.015 < float(residue.std()) < 0.025


def test_the_forecast_counts_what_is_generated_and_not_what_is_given(net: SkyReelsV2, texts: Tensor, noise_of: Noise) -> None:
    schedule, sigmas, noise = ChunkSchedule(9, 3, 12, 2, prefix=4), flow_sigmas(12), noise_of(9)
    with Session(SkyReelsAdapter(net), schedule, sigmas, (4, 4), policy=Chunkwise(warmup_steps=2)) as session:
        said, *_ = session.forecast(noise.device)
        sample_chunks(Driven(lambda x, chunk: session.denoise(x, chunk, texts[:1], ("cond",)), session), noise, schedule, sigmas, Euler())
    assert session.report.chunk_steps == schedule.chunk_steps == 24
    assert said == f"{session.report.chunk_steps_computed} of 24 chunk-steps will be computed"


def test_the_light_noise_is_repeatable_and_none_leaves_the_frames_alone(noise_of: Noise) -> None:
    x, light = noise_of(3), GivenNoise(20, 7)
    assert torch.equal(light.show(x, light.start()), light.show(x, light.start()))
    assert torch.isfinite(light.show(x, GivenNoise(20, 2**64 - 1).start())).all(), "the largest seed of the host"
    assert GivenNoise().show(x, GivenNoise().start()) is x
    assert all(timestep(GivenNoise(level).sigma) == level for level in range(1000))
    with pytest.raises(ValueError, match=r"addnoise_condition 1000 lies outside 0\.\.999: 20 is the published value"):
        GivenNoise(1000)


@pytest.mark.parametrize("frames", LENGTHS)
def test_films_of_any_length_run_in_sections(by_section: Callable[..., tuple[Tensor, RunReport]], noise_of: Noise, frames: int) -> None:
    latents = (frames - 1) // 4 + 1
    film, report = by_section(noise_of(latents, side=2), steps=2, ar_step=1, chunk=5, length=25, overlap=5, given=GivenNoise(20))
    assert film.shape[2] == latents
    assert torch.isfinite(film).all()
    assert (report.map == 2).sum() == report.map.size, "every chunk made its steps"


@pytest.mark.parametrize("frames", LENGTHS)
def test_films_of_any_length_run_block_causal(cached: Cached, noise_of: Noise, frames: int) -> None:
    latents = (frames - 1) // 4 + 1
    film, report = cached(noise_of(latents, side=2), ChunkSchedule(latents, 5, 2, 1, window=5), UniPC())
    assert film.shape[2] == latents
    assert torch.isfinite(film).all()
    assert report.chunk_steps == 2 * -(-latents // 5)


def test_a_later_section_never_changes_an_earlier_one(by_section: Callable[..., tuple[Tensor, RunReport]], noise_of: Noise) -> None:
    noise = noise_of(14, side=2)
    film, _ = by_section(noise)
    noise[:, :, 9:] *= -1
    other, _ = by_section(noise)
    assert torch.equal(film[:, :, :9], other[:, :, :9])
    assert not torch.allclose(film[:, :, 9:], other[:, :, 9:])


def test_one_section_is_the_section_alone(
    by_section: Callable[..., tuple[Tensor, RunReport]], net: SkyReelsV2, texts: Tensor, noise_of: Noise
) -> None:
    noise, text = noise_of(9), net.text_kv(texts[:1])

    def predict(x: Tensor, sigmas: tuple[float, ...], row: Row) -> Tensor:
        return net(x, torch.tensor([[timestep(s) for s in sigmas]]), text, bidirectional)

    alone = sample_section(predict, noise, ChunkSchedule(9, 3, 3, 1), flow_sigmas(3), UniPC())
    assert torch.equal(by_section(noise)[0], alone)


def test_chunks_that_have_not_begun_stand_at_the_first_level_of_a_shortened_schedule(noise_of: Noise) -> None:
    levels, timesteps = flow_sigmas(4, 8.0, 0.4), []

    def predict(x: Tensor, sigmas: tuple[float, ...], row: Row) -> Tensor:
        timesteps.append(sigmas[::3])
        return torch.zeros_like(x)

    sample_section(predict, noise_of(6), ChunkSchedule(6, 3, 4, 2), levels, Euler())
    assert levels[0] < 0.95
    first, second = (list(column) for column in zip(*timesteps, strict=True))
    assert first == [*levels, 0.0]
    assert second == [levels[0], levels[0], *levels[:4]]


def test_sections_do_not_go_through_the_network_s_own_forward(
    net: SkyReelsV2, texts: Tensor, noise_of: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ComfyUI that method has the host's calling convention."""
    adapter, x, sigmas = SkyReelsAdapter(net), noise_of(3), (0.5, 0.4, 0.0)
    plain = net(x, torch.tensor([[500, 400, 0]]), net.text_kv(texts[:1]), bidirectional)
    monkeypatch.setattr(SkyReelsV2, "forward", None)
    torch.testing.assert_close(adapter.whole(x, sigmas, adapter.text(texts[:1]), 24), plain)


def test_a_film_that_sets_out_from_a_level_goes_on_as_the_whole_run_does(noise_of: Noise) -> None:
    """Video to video: the tail of a schedule, from where the whole run stood, ends in the same film (one step remembers nothing)."""
    levels, standing, noise = flow_sigmas(6), {}, noise_of(3)

    def keep(chunk: Chunk, clean: Tensor, film: Tensor) -> None:
        standing[chunk.step] = film.clone()

    schedule = ChunkSchedule(3, 3, 6, 2)
    velocity = noise_of(3, seed=9)
    whole = sample_chunks(Driven(lambda x, chunk: velocity * x, see=keep, schedule=schedule), noise, schedule, levels, Euler())
    tail = sample_chunks(
        Driven(lambda x, chunk: velocity * x, schedule=ChunkSchedule(3, 3, 3, 2)), standing[2], ChunkSchedule(3, 3, 3, 2), levels[3:], Euler()
    )
    assert torch.equal(tail, whole)


@pytest.mark.parametrize("ar_step", [0, 2, 5])
def test_a_little_denoising_leaves_the_given_film_nearly_alone(cached: Cached, noise_of: Noise, ar_step: int) -> None:
    source, noise = noise_of(9, seed=2), noise_of(9)
    error = []
    for denoise in (0.02, 0.3, 0.9):
        levels = flow_sigmas(4, 8.0, denoise)
        start = levels[0] * noise + (1 - levels[0]) * source
        film, _ = cached(start, ChunkSchedule(9, 3, 4, ar_step), UniPC(), sigmas=levels)
        error.append(float((film - source).square().mean()))
    assert error[0] < 0.1 < error[1] < error[2]


def mask(*levels: float) -> Tensor:
    return torch.tensor(levels).view(1, 1, -1, 1, 1).expand(1, 16, -1, 4, 4).clone()


@pytest.mark.parametrize(
    ("levels", "ends"), [((1, 1, 1), (0, 0)), ((0, 1, 1), (1, 0)), ((0, 0, 1), (2, 0)), ((1, 1, 0), (0, 1)), ((0, 1, 0), (1, 1)), ((1,), (0, 0))]
)
def test_a_mask_of_whole_frames_at_the_ends_is_read(levels: tuple[float, ...], ends: tuple[int, int]) -> None:
    assert given_frames(mask(*levels)) == ends


@pytest.mark.parametrize(
    ("levels", "sentence"),
    [
        ((0, 0), "the noise mask keeps all 2 latent frames: at least one must be left to generate"),
        ((1, 0, 1), "the noise mask keeps latent frame 1, between frames to generate: only first and last frames of a film can be kept"),
        ((0, 1, 0, 1), "keeps latent frame 2, between frames to generate"),
        ((0, 0.5, 1), "keeps a part of latent frame 1: whole frames are kept or generated"),
        ((0.25, 1, 1), "a latent that was cut after frames were given to it has the old mask, stretched: put Set Latent Noise Mask behind the cut"),
    ],
)
def test_other_masks_are_refused_with_the_frame(levels: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        given_frames(mask(*levels))


def test_a_mask_within_a_frame_is_refused() -> None:
    torn = mask(0, 1, 1)
    torn[..., 0, 0] = 1
    with pytest.raises(ValueError, match=r"keeps a part of latent frame 0.*all over a frame$"):
        given_frames(torn)
