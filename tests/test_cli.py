"""The command line: what it writes, and what it refuses before writing anything."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowcache_core.__main__ import main
from flowcache_core.bench import motion, reuse, sweep
from flowcache_core.bench.recall import recall, spearman, tokens_that_move
from flowcache_core.models.bundle import NETWORK, VAE, files_of
from flowcache_core.models.causal_wan_family import SELF_FORCING
from flowcache_core.models.magi_family import MAGI
from tests.films import read_film

pytestmark = pytest.mark.skipif(not (NETWORK.exists() and VAE.exists()), reason="the bundled weights are not in flowcache_core/models/weights")

RUN = {"arm", "wall_s", "chunk_steps", "chunk_steps_computed", "tokens", "tokens_computed", "psnr", "ssim", "kv_peak_bytes", "host_syncs"}
Cli = Callable[..., int]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["flowcache_core", *map(str, arguments)])
        return main()

    return run


def test_demo_writes_films_a_map_and_a_report(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "demo"
    assert cli("demo", "--frames", 9, "--steps", 4, "--arms", "uncached,chunkwise", "--out", out) == 0

    report = json.loads((out / "report.json").read_text())
    assert {"device", "dtype", "commit", "model", "frames", "steps", "runs"} <= report.keys()
    assert (report["model"], report["frames"], report["steps"]) == ("tiny-skyreels", 9, 4)
    uncached, chunkwise = report["runs"]
    assert uncached.keys() >= RUN
    assert chunkwise.keys() >= RUN
    assert (uncached["arm"], uncached["psnr"], uncached["ssim"]) == ("uncached", None, None)
    assert uncached["chunk_steps"] == uncached["chunk_steps_computed"] == 4
    assert chunkwise["psnr"] > 10
    assert 0 < chunkwise["ssim"] <= 1
    assert chunkwise["tokens_computed"] <= chunkwise["tokens"] == uncached["tokens"]

    of_an_arm = {f"{arm}{kind}" for arm in ("uncached", "chunkwise") for kind in (".mp4", "_map.png", ".json", ".csv")}
    assert {p.name for p in out.iterdir()} == {*of_an_arm, "side_by_side.mp4", "report.json"}
    assert len((out / "chunkwise.csv").read_text().splitlines()) == 1 + 4
    assert json.loads((out / "chunkwise.json").read_text())["tokens_computed"] == chunkwise["tokens_computed"]
    assert read_film(out / "uncached.mp4").shape == (9, 128, 128, 3)
    with Image.open(out / "chunkwise_map.png") as picture:
        assert picture.size[0] > 0
    said = capsys.readouterr().out
    assert "uncached" in said
    assert str(out) in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--frames", 58), "58 frames are not 4n + 1: use 57 or 61"),
        (("--frames", 0), "use 1 or 5"),
        (("--arms", "uncached,teacache"), "there is no arm teacache: choose from upstream, uncached, chunkwise"),
        (("--arms", ","), "there is no arm (none given): choose from"),
        (("--steps", 0), "0 steps were asked for: at least 1 is needed"),
    ],
)
def test_demo_refuses_before_it_writes(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], sentence: str
) -> None:
    assert cli("demo", "--out", tmp_path / "out", *arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("flowcache: ")
    assert sentence in said.err
    assert "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not all(path.exists() for path in files_of(MAGI)), reason="tiny-magi is not in flowcache_core/models/weights")
def test_demo_runs_the_other_bundled_model_in_the_ways_that_it_has(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("demo", "--model", "tiny-magi", "--frames", 24, "--steps", 8, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["model"], report["frames"], report["steps"], report["ar_step"], report["cfg"]) == ("tiny-magi", 24, 8, 2, MAGI.usual.cfg)
    assert [run["arm"] for run in report["runs"]] == ["uncached", "chunkwise"], "the upstream way is not there for a model that looks back only"
    assert report["runs"][1]["tokens_computed"] < report["runs"][0]["tokens_computed"]
    capsys.readouterr()
    refused: dict[str, tuple[object, ...]] = {
        "looks back only": ("--arms", "upstream"), "makes whole chunks of 24 frames, and 30 do not divide: use 24 or 48": ("--frames", 30),
        "10 steps do not divide: use 8 or 12": ("--steps", 10), "28 do not divide: use 24 or 48": ("--frames", 28),
    }  # fmt: skip
    for sentence, arguments in refused.items():
        assert cli("demo", "--model", "tiny-magi", "--out", tmp_path / "none", *arguments) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(not files_of(SELF_FORCING)[0].exists(), reason="tiny-causal is not in flowcache_core/models/weights")
def test_demo_runs_the_model_of_few_steps_with_the_steps_that_it_has(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("demo", "--model", "tiny-causal", "--frames", 9, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["model"], report["steps"], report["ar_step"], report["cfg"]) == ("tiny-causal", 4, 4, 1)
    assert [run["arm"] for run in report["runs"]] == ["uncached", "chunkwise"]
    capsys.readouterr()
    assert cli("demo", "--model", "tiny-causal", "--steps", 3, "--out", tmp_path / "none") == 2
    assert "distilled on 4 noise levels" in capsys.readouterr().err


def test_an_interrupted_demo_says_so(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*unused: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flowcache_core.demo.run.run_arm", interrupt)
    assert cli("demo", "--frames", 9, "--steps", 2, "--out", tmp_path / "out") == 130
    assert "stopped" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bench_reuse_writes_its_rows_and_a_plot(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "THRESHOLDS", (0.1,))
    out = tmp_path / "new" / "reuse.json"
    assert cli("bench", "reuse", "--prompts", 1, "--steps", 6, "--frames", 21, "--rules", "default", "--json", out) == 0
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert {"rule", "setting", "share", "psnr", "ssim", "wall_ratio"} <= row.keys()
    assert (row["rule"], row["setting"]) == ("default", 0.1)
    assert 0 < row["share"] <= 1
    assert (result["bench"], result["prompts"], result["steps"]) == ("reuse", 1, 6)
    assert [(one["rule"], one["share"]) for one in result["summary"]] == [("default", 0.55), ("default", 0.4)]
    assert out.with_suffix(".png").exists()


@pytest.mark.slow
def test_bench_reuse_measures_the_same_with_workers(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "LATENT_THRESHOLDS", (10.0,))
    results = []
    for workers in (1, 2):
        out = tmp_path / f"{workers}.json"
        arguments = ("--prompts", 1, "--steps", 7, "--frames", 9, "--rules", "published-increment", "--workers", workers)
        assert cli("bench", "reuse", *arguments, "--json", out) == 0
        results.append([{k: row[k] for k in ("rule", "setting", "share")} for row in json.loads(out.read_text())["rows"]])
    assert results[0] == results[1]
    assert results[0][0]["share"] == round(6 / 7, 4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--prompts", 0), "0 prompts were asked for: there are 1 to 16"),
        (("--prompts", 17), "17 prompts were asked for"),
        (("--workers", 0), "0 workers were asked for: use 1 or more"),
        (("--frames", 34), "34 frames are not 4n + 1: use 33 or 37"),
        (("--rules", "published-residual", "--steps", 6), "a computed share of 38% cannot be reached"),
        (("--rules", "magic"), "no rule is called magic: there are default, "),
    ],
)
def test_bench_refuses_before_it_runs(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], sentence: str
) -> None:
    assert cli("bench", "reuse", "--json", tmp_path / "out" / "rows.json", *arguments) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_module_can_be_run_and_its_exit_code_is_the_refusal() -> None:
    command = [sys.executable, "-W", "error", "-m", "flowcache_core", "demo", "--arms", "teacache"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("flowcache: there is no arm teacache")


def test_demo_of_motion_writes_its_overlay(cli: Cli, tmp_path: Path) -> None:
    assert cli("demo", "--frames", 9, "--steps", 12, "--arms", "uncached,motion", "--out", tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [run["arm"] for run in report["runs"]] == ["uncached", "motion"]
    assert report["runs"][1]["tokens_computed"] < report["runs"][0]["tokens_computed"]
    assert read_film(tmp_path / "motion_overlay.mp4").shape == (9, 128, 128, 3)


def test_bench_motion_compares_at_equal_shares(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [r for r in motion.rules() if r.rule in ("chunkwise", "motion")][::3]
    monkeypatch.setattr(motion, "rules", lambda: some)
    out = tmp_path / "motion.json"
    assert cli("bench", "motion", "--prompts", 1, "--steps", 10, "--size", 64, "--rules", "chunkwise,motion", "--json", out) == 0
    result = json.loads(out.read_text())
    assert [row["rule"] for row in result["rows"]] == ["chunkwise", "motion"]
    assert all({"setting", "share", "psnr", "ssim", "wall_ratio"} <= row.keys() for row in result["rows"])
    assert {(line["share"], line["rule"]) for line in result["summary"]} == {(s, r) for s in (0.4, 0.3) for r in ("chunkwise", "motion")}


def test_bench_motion_refuses_an_unknown_rule(cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("bench", "motion", "--rules", "motion,magic") == 2
    assert "no rule is called magic: there are chunkwise, motion, " in capsys.readouterr().err


def test_a_summary_lies_between_its_neighbours_and_never_outside_the_sweep() -> None:
    rows = [{"rule": "a", "share": s, "psnr": p, "ssim": p / 100, "wall_ratio": 1 / s} for s, p in ((0.5, 30.0), (0.3, 20.0), (0.4, 26.0))]
    line, middle, outside = sweep.summary(rows, (0.4, 0.35, 0.2))
    assert line["psnr"] == 26
    assert middle["psnr"] == 23
    assert outside["psnr"] is None


def test_recall_and_rank_correlation_are_what_they_say() -> None:
    assert recall(torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([True, False, False, True]), 0.5) == 0.5
    assert recall(torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([True, False, True, False]), 0.5) == 1
    x = torch.rand(20)
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    cells = torch.zeros(1, 4, 4, dtype=torch.bool)
    cells[0, 3, 0] = True
    assert tokens_that_move(cells)[0].tolist() == [[False, False], [True, False]]


def test_bench_recall_says_how_well_each_measure_finds_what_moves(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowcache_core.bench.recall.FRAMES", 9)
    out = tmp_path / "recall.json"
    assert cli("bench", "recall", "--clips", 1, "--steps", 10, "--json", out) == 0
    rows = {row["measure"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"clean", "noisy", "output", "change", "chance"}
    for row in rows.values():
        assert 0 <= row["recall@20%"] <= row["recall@40%"] <= row["recall@60%"] <= 1
        assert -1 <= row["spearman"] <= 1
    assert cli("bench", "recall", "--clips", 0) == 2
