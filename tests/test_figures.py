"""Pages say what was measured: all of it at one commit, on the bundled weights."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from flowcache_core.__main__ import main
from flowcache_core.bench import figures, measured
from flowcache_core.bench.figures import FIGURES, MEASURED, PAGES, PLACE, figure
from flowcache_core.bench.measured import DATA, ROOT, data, table


def test_the_pages_say_what_was_measured() -> None:
    """README, docs and chart are those of docs/bench, and docs/bench is of the bundled weights and of one commit."""
    figures.main(argparse.Namespace(check=True))


def test_every_figure_stands_on_a_page_and_every_file_is_shown() -> None:
    places = {place[2] for page in PAGES for place in PLACE.finditer((ROOT / page).read_text())}
    assert places == set(FIGURES)
    assert {path.stem for path in (ROOT / DATA).glob("*.json")} == set(MEASURED)


def test_files_of_several_commits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read = data
    monkeypatch.setattr(figures, "data", lambda name: {**read(name), "commit": name[:3]})
    with pytest.raises(ValueError, match=r"are of several commits .frontier fro, .*make measure makes them all of one"):
        figures.main(argparse.Namespace(check=True))


def test_a_file_that_is_missing_or_of_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"docs/bench/kv.json is not there: measure it first"):
        data("kv")
    (tmp_path / DATA).mkdir(parents=True)
    (tmp_path / DATA / "kv.json").write_text(json.dumps({"weights": "other"}))
    with pytest.raises(ValueError, match=r"was measured on other weights .other. than are bundled"):
        data("kv")


def test_an_unknown_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no figure 'x'"):
        figure("x")


def test_a_table_is_markdown() -> None:
    assert table(["a", "b"], [(1, "x")]) == "| a | b |\n| --- | --- |\n| 1 | x |\n"


def test_a_bench_writes_down_how_it_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "seam.json"
    monkeypatch.setattr(sys, "argv", ["flowcache_core", "bench", "seam", "--prompts", "1", "--json", str(out), "--steps", "1", "--rules", "latents"])
    assert main() == 0
    written = json.loads(out.read_text())
    assert written["command"] == "python -m flowcache_core bench seam --prompts 1 --steps 1 --rules latents"
    assert written["dtype"] in ("float32", "bfloat16")
