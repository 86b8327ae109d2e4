"""A report as a file: what a line of the csv says is what the run did."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.planned import Planned
from flowcache_core.run.report import RunReport
from flowcache_core.run.run import Run
from flowcache_core.run.turn import Evaluate
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule, sections_of
from flowcache_core.show.plot import chunk_map
from flowcache_core.show.report_file import COLUMNS, as_csv, write_report

STEPS = 10
NoiseOf = Callable[..., Tensor]


@pytest.fixture
def run(net: SkyReelsV2) -> Run:
    film = ChunkSchedule(6, 3, STEPS, 4, window=2)
    return Run(SKYREELS, SkyReelsAdapter(net), film, tuple(flow_sigmas(STEPS)), (16, 4, 4), policy=Planned(share=0.6))


@pytest.fixture
def evaluate(texts: Tensor) -> Evaluate:
    return lambda turn, x: turn.denoise(x, texts[:1], ("cond",))


def lines_of(report: RunReport) -> list[dict[str, str]]:
    return list(csv.DictReader(as_csv(report).splitlines()))


def test_the_csv_has_a_line_for_every_chunk_and_step(run: Run, evaluate: Evaluate, noise_of: NoiseOf) -> None:
    report = run.sample(noise_of(6), evaluate)[1]
    lines = lines_of(report)
    assert tuple(lines[0]) == COLUMNS
    assert [(int(line["chunk"]), int(line["step"])) for line in lines] == [(k, j) for k in (1, 2) for j in range(1, STEPS + 1)]
    assert [int(line["row"]) for line in lines] == [*range(1, 11), *range(5, 15)], "the second chunk starts four rows after the first"
    assert [float(line["sigma"]) for line in lines[:STEPS]] == pytest.approx(run.sigmas[:-1], rel=1e-5)
    words = {"computed": "2", "skipped": "1"}
    assert ["".join(words[line["decision"]] for line in lines[k : k + STEPS]) for k in (0, STEPS)] == report.as_dict()["map"]
    assert {line["decision"]: float(line["share"]) for line in lines} == {"computed": 1.0, "skipped": 0.0}


@pytest.mark.parametrize("bidirectional", [False, True])
def test_seconds_are_those_of_the_network_at_what_was_computed(run: Run, evaluate: Evaluate, noise_of: NoiseOf, bidirectional: bool) -> None:
    if bidirectional:
        run = replace(run, film=sections_of(12, 3, STEPS, 4, 9, 3))
    report = run.sample(noise_of(12 if bidirectional else 6), evaluate)[1]
    lines = lines_of(report)
    assert all((float(line["seconds"]) > 0) == (line["decision"] == "computed") for line in lines if line["decision"] != "not run")
    passes = report.clock.seconds["network"] - sum(float(line["seconds"]) for line in lines)
    assert passes > -1e-4 if report.commits else abs(passes) < 1e-4


def test_a_threshold_reuses_where_a_plan_skips(run: Run, evaluate: Evaluate, noise_of: NoiseOf) -> None:
    report = replace(run, policy=Chunkwise(threshold=5.0, warmup_steps=2)).sample(noise_of(6), evaluate)[1]
    assert {line["decision"] for line in lines_of(report)} == {"computed", "reused"}


def test_where_nothing_was_skipped_the_report_says_so_and_what_to_do(run: Run, evaluate: Evaluate, noise_of: NoiseOf) -> None:
    strict = replace(run, policy=Chunkwise(threshold=1e-6, warmup_steps=1)).sample(noise_of(6), evaluate)[1]
    assert "nothing was skipped, so no time was saved" in strict.text()
    assert "raise the threshold, or use a preset that plans" in strict.text()
    assert "20 chunk-steps were to be computed" in replace(run, policy=Planned(share=1.0)).sample(noise_of(6), evaluate)[1].text()
    for policy in (None, Planned(share=0.6)):
        assert "nothing was skipped" not in replace(run, policy=policy).sample(noise_of(6), evaluate)[1].text()


def test_every_kind_is_written_and_says_the_same(run: Run, evaluate: Evaluate, noise_of: NoiseOf, tmp_path: Path) -> None:
    report = run.sample(noise_of(6), evaluate)[1]
    for kind in ("json", "csv", "png"):
        write_report(tmp_path / f"new/report_00001_.{kind}", report, run=3)
    folder = tmp_path / "new"
    assert json.loads((folder / "report_00001_.json").read_text()) == {**report.as_dict(), "run": 3}
    assert (folder / "report_00001_.csv").read_text() == as_csv(report)
    with Image.open(folder / "report_00001_.png") as picture:
        assert picture.tobytes() == chunk_map(report).tobytes()
    with pytest.raises(ValueError, match=r"report cannot be written as report.txt: instead of .txt use one of json, csv, png"):
        write_report(tmp_path / "report.txt", report)
