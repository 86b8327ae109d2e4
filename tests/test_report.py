"""What a run tells."""

from __future__ import annotations

import json

import pytest
import torch

from flowcache_core.kernels.attention import Kernel, attending, by_pytorch
from flowcache_core.models.bundle import Bundle
from flowcache_core.run.generate import Job, generate, generate_upstream
from flowcache_core.run.report import CLOSENESS, RunReport
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.plan import Plan
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.show.plot import chunk_map, line_plot


@pytest.fixture
def report() -> RunReport:
    """Two chunks of two steps, 10 and 5 tokens: one step reused, one never run, one commit."""
    out = RunReport(2, 2)
    out.decided(Chunk(0, 0, 2, 0, 2), True, 10, 0.0)
    out.decided(Chunk(0, 0, 2, 1, 2), False, 10, 0.25)
    out.committed(10)
    out.decided(Chunk(1, 2, 1, 0, 2), True, 5, 0.0)
    return out


def test_tokens_and_steps_add_up(report: RunReport) -> None:
    assert (report.chunk_steps, report.chunk_steps_computed) == (3, 2)
    assert (report.tokens, report.tokens_computed, report.commits) == (35, 25, 1)
    assert report.share == pytest.approx(25 / 35)
    assert report.drift[0, 1] == 0.25


def test_the_map_has_one_digit_per_step(report: RunReport) -> None:
    assert report.as_dict()["map"] == ["21", "20"]


def test_a_report_survives_json(report: RunReport) -> None:
    report.close()
    said = report.as_dict()
    assert json.loads(json.dumps(said)) == said


def test_an_empty_report_computes_everything() -> None:
    assert RunReport(1, 1).share == 1.0
    assert "0 of 0 chunk-steps" in RunReport(1, 1).summary()


def test_whole_rows_count_idle_chunks_as_computed() -> None:
    schedule, report = ChunkSchedule(15, 3, 10, 5), RunReport(5, 10)
    for row in schedule.rows:
        report.whole_row(row, 5 * 3 * 4)
    assert report.chunk_steps == report.chunk_steps_computed == 5 * len(schedule.rows)
    assert report.tokens == report.tokens_computed == 5 * len(schedule.rows) * 12
    assert report.share == 1.0


def test_whole_rows_that_a_plan_skips_count_their_window_as_not_computed() -> None:
    schedule, report = ChunkSchedule(15, 3, 10, 5), RunReport(5, 10)
    for number, row in enumerate(schedule.rows):
        report.whole_row(row, 5 * 3 * 4, computed=number % 3 == 0)
    rows, run = len(schedule.rows), -(-len(schedule.rows) // 3)
    assert (report.chunk_steps, report.chunk_steps_computed) == (5 * rows, 5 * run)
    assert (report.tokens, report.tokens_computed) == (5 * rows * 12, 5 * run * 12)
    assert report.as_dict()["map"][0] == "2112112112"


def test_the_picture_of_a_plan_calls_skipped_what_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda self, at, text, *rest: words.append(text))
    report = RunReport(1, 4)
    chunk_map(report)
    assert "reused" in words
    words.clear()
    report.follows(Plan(4, ((0, 2, 3),)))
    chunk_map(report)
    assert "skipped" in words
    assert "reused" not in words
    assert report.planned.tolist() == [[1, 0, 1, 1]]


def test_the_peak_is_the_largest_size_seen() -> None:
    report = RunReport(1, 1)
    for size in (3, 7, 5):
        report.kv_bytes(size)
    assert report.as_dict()["kv_peak_bytes"] == 7


def test_time_stands_still_after_closing_and_parts_add_up(report: RunReport) -> None:
    for _ in range(2):
        with report.clock.measure("network", torch.device("cpu")):
            pass
    report.close()
    wall = report.wall_s
    report.close()
    assert report.wall_s == wall
    assert wall >= report.clock.seconds["network"] > 0


def test_the_summary_names_the_counts(report: RunReport) -> None:
    assert "computed 2 of 3 chunk-steps, 71% of all tokens" in report.summary()


def test_the_picture_shows_computed_reused_and_not_run(report: RunReport) -> None:
    picture = chunk_map(report, cell=14)
    cells = [picture.getpixel((74 + j * 14 + 4, 34 + k * 17 + 4)) for k in range(2) for j in range(2)]
    assert cells[0] == cells[2]
    assert len(set(cells)) == 3


