"""`bench frontier`: equal compute, exact distances between chunks, paired gains; and the tables that are written from it."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flowcache_core.bench import frontier, frontier_tables, measured
from flowcache_core.bench.frontier import BIDIRECTIONAL_ARMS, CAUSAL_ARMS, Film, Kept, Setting, fewer, films, finer, rows, run_arm, steps_for, tokens
from flowcache_core.models.bundle import Bundle
from flowcache_core.sampling.plan import Plan
from flowcache_core.sampling.planner import evenly


def arguments(*texts: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    frontier.add_arguments(parser)
    return parser.parse_args(texts)


def test_fewer_steps_are_never_given_less_compute_than_was_asked_for(bundle: Bundle) -> None:
    for setting in (Setting(), Setting(attention="bidirectional"), Setting(57, 30), Setting(ar_step=-1), Setting(ar_step=0)):
        job = setting.job("", 0)
        for share in frontier.SHARES:
            n = steps_for(bundle, job, setting, share)
            assert tokens(bundle, fewer(job, n), setting) >= share * tokens(bundle, job, setting) - 1e-6
            assert n == 1 or tokens(bundle, fewer(job, n - 1), setting) < share * tokens(bundle, job, setting)


@pytest.mark.parametrize(("steps", "n"), [(50, 28), (50, 15), (50, 6), (50, 20), (30, 11), (100, 7)])
def test_the_finer_schedule_keeps_chunks_exactly_as_far_apart(bundle: Bundle, steps: int, n: int) -> None:
    job = Setting(steps=steps).job("", 0)
    fine = finer(job, n)
    assert fine.ar_step * job.steps == job.ar_step * fine.steps
    assert fine.steps % n == 0
    plan = evenly(fine.schedule(bundle), n).check(fine.schedule(bundle))
    assert [len(computed) for computed in plan.computed] == [n] * 3


SMALL = Setting(frames=33, steps=10, ar_step=1, cfg=1.0, size=64)
PER_FRAME = 16
CHUNK = 3 * PER_FRAME
"""Tokens of `SMALL`."""


@pytest.mark.parametrize("arm", [a for a in CAUSAL_ARMS if a != "steps"])
def test_every_arm_spends_what_fewer_steps_spend(bundle: Bundle, arm: str) -> None:
    """Within one evaluation of every chunk; the rule that measures drift while it runs is held to a wider bound."""
    film = Film(SMALL, "red circle moves right", 3, CAUSAL_ARMS, (0.5,))
    _, base = run_arm(bundle, film, "steps", 0.5)
    _, report = run_arm(bundle, film, arm, 0.5)
    full = tokens(bundle, film.job, film.setting) * PER_FRAME
    bound = (6 if arm == "published-increment" else 3) * CHUNK
    assert abs(report.tokens_computed - base.tokens_computed) <= bound
    assert arm != "default" or base.tokens_computed - CHUNK < report.tokens_computed <= base.tokens_computed
    assert report.tokens_computed < full


@pytest.mark.parametrize("arm", BIDIRECTIONAL_ARMS)
def test_every_arm_of_a_bidirectional_window_spends_what_fewer_steps_spend(bundle: Bundle, arm: str) -> None:
    """Within a row of the window."""
    film = Film(replace(SMALL, attention="bidirectional"), "red circle moves right", 3, BIDIRECTIONAL_ARMS, (0.5,))
    _, base = run_arm(bundle, film, "steps", 0.5)
    _, report = run_arm(bundle, film, arm, 0.5)
    assert abs(report.tokens_computed - base.tokens_computed) <= 3 * CHUNK


def entry(setting: Setting, arm: str, prompt: str, psnr: float, converged: float, share: float = 0.4) -> dict[str, Any]:
    close = dict.fromkeys(frontier.MEASURES) | {"psnr": psnr, "psnr_converged": converged, "ssim": 0.9, "ssim_converged": 0.9}
    return {"setting": setting, "arm": arm, "share": share, "prompt": prompt, "seed": 1, "measured": 0.41, "seconds": 2.0, "full_s": 5.0, **close}


def test_a_gain_is_paired_and_against_the_best_arm_of_fewer_steps() -> None:
    s = Setting()
    values = {"steps": (30, 40), "steps-fractional": (32, 39), "steps-euler": (20, 20), "default": (35, 41)}
    entries = [entry(s, arm, prompt, a + more, b + more) for prompt, more in (("a", 0), ("b", 10)) for arm, (a, b) in values.items()]
    entries += [entry(s, "default", "c", 0, 0, 0.2), entry(s, "steps", "c", 1, 1, 0.2)]
    found = {(row["share"], row["arm"]): row for row in rows(entries)}
    ours = found[0.4, "default"]
    assert (ours["gain"], ours["gain_se"]) == (3.0, 0.0), "against steps-fractional, the best to the uncached film"
    assert (ours["gain_converged"], ours["gain_converged_se"]) == (1.0, 0.0), "against steps, the best to the converged film"
    assert (ours["wins"], ours["prompts"], ours["wall_ratio"], ours["ideal"]) == (2, 2, 2.5, 1.025)
    assert found[0.2, "default"]["wins"] == 0
    assert found[0.4, "steps"]["gain"] == -2.0, "the second best of fewer steps is measured against the best"


def test_rows_have_what_was_promised() -> None:
    keys = {"arm", "share", "share_measured", "psnr", "ssim", "psnr_converged", "ssim_converged", "gain", "gain_se", "gain_converged",
            "gain_converged_se", "wins", "prompts", "wall_ratio"}  # fmt: skip
    found = rows([entry(Setting(), arm, "a", 1, 1) for arm in ("steps", "default")])
    assert all(keys <= set(row) for row in found)
    json.dumps(found)


def test_films_come_from_a_file_with_their_seeds(tmp_path: Path) -> None:
    path = tmp_path / "films.txt"
    path.write_text("7\tred circle moves left\n\n12\tblue square stands still\n")
    made = films(arguments("--prompts-file", str(path), "--grid", "usual"))
    assert [(film.seed, film.prompt) for film in made] == [(7, "red circle moves left"), (12, "blue square stands still")]
    assert [film.seed for film in films(arguments("--prompts-file", str(path), "--grid", "usual", "--seed", "100"))] == [107, 112]
    assert [film.seed for film in films(arguments("--prompts", "3", "--seed", "9", "--grid", "usual"))] == [9, 10, 11]


@pytest.mark.parametrize(("text", "said"), [("no tab here\n", "line 1 of"), ("x\ty\n", "line 1 of"), ("", "has no line")])
def test_a_broken_prompts_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "films.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        films(arguments("--prompts-file", str(path)))


@pytest.mark.parametrize(("texts", "said"), [
    (["--shares", "0.4,zero"], "not a share"), (["--shares", "1.2"], "above 0"), (["--arms", "faster"], "no arm is called faster"),
    (["--prompts", "99"], "there are 1 to"), (["--prompts-file", "/nowhere/films.txt"], "cannot be read"),
])  # fmt: skip
def test_bad_arguments_are_refused(texts: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        films(arguments(*texts))


def test_finished_films_are_kept_and_found_again(tmp_path: Path) -> None:
    film, path = Film(Setting(), "red circle moves left", 1, ("steps",), (0.4, 0.2)), tmp_path / "films.jsonl"
    made = [entry(Setting(), "steps", film.prompt, 30, 40)]
    Kept(path, "float32").add(film, made)
    assert Kept(path, "float32").films == {film: made}
    assert not Kept(path, "fast").films, "films of another precision are others"


def test_the_reduced_grid_changes_one_thing_at_a_time() -> None:
    first, *others = dict.fromkeys(film.setting for film in films(arguments()))
    assert first == Setting()
    for setting in others:
        changed = [name for name in Setting.__dataclass_fields__ if getattr(setting, name) != getattr(first, name)]
        assert len(changed) == 1, setting


def test_an_even_plan_of_all_steps_is_the_full_plan(bundle: Bundle) -> None:
    schedule = Setting().job("", 0).schedule(bundle)
    assert evenly(schedule, 50) == Plan.full(schedule)


def test_every_table_is_written_from_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = ("uncached", *CAUSAL_ARMS)
    settings = (Setting(), Setting(attention="bidirectional"), Setting(cfg=1.0))
    entries = [entry(s, arm, prompt, 30, 40, 1.0 if arm == "uncached" else 0.4) for s in settings for arm in arms for prompt in "ab"]
    origin = {"command": "measure", "device": "a processor", "dtype": "float32", "commit": "abc", "date": "2026-01-01"}
    for module in (frontier_tables, measured):
        monkeypatch.setattr(module, "data", lambda name: {**origin, "rows": rows(entries)})
    for name, make in frontier_tables.FIGURES.items():
        text = make()
        assert text.endswith("\n")
        assert "None" not in text, name
    assert "cfg 1.0" in frontier_tables.settings()
