"""What a run refuses before it begins, and what it does not let pass at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import Motion
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.run.run import Run
from flowcache_core.run.session import Session
from flowcache_core.run.turn import Turn
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule, sections_of

FILM = ChunkSchedule(6, 3, 4, 2)


@pytest.fixture
def run(net: SkyReelsV2) -> Run:
    return Run(SKYREELS, SkyReelsAdapter(net), FILM, flow_sigmas(4), (16, 4, 4))


def evaluate(texts: Tensor) -> Callable[[Turn, Tensor], Tensor]:
    return lambda turn, x: turn.denoise(x, texts[:1], ("cond",))


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ((1.0, 1.0, 0.5, 0.2, 0.0), "the noise level stays at 1 or rises, to 1, at step 1 of 4"),
        ((1.0, 0.5, 0.6, 0.2, 0.0), "stays at 0.5 or rises, to 0.6, at step 2 of 4"),
        ((1.0, 0.5, float("nan"), 0.2, 0.0), "rises, to nan, at step 2 of 4"),
        ((1.0, 0.7, 0.5, 0.3, 0.1), r"noise levels from 1\.0 to 0\.1: they have to fall from at most 1 to 0"),
        ((14.6, 0.7, 0.5, 0.3, 0.0), r"noise levels from 14\.6 to 0\.0"),
        ((), "noise levels from None to None"),
    ],
)
def test_noise_levels_that_do_not_fall_are_refused(run: Run, levels: tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(run, sigmas=levels)


def test_latents_of_another_kind_are_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="the latents have 12 channels, and those of SkyReels-V2 diffusion forcing have 16"):
        replace(run, latent=(12, 4, 4))


@pytest.mark.parametrize("size", [(0, 8), (8, 0)])
def test_latents_smaller_than_a_patch_are_refused(size: tuple[int, int], run: Run) -> None:
    with pytest.raises(ValueError, match=f"the latents are {size[0]} x {size[1]} cells, which is less than one patch .* at least 16 x 16 pixels"):
        replace(run, latent=(16, *size))


def test_a_run_that_did_not_come_by_the_session_does_not_end_in_success(run: Run, noise_of: Callable[..., Tensor], texts: Tensor) -> None:
    film, report = run.sample(noise_of(6), evaluate(texts))
    assert report.chunk_steps == FILM.chunk_steps
    with pytest.raises(RuntimeError, match="did not come by the session of this run"):
        run.sample(noise_of(6), lambda turn, x: torch.zeros_like(x))
    assert torch.equal(run.sample(noise_of(6), evaluate(texts))[0], film), "the next run is right"


def test_a_run_closes_its_session_whatever_happens(run: Run, noise_of: Callable[..., Tensor], texts: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Session] = []
    enter = Session.__enter__
    monkeypatch.setattr(Session, "__enter__", lambda self: opened.append(self) or enter(self))

    def failing(turn: Turn, x: Tensor) -> Tensor:
        turn.denoise(x, texts[:1], ("cond",))
        raise MemoryError

    with pytest.raises(MemoryError):
        run.sample(noise_of(6), failing)
    assert len(opened[0].state) == opened[0]._kv.bytes == 0


def test_a_bidirectional_run_counts_every_step_too(run: Run, noise_of: Callable[..., Tensor], texts: Tensor) -> None:
    sections = sections_of(12, 3, 4, 2, 9, 3)
    film, report = replace(run, film=sections, policy=Planned(share=0.6)).sample(noise_of(12), evaluate(texts))
    assert film.shape[2] == 12
    assert int((report.map != 0).sum()) == sum(section.schedule.chunk_steps for section in sections)


def test_a_run_that_ends_without_its_steps_does_not_end_in_success(
    run: Run, noise_of: Callable[..., Tensor], texts: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowcache_core.run.run.sample_chunks", lambda denoiser, x, *rest: x)
    with pytest.raises(RuntimeError, match="ended after 0 of 8 chunk-steps, with 0 tokens computed"):
        run.sample(noise_of(6), evaluate(texts))
    monkeypatch.setattr("flowcache_core.run.run.sample_sections", lambda denoiser, x, *rest: x)
    with pytest.raises(RuntimeError, match="its latents are no film"):
        replace(run, film=sections_of(12, 3, 4, 2, 9, 3)).sample(noise_of(12), evaluate(texts))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named_at_the_first_step(
    run: Run, make_net: Callable[..., SkyReelsV2], noise_of: Callable[..., Tensor], texts: Tensor, value: float
) -> None:
    damaged, calls = make_net(), []
    damaged.blocks[1].ffn[0].weight[3, 5] = value
    with pytest.raises(RuntimeError, match=r"blocks\.1\.ffn\.0\.weight holds such values\. The file is damaged"):
        replace(run, adapter=SkyReelsAdapter(damaged)).sample(noise_of(6), lambda turn, x: calls.append(turn) or evaluate(texts)(turn, x))
    assert len(calls) == 1


def test_a_text_that_is_no_numbers_is_not_blamed_on_the_file(run: Run, noise_of: Callable[..., Tensor], texts: Tensor) -> None:
    with pytest.raises(RuntimeError, match="All weights are numbers: in float32 something became too large, or the text holds it"):
        run.sample(noise_of(6), evaluate(texts * float("nan")))


def test_looking_at_the_first_output_is_one_wait_of_a_run(run: Run, noise_of: Callable[..., Tensor], texts: Tensor) -> None:
    assert run.sample(noise_of(6), evaluate(texts))[1].host_syncs == 1


@pytest.mark.parametrize(
    ("frames", "said"), [(7, "the last chunk has 1 latent frame, not 3 as in training: whole chunks end at 21 or 33 frames"), (6, "")]
)
def test_a_short_last_chunk_is_said(run: Run, noise_of: Callable[..., Tensor], texts: Tensor, frames: int, said: str) -> None:
    report = replace(run, film=ChunkSchedule(frames, 3, 4, 2)).sample(noise_of(frames), evaluate(texts))[1]
    assert said in report.notes if said else not report.notes


@pytest.mark.parametrize("policy", [Chunkwise(warmup_steps=9), Motion(base=Chunkwise(warmup_steps=9))], ids=lambda policy: policy.title)
def test_a_warm_up_as_long_as_the_run_is_said(run: Run, noise_of: Callable[..., Tensor], texts: Tensor, policy: CachePolicy) -> None:
    report = replace(run, policy=policy, sigmas=flow_sigmas(9), film=replace(FILM, steps=9)).sample(noise_of(6), evaluate(texts))[1]
    assert any("of 9 steps per chunk 9 are always computed, so none can be reused" in note for note in report.notes)
