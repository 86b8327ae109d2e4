"""Pages say what was measured, on the bundled weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from flowcache_core.bench import figures, measured
from flowcache_core.bench.figures import FIGURES, PAGES, PLACE, figure
from flowcache_core.bench.frontier_tables import rival
from flowcache_core.bench.measured import BENCH, COMMANDS, DATA, OTHERS, ROOT, data, table


def test_the_pages_say_what_was_measured() -> None:
    """README, docs and chart are those of docs/bench, and docs/bench is of the bundled weights."""
    figures.main(argparse.Namespace(check=True))


def test_every_figure_stands_on_a_page_and_every_file_is_shown() -> None:
    places = {place[2] for page in PAGES for place in PLACE.finditer((ROOT / page).read_text())}
    assert places == set(FIGURES)
    assert {path.stem for path in (ROOT / DATA).glob("*.json")} == {*COMMANDS, *OTHERS}


def test_files_of_several_commits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read = data
    monkeypatch.setattr(figures, "data", lambda name: {**read(name), "commit": name[:3]})
    with pytest.raises(ValueError, match=r"are of several \(demo dem, recall rec, .*make measure makes them all of one"):
        figures.main(argparse.Namespace(check=True))


def test_a_file_that_is_missing_or_of_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"docs/bench/seam.json is not there: make measure makes it"):
        data("seam")
    (tmp_path / DATA).mkdir(parents=True)
    (tmp_path / DATA / "seam.json").write_text(json.dumps({"weights": "other"}))
    with pytest.raises(ValueError, match=r"was measured on other weights .other. than are bundled"):
        data("seam")


def test_an_unknown_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no figure 'x'"):
        figure("x")


def test_fewer_steps_are_a_mean_over_the_films_of_ours() -> None:
    arms = {"default": {"prompts": 16, "psnr": 30.0}, "steps": {"prompts": 16, "psnr": 28.0}, "steps-euler": {"prompts": 2, "psnr": 29.0}}
    assert rival(arms, "psnr") == 28.0


def test_a_table_is_markdown() -> None:
    assert table(["a", "b"], [(1, "x")]) == "| a | b |\n| --- | --- |\n| 1 | x |\n"


def test_make_measure_runs_what_the_pages_name() -> None:
    rules = (ROOT / "Makefile").read_text().replace("$(BENCH)", BENCH)
    for name, command in (COMMANDS | OTHERS).items():
        if name != "demo":
            assert f"{command} --json {DATA}/{name}.json\n" in rules
