"""What `bench long` measures: colours that are there, and films in all arms, far beyond the trained horizon."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch

from flowcache_core.bench import long
from flowcache_core.bench.long import (
    ARMS,
    SHORTER,
    WINDOW,
    job_of,
    lasting_scenes,
    long_film,
    motion,
    present,
    rows_of,
    saturation,
    scene_of,
    stretches,
)
from flowcache_core.models.bundle import BUNDLED, load_bundle
from flowcache_core.models.causal_wan_family import SELF_FORCING
from flowcache_core.models.family import Family
from flowcache_core.run.generate import Job
from flowcache_core.training.scenes import COLOURS, render

GROWS = "sink-recent, positions grow"
USUAL = Job.usual


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Films of a quarter of the usual picture."""
    monkeypatch.setattr(long.Job, "usual", lambda family, prompt, **settings: USUAL(family, prompt, size=64, **settings))


def test_a_true_clip_shows_its_colours_and_no_others() -> None:
    for number in lasting_scenes(3):
        scene = scene_of(number)
        own = [sprite.colour for sprite in scene.sprites]
        film = render(scene)
        assert present(film, own) == 1
        assert present(film, [colour for colour in COLOURS if colour not in own]) == 0


def test_what_changes_from_frame_to_frame_is_counted_in_grey_levels() -> None:
    film = torch.zeros(3, 3, 4, 4)
    assert motion(film) == 0
    film[1] = 0.5
    assert motion(film) == pytest.approx(127.5)
    film[2] = 1
    assert motion(film) == pytest.approx(127.5)


def test_ten_seconds_are_twenty_chunks_of_the_bundled_model() -> None:
    bundle = load_bundle(family=SELF_FORCING)
    assert bundle.layout.fps == 24
    assert stretches(bundle) == 20


def test_arms_differ_where_history_does(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Films of eight chunks: up to the sixth one positions that grow are those that are bounded, at eight only these of history differ."""
    monkeypatch.setattr(long, "STRETCH", 2)
    bundle = load_bundle(family=SELF_FORCING)
    number = lasting_scenes(1)[0]
    films = {arm: long_film(bundle, (number, arm), 4, 3.0) for arm in (WINDOW, "sink-recent", GROWS)}
    assert set(films) <= set(ARMS)
    first = {arm: film["pictures"][0] for arm, film in films.items()}
    final = {arm: film["pictures"][-1] for arm, film in films.items()}
    assert torch.equal(first["sink-recent"], first[WINDOW])
    assert torch.equal(first[GROWS], first[WINDOW])
    assert not torch.equal(final["sink-recent"], final[WINDOW])
    assert not torch.equal(final["sink-recent"], final[GROWS])
    rows = rows_of(GROWS, [films[GROWS]] * 2, [films[WINDOW]] * 2)
    assert [row["until"] for row in rows] == [2, 4]
    assert rows[0]["psnr_to_window"] == (100.0, 0.0)
    assert rows[-1]["psnr_to_window"][0] < 40
    assert rows[-1]["kv_peak_bytes"] < films[WINDOW]["peak"]


def test_what_was_asked_for_stays_in_true_clips_of_a_minute() -> None:
    for number in lasting_scenes(6):
        scene = scene_of(number)
        assert all(sprite.verb != "leaves" for sprite in scene.sprites)
        for start in (200, 700, 1400):
            assert present(render(scene, start, 24), [sprite.colour for sprite in scene.sprites]) == 1, scene.caption


def test_grey_has_no_saturation() -> None:
    assert saturation(torch.rand(3, 1, 8, 8).expand(3, 3, 8, 8)) == 0
    assert saturation(torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1)) == 1


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    long.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seconds", "15"), "15 seconds were asked for"),
        (("--prompts", "1"), "1 prompts and 1 workers"),
        (("--arms", "none"), "no arm is called none"),
        (("--share", "0"), "a share of 0.0 of the tokens"),
        (("--ar-step", "5"), "120 chunks do not fit a window of 5 at ar_step 5"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_film_is_made(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        long.run(arguments(*words))


@pytest.mark.parametrize("family", BUNDLED.values(), ids=list(BUNDLED))
def test_a_minute_of_every_bundled_model_fits_its_window(family: Family) -> None:
    bundle = load_bundle(family=family)
    rows = job_of(bundle, 0, 60).schedule(bundle).rows
    assert {len(row.active) for row in rows} == {1}


def test_the_bundled_model_is_measured_arm_by_arm(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "STRETCH", 2)
    found = long.run(arguments("--seconds", "4", "--prompts", "2", "--steps", "2"))
    assert [(row["arm"], row["until"]) for row in found["rows"]] == [(arm, until) for arm in long.SHOWN for until in (2, 4)]
    assert all(row["ceiling"][0] == 1 for row in found["rows"])
    assert found["model"] == "tiny-skyreels"


def test_arms_without_the_window_are_compared_with_none(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "STRETCH", 2)
    found = long.run(arguments("--seconds", "2", "--prompts", "2", "--steps", "2", "--arms", "random; sink-recent; random"))
    assert [row["arm"] for row in found["rows"]] == ["random", "sink-recent"]
    assert all(row["psnr_to_window"] is None for row in found["rows"])


def test_a_share_makes_another_film_in_a_plan(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "STRETCH", 2)
    bundle = load_bundle()
    whole, part = (long_film(bundle, (0, WINDOW), 2, 3.0, steps=8, share=share) for share in (1.0, 0.5))
    assert not torch.equal(whole["pictures"][0], part["pictures"][0])


def test_a_shorter_window_is_a_window_of_the_budget_and_the_chunk_itself(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long, "STRETCH", 6)
    bundle = load_bundle()
    shorter = replace(bundle, layout=replace(bundle.layout, window=3 + 1))
    job = job_of(bundle, 0, 6, steps=2)
    film = ARMS[SHORTER].made(bundle, job, 3.0, 1.0)[0]
    assert torch.equal(film, ARMS[WINDOW].made(shorter, job, 0.0, 1.0)[0])
    assert not torch.equal(film, ARMS["sink-recent"].made(bundle, job, 3.0, 1.0)[0])
