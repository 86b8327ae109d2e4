"""Prompt schedules: lines that are read, the film they have to fit, and a run whose text changes from chunk to chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores.streaming import StreamingLLM
from flowcache_core.models.causal_wan_family import FOUR
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.run.run import Run
from flowcache_core.run.session import Session
from flowcache_core.run.states import States
from flowcache_core.run.turn import Turn
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.prompts import ScheduledPrompt, forecast_prompts, read_prompts, require_chunks
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler
from tests.driven import Driven


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("1: a cat", [(0, "a cat")]),
        ("a cat on a roof", [(0, "a cat on a roof")]),
        ("1: a cat\n\n 4 :  it jumps \n10: it sleeps", [(0, "a cat"), (3, "it jumps"), (9, "it sleeps")]),
        ("a cat\nat dawn\n3: it jumps\nonto a wall: high", [(0, "a cat\nat dawn"), (2, "it jumps\nonto a wall: high")]),
        ("1\uff1aa cat\n2\uff1ait jumps", [(0, "a cat"), (1, "it jumps")]),
        ("1:\na cat", [(0, "a cat")]),
    ],
)
def test_a_line_is_a_chunk_and_its_prompt(text: str, prompts: list[tuple[int, str]]) -> None:
    assert read_prompts(text) == tuple(ScheduledPrompt(*one) for one in prompts)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the prompt schedule is empty"),
        (" \n\t", "the prompt schedule is empty"),
        ("3: it jumps", "the first prompt of the schedule is for chunk 3, and chunks count from 1"),
        ("0: a cat", "the first prompt of the schedule is for chunk 0"),
        ("1: a cat\n5: it jumps\n4: it sleeps", "has chunk 4 after chunk 5"),
        ("1: a cat\n1: a dog", "has chunk 1 after chunk 1"),
        ("a cat\n1: a dog", "has chunk 1 after chunk 1"),
        ("1: a cat\n4:", "there is no prompt behind 4:"),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_prompts(text)


def test_a_prompt_beyond_the_film_is_refused_with_its_length() -> None:
    schedule = ChunkSchedule(12, 3, 4, 4)
    require_chunks([0, 3], schedule)
    with pytest.raises(ValueError, match="a prompt for chunk 5, and a film of 45 frames has 4 chunks of 3 latent frames"):
        require_chunks([0, 4], schedule)


@pytest.mark.parametrize(("prefix", "said"), [(0, "chunk 2 (frame 10), chunk 4 (frame 34)"), (1, "chunk 2 (frame 2), chunk 4 (frame 26)")])
def test_the_forecast_has_the_frames_at_which_the_prompt_changes(prefix: int, said: str) -> None:
    """The first frame of chunk 2 follows the pixel frames of the latent frames before it."""
    assert forecast_prompts([0, 3, 1, 0], ChunkSchedule(13, 3, 4, 4, prefix=prefix)) == (f"the prompt changes at {said}",)
    assert forecast_prompts([0, 0], ChunkSchedule(13, 3, 4, 4)) == ()


FRAMES, STEPS = 12, 6


@pytest.fixture
def film(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Of a text for each chunk, by number -> latents, and of how many texts the session had keys and values at most."""

    def make(numbers: list[int], ar_step: int, kept: bool = True) -> tuple[Tensor, int]:
        schedule, levels, held = ChunkSchedule(FRAMES, 3, STEPS, ar_step), flow_sigmas(STEPS), 0
        with Session(SkyReelsAdapter(net), schedule, levels, (4, 4)) as session:

            def evaluate(x: Tensor, chunk: Chunk) -> Tensor:
                nonlocal held
                number = numbers[chunk.index]
                if not kept:
                    session._text.clear()
                out = session.denoise(x, chunk, texts[number : number + 1], ("cond",), texts=chunk.index)
                held = max(held, len(session._text))
                return out

            return sample_chunks(Driven(evaluate, session), noise_of(FRAMES), schedule, levels, Euler()), held

    return make


@pytest.mark.parametrize(("ar_step", "active"), [(STEPS, 1), (3, 2), (2, 3)])
def test_keys_of_texts_are_kept_for_the_chunks_that_read_them(film: Callable[..., tuple[Tensor, int]], ar_step: int, active: int) -> None:
    changing, held = film([0, 1, 0, 1], ar_step)
    assert held == max(active, 2), "those of the chunks that are active, or of one chunk and the one before it"
    assert torch.equal(changing, film([0, 1, 0, 1], ar_step, kept=False)[0])


