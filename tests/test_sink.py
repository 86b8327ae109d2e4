"""Whether a film has returned to its first frames: distances by their formula, what counts as a return, and the sentence of the report."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores.streaming import StreamingLLM
from flowcache_core.models.bundle import Bundle
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.run import run as runs
from flowcache_core.run.generate import Job, generate
from flowcache_core.run.sink import NEAR, distances, returned, returns
from flowcache_core.sampling.schedule import ChunkSchedule

CHUNKS, SINK = 20, 3
SCHEDULE = ChunkSchedule(3 * CHUNKS - 1, 3, 4, 4, window=5)
"""The last chunk has two frames."""


def leaving(films: int = 1) -> Tensor:
    """Films [films, 4, F, 6, 6] of which every chunk is another picture, with a little noise from frame to frame."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(films, 4, CHUNKS, 6, 6, generator=generator).repeat_interleave(3, 2)[:, :, : SCHEDULE.frames]
    return pictures + 0.1 * torch.randn(pictures.shape, generator=generator)


def back(film: Tensor, chunk: int) -> Tensor:
    """The same film, of which a chunk is the first one again, nearly."""
    out = film.clone()
    out[:, :, 3 * chunk : 3 * chunk + 3] = film[:, :, :3] + 0.2 * film[:, :, 30:33]
    return out


def test_distances_are_those_of_the_formula() -> None:
    film = leaving(2).double()
    found = distances(film, SCHEDULE, SINK)
    assert found.shape == (2, CHUNKS)
    for chunk in range(CHUNKS):
        start, count = SCHEDULE.span(chunk)
        for k in range(2):
            near = [
                min(float((film[k, :, f] - film[k, :, s]).norm() / film[k, :, s].norm()) for s in range(SINK)) for f in range(start, start + count)
            ]
            assert float(found[k, chunk]) == pytest.approx(sum(near) / count, abs=1e-5)


def test_a_chunk_that_is_the_beginning_again_is_found_in_its_film() -> None:
    first, second = leaving(2).split(1)
    found = returns(torch.cat([first, back(second, 12)]), SCHEDULE, SINK)
    assert found.chunks == ((), (12,))
    assert found.nearest[1] < NEAR < found.nearest[0]


def test_a_film_that_goes_on_or_stands_still_has_returned_nowhere() -> None:
    still = torch.randn(1, 4, 1, 6, 6).expand(-1, -1, SCHEDULE.frames, -1, -1) + 0.1 * torch.randn(1, 4, SCHEDULE.frames, 6, 6)
    for film in (leaving(), still, torch.zeros(1, 4, SCHEDULE.frames, 6, 6)):
        assert returned(film, SCHEDULE, SINK) == ()


def test_a_chunk_within_the_trained_window_is_not_judged() -> None:
    assert returns(back(leaving(), 4), SCHEDULE, SINK).chunks == ((),)


@pytest.mark.parametrize(("window", "sink"), [(1, 1), (1, 3), (2, 6), (2, 8), (2, 60)])
def test_a_sink_as_long_as_the_window_or_longer_is_compared_with_what_lies_behind_it(window: int, sink: int) -> None:
    schedule = replace(SCHEDULE, window=window)
    assert returns(leaving(), schedule, sink).chunks == ((),)
    assert returns(back(leaving(), 12), schedule, sink).chunks == (((12,) if sink < schedule.frames else ()),)


def test_the_sentence_names_the_chunks() -> None:
    (line,) = returned(back(back(leaving(), 12), 17), SCHEDULE, SINK)
    assert line.startswith("the film comes back to its first frames in chunks 13, 18 (2 of 20): the distance to them is ")
    assert "try a smaller sink in KV Compressor" in line


@pytest.mark.parametrize(("frames", "sink", "judged"), [(33, 1, True), (33, 0, False), (21, 1, False)])
def test_a_run_looks_at_films_beyond_the_window_whose_budget_has_a_sink(
    net: SkyReelsV2, monkeypatch: pytest.MonkeyPatch, frames: int, sink: int, judged: bool
) -> None:
    seen: list[tuple[Tensor, int]] = []

    def looks(latents: Tensor, schedule: ChunkSchedule, sink: int) -> tuple[str, ...]:
        seen.append((latents, sink))
        return ("a sentence",)

    monkeypatch.setattr(runs, "returned", looks)
    bundle = Words(SKYREELS, net, nn.Identity(), replace(SKYREELS.layout, chunk_frames=3, window=2))
    job = Job("", frames=frames, steps=1, size=32, cfg=1.0, ar_step=1)
    latents, report = generate(bundle, job, compressor=Compressor(StreamingLLM(), 2.0, sink=sink))
    assert ("a sentence" in report.notes) == judged
    assert [one is latents for one, _ in seen] == [True] * judged
    assert [number for _, number in seen] == [sink] * judged


class Words(Bundle):
    """Texts without an encoder."""

    def text(self, prompt: str) -> Tensor:
        return torch.zeros(1, 2, self.network.config.text_dim)