def test_a_step_that_ran_in_part_is_drawn_the_darker_the_more_tokens_ran() -> None:
    report = RunReport(1, 4)
    for step, count in enumerate((2, 8)):
        report.decided(Chunk(0, 0, 2, step, 4), False, 10, 0.0, torch.arange(count))
    report.decided(Chunk(0, 0, 2, 2, 4), True, 10, 0.0)
    report.decided(Chunk(0, 0, 2, 3, 4), False, 10, 0.0)
    cells = [chunk_map(report, cell=14).getpixel((74 + j * 14 + 4, 38)) for j in range(4)]
    assert len(set(cells)) == 4
    assert sum(cells[0]) > sum(cells[1])  # type: ignore[arg-type]
    assert (report.tokens, report.tokens_computed, report.chunk_steps_computed, report.chunk_steps_refreshed) == (40, 20, 1, 2)


def test_a_chunk_that_runs_whole_after_all_is_counted_once() -> None:
    for some in (torch.arange(4), None):
        report = RunReport(1, 1, (2, 1, 5))
        report.decided(Chunk(0, 0, 2, 0, 1), False, 10, 0.0, some)
        for _ in range(2):
            report.ran(Chunk(0, 0, 2, 0, 1), 10, some)
        assert (report.tokens_computed, report.chunk_steps_computed, report.chunk_steps_refreshed) == (10, 1, 0)
        report.close()
        assert report.visits is not None
        assert report.visits.tolist() == [[[1] * 5]] * 2


def test_a_plot_of_a_single_point_is_drawn() -> None:
    assert line_plot({"a": [(0.5, 30.0)]}, "x", "y").size == (640, 420)


def test_what_was_saved_is_what_the_skipped_tokens_would_have_taken(report: RunReport) -> None:
    report.close()
    report.clock.seconds.update(total=3.0, network=2.5)
    assert report.pace(4) == f"0.75 s per row, 1 s with all of it computed: 1.33x as fast, 1.0 s saved; {CLOSENESS}"
    report.rows = 4
    assert report.pace(4) in report.text()
    assert "host sync" not in report.text()
    assert (report.pace(0), RunReport(1, 1).pace(4)) == ("", "")


def test_what_the_panel_shows_is_in_the_json_too(report: RunReport) -> None:
    report.close()
    report.clock.seconds.update(total=3.0, network=2.5)
    report.rows = 4
    numbers = report.as_dict()
    assert (numbers["rows"], numbers["drift"]) == (4, [[0.0, 0.25], [0.0, 0.0]])
    assert numbers["seconds"] == {"network": 2.5, "rest": 0.5, "per_row": 0.75, "per_full_row": 1.0}
    bare = RunReport(1, 1).as_dict()
    assert (bare["drift"], set(bare["seconds"])) == ([], {"network", "rest"})


def test_after_the_run_nothing_lies_ahead(report: RunReport) -> None:
    report.notes = ("2 of 4 chunk-steps will be computed",)
    assert report.text().endswith("\n2 of 4 chunk-steps were to be computed")
    assert report.as_dict()["notes"] == ["2 of 4 chunk-steps will be computed"]


def test_a_film_that_was_shown_on_the_way_is_told_of_and_slows_no_row(report: RunReport) -> None:
    report.close()
    report.clock.seconds.update(total=3.0, network=2.5)
    pace = report.pace(4)
    report.clock.seconds.update(total=5.0)
    report.shown.add(9, 1.5)
    report.shown.add(12, 0.5)
    assert report.pace(4) == pace
    assert "\n21 frames were decoded and shown on the way: 2.00 s of the whole, not of a row" in report.text()
    assert (report.as_dict()["shown"], RunReport(1, 1).as_dict()["shown"]) == ({"frames": 21, "seconds": 2.0}, {})


def test_the_report_names_the_attention_of_the_run_and_the_path_of_the_kernels() -> None:
    report = RunReport(1, 2)
    assert report.as_dict()["kernels"] == {}
    for name in ("a", "a", "b"):
        with attending(Kernel(name, by_pytorch)):
            report.evaluates(torch.device("cpu"))
    path = "PyTorch (Triton kernels are for CUDA, and the device is cpu)"
    assert report.as_dict()["kernels"] == {"attention": ["a", "b"], "path": path}
    assert report.text().splitlines()[-1] == f"attention by a, then b; other kernels by {path}"


def test_a_film_without_the_host_is_by_pytorch(bundle: Bundle) -> None:
    for make in (generate, generate_upstream):
        _, report = make(bundle, Job("", frames=9, steps=1, size=32))
        assert report.as_dict()["kernels"]["attention"] == ["PyTorch"]