def test_a_text_changes_no_chunk_before_its_own(film: Callable[..., tuple[Tensor, int]]) -> None:
    one, other = film([0, 0, 0, 0], 2)[0], film([0, 0, 1, 1], 2)[0]
    assert torch.equal(one[:, :, :6], other[:, :, :6])
    assert not torch.equal(one[:, :, 6:9], other[:, :, 6:9])


@pytest.mark.parametrize("compressor", [None, Compressor(StreamingLLM(), 2.0, sink=3)], ids=["window", "budget"])
def test_after_a_recache_a_film_goes_on_as_from_its_frames_given_with_the_new_text(
    net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor], compressor: Compressor | None
) -> None:
    adapter, levels, noise = SkyReelsAdapter(net), flow_sigmas(STEPS), noise_of(FRAMES)

    def made(x: Tensor, schedule: ChunkSchedule, numbers: list[int], recache: int | None = None) -> tuple[Tensor, Session]:
        budget = compressor.budget_for(adapter, schedule, (4, 4), 24, 1, 4) if compressor else None
        with Session(adapter, schedule, levels, (4, 4), budget=budget) as session:

            def evaluate(x: Tensor, chunk: Chunk) -> Tensor:
                number = numbers[max(chunk.index, session.reads)]
                return session.denoise(x, chunk, texts[number : number + 1], ("cond",), texts=number)

            driven = Driven(evaluate, session, recache=frozenset() if recache is None else frozenset({recache}))
            return sample_chunks(driven, x, schedule, levels, Euler()), session

    film, session = made(noise, ChunkSchedule(FRAMES, 3, STEPS, STEPS), [0, 0, 1, 1], recache=2)
    given = torch.cat([film[:, :, :6], noise[:, :, 6:]], 2)
    expected, _ = made(given, ChunkSchedule(FRAMES, 3, STEPS, STEPS, prefix=6), [1, 1, 1, 1])
    torch.testing.assert_close(film, expected, rtol=1e-5, atol=1e-5)
    kept, _ = made(noise, ChunkSchedule(FRAMES, 3, STEPS, STEPS), [0, 0, 1, 1])
    assert torch.equal(kept[:, :, :6], film[:, :, :6])
    assert not torch.allclose(kept[:, :, 6:], film[:, :, 6:], atol=1e-3)
    assert session.report.commits == 3 + 2
    assert "the prompt changes with chunk 3: of history 2 chunks were evaluated once more" in session.report.notes
    assert len(session.report.history.frames) == (3 if compressor else 0), "an entry a chunk, however often it was evaluated"


def test_a_run_that_is_stopped_behind_a_recache_goes_on_bit_for_bit(
    net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor], tmp_path: Path
) -> None:
    family, film = replace(SKYREELS, noise=FOUR, recache=True), ChunkSchedule(2 * FRAMES, 3, 4, 4, window=4)
    run = Run(family, SkyReelsAdapter(net), film, flow_sigmas(4), (16, 4, 4), compressor=Compressor(StreamingLLM(), 2.0), recache=frozenset({5}))
    left = 10**6

    def evaluate(turn: Turn, x: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        number = int(turn.reads >= 5)
        return turn.denoise(x, texts[number : number + 1], ("cond",), texts=number)

    whole, report = run.sample(noise_of(2 * FRAMES), evaluate)
    assert "the prompt changes with chunk 6: of history 3 chunks were evaluated once more" in report.notes
    left = 6 * 5 + 3 + 2  # two steps of the chunk behind it
    with pytest.raises(KeyboardInterrupt):
        run.sample(noise_of(2 * FRAMES), evaluate, states=States(tmp_path / "states"))
    left = 12
    made, again = run.sample(noise_of(2 * FRAMES), evaluate, states=States(tmp_path / "states"))
    assert left > 0
    assert torch.equal(made, whole)
    assert set(report.notes) <= set(again.notes)


def test_a_model_that_was_not_trained_for_it_is_refused(net: SkyReelsV2) -> None:
    with pytest.raises(ValueError, match="as LongLive does; SkyReels-V2 diffusion forcing was not trained for that: set recache to off"):
        Run(SKYREELS, SkyReelsAdapter(net), ChunkSchedule(FRAMES, 3, 4, 4), flow_sigmas(4), (16, 4, 4), recache=frozenset({2}))
