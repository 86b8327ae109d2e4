"""What is said and drawn of a history under a budget."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flowcache_core.kv.compressor import Budget
from flowcache_core.kv.forecast import forecast_history
from flowcache_core.kv.layout import capacity
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.run.footprint import footprint
from flowcache_core.run.history import STAGES_SHOWN
from flowcache_core.run.report import RunReport
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.show.plot import KEPT_SHADES, PLACES_AT_MOST, history_map

FRAME, SINK = 4, 4
"""Tokens of a frame; tokens that stay whatever comes."""


def report_of(chunks: int, slots: int, layers: int = 2) -> RunReport:
    """Chunks of one frame of 2 x 2 tokens, of which the first frame and the newest tokens stay."""
    report = RunReport(chunks + 1, 2, (chunks + 1, 2, 2))
    for k in range(chunks):
        seen = np.arange(FRAME * (k + 1))
        kept = seen if len(seen) <= slots else np.concatenate([seen[:SINK], seen[len(seen) - slots + SINK :]])
        report.history.kept(Chunk(k, k, 1, 2, 2), np.broadcast_to(kept, (2, layers, 1, len(kept))), FRAME, 1024 * len(kept))
    return report


def test_history_is_counted_over_time() -> None:
    report = report_of(5, 10)
    assert report.history.tokens == [4, 8, 10, 10, 10]
    assert report.history.bytes == [4096, 8192, 10240, 10240, 10240]
    assert [frames.tolist() for frames in report.history.frames[2:]] == [[4, 2, 4], [4, 0, 2, 4], [4, 0, 0, 2, 4]]
    assert report.history.places is not None
    assert report.history.places.tolist() == [1] * 4 + [0] * 8 + [0, 0] + [1] * 6


def test_the_text_tells_each_stage_of_history_once() -> None:
    stages = "4 after chunk 1 (0.0 MiB), 8 after chunk 2 (0.0 MiB), 10 after chunks 3 to 5 (0.0 MiB)"
    assert report_of(5, 10).text().splitlines()[1] == f"history in tokens per layer: {stages}, of 20 finished ones"


def test_a_history_of_many_stages_is_told_by_its_ends() -> None:
    said = report_of(STAGES_SHOWN + 3, 1000).history.line()
    assert "4 after chunk 1 (0.0 MiB), ..., 36 after chunk 9 (0.0 MiB), of 36" in said


def test_json_has_the_history() -> None:
    report = report_of(5, 10)
    history = json.loads(json.dumps(report.as_dict()))["history"]
    assert history == {"tokens": [4, 8, 10, 10, 10], "bytes": [4096, 8192, 10240, 10240, 10240], "frames": [4, 0, 0, 2, 4]}


def test_without_a_budget_there_is_no_history() -> None:
    report = RunReport(2, 2, (2, 2, 2))
    assert report.as_dict()["history"] == {}
    assert report.text() == report.summary()
    assert history_map(report).size[0] >= 128


def test_the_picture_is_the_darker_the_more_of_a_frame_is_kept() -> None:
    picture = history_map(report_of(5, 10))
    cell, last = 16, 34 + 4 * 16 + 6
    shades = [picture.getpixel((74 + f * cell + 6, last)) for f in range(5)]
    assert shades[0] == shades[4] == KEPT_SHADES[1]
    assert shades[1] == shades[2] == KEPT_SHADES[0]
    assert sum(shades[4]) < sum(shades[3]) < sum(shades[2])  # type: ignore[arg-type]
    above = [picture.getpixel((74 + f * cell + 6, 34 + 6)) for f in range(2)]
    assert above[0] == KEPT_SHADES[1]
    assert above[1] not in KEPT_SHADES, "what had not been made by then is left blank"


def test_the_picture_shows_the_places_of_the_frames_that_are_kept() -> None:
    """Frames 1, 4 and 5: of frame 4 the lower half."""
    picture = history_map(report_of(5, 10))
    top = 34 + 5 * 16 + 30 + 28
    place = {(n, y): picture.getpixel((10 + n * 58 + 8, top + 24 * y + 8)) for n in range(3) for y in range(2)}
    assert [place[n, y] == KEPT_SHADES[1] for n in range(3) for y in range(2)] == [True, True, False, True, True, True]
    assert place[1, 0] == KEPT_SHADES[0]


@pytest.mark.parametrize("chunks", [1, 3, 400])
def test_films_of_every_length_are_drawn(chunks: int) -> None:
    width, height = history_map(report_of(chunks, 10 if chunks < 400 else 4 * PLACES_AT_MOST + 40)).size
    assert 128 <= width <= 1300
    assert height <= 1300


def test_a_frame_of_many_tokens_is_drawn() -> None:
    report = RunReport(2, 2, (2, 30, 52))
    report.history.kept(Chunk(0, 0, 1, 2, 2), np.arange(1000).reshape(1, 1, 1, -1), 1560)
    assert history_map(report).width < 1300


@pytest.mark.parametrize(
    ("ar_step", "slots", "prefix", "sentence"),
    [
        (5, 20, 0, "history is kept to 20 tokens per layer: 5 latent frames of up to 9"),
        (5, 36, 0, "the budget saves nothing here: it has room for 9 latent frames, and the history of this film is never longer than 9"),
        (0, 20, 0, "the budget saves nothing here: ar_step 0 denoises all chunks together"),
        (0, 20, 6, "history is kept to 20 tokens per layer: 5 latent frames of up to 6"),
        (2, 60, 0, "history is kept to 60 tokens per layer: 15 latent frames of up to 27; it is chosen from the whole film, but the KV cache is"),
    ],
)
def test_what_a_budget_will_do_is_said_before_the_run(ar_step: int, slots: int, prefix: int, sentence: str) -> None:
    schedule = ChunkSchedule(30, 3, 10, ar_step, 5) if ar_step == 2 else ChunkSchedule(12, 3, 10, ar_step, None, prefix)
    assert forecast_history(Budget(slots, FRAME, 3 * FRAME, "token", KV_POLICIES[0]()), schedule, FRAME).startswith(sentence)
    no_less = "saves nothing" in sentence or "the KV cache is" in sentence
    assert (capacity(schedule, FRAME, slots).total >= capacity(schedule, FRAME).total) == no_less


def test_fewer_bits_save_memory_even_where_all_is_kept() -> None:
    said = forecast_history(Budget(36, FRAME, 3 * FRAME, "token", KV_POLICIES[0](), "int8"), ChunkSchedule(12, 3, 10), FRAME)
    assert said == "all of history is kept: the budget has room for 9 latent frames, and it is never longer than 9"


def test_the_footprint_says_what_the_budget_saves(net: SkyReelsV2) -> None:
    schedule = ChunkSchedule(30, 3, 4, 4)
    with_budget, without = (footprint(SkyReelsAdapter(net), schedule, (16, 4, 4), 2, 8, 4, None, bounded=size) for size in (20, None))
    assert with_budget.kv_unbounded == without.kv > with_budget.kv
    assert without.kv_unbounded == 0
    assert "without" not in without.sentence()
    assert f"KV cache {with_budget.kv / 2**20:.1f} MiB ({without.kv / 2**20:.1f} MiB without the budget), text" in with_budget.sentence()


def test_policies_have_names_of_their_own_and_need_no_settings() -> None:
    names = [kind().name for kind in KV_POLICIES]
    assert len(set(names)) == len(names)
    assert {"importance-redundancy", "sink-recent", "random"} <= set(names)
