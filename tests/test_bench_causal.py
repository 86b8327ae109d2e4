"""What `bench causal` measures: colours that are there, and films in all arms, far beyond the trained horizon and without clean passes."""

from __future__ import annotations

import pytest
import torch

from flowcache_core.bench import causal
from flowcache_core.bench.causal import ARMS, WINDOW, clean_passes, long_film, present, rows_of, scene_of, still_scenes, stretches, without_passes
from flowcache_core.models.bundle import load_bundle
from flowcache_core.models.causal_wan_family import SELF_FORCING
from flowcache_core.run.generate import Job
from flowcache_core.training.scenes import COLOURS, render

GROWS = "sink-recent, positions grow"
USUAL = Job.usual


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Films of a quarter of the usual picture."""
    monkeypatch.setattr(causal.Job, "usual", lambda family, prompt, **settings: USUAL(family, prompt, size=64, **settings))


def test_a_true_clip_shows_its_colours_and_no_others() -> None:
    for number in still_scenes(3):
        scene = scene_of(number)
        assert not scene.pan_word
        own = [sprite.colour for sprite in scene.sprites]
        film = render(scene)
        assert present(film, own) == 1
        assert present(film, [colour for colour in COLOURS if colour not in own]) == 0


def test_ten_seconds_are_twenty_chunks_of_the_bundled_model() -> None:
    bundle = load_bundle(family=SELF_FORCING)
    assert bundle.layout.fps == 24
    assert stretches(bundle) == 20


def test_arms_differ_where_history_does(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Films of eight chunks: up to the sixth one positions that grow are those that are bounded, at eight only these of history differ."""
    monkeypatch.setattr(causal, "STRETCH", 2)
    bundle = load_bundle(family=SELF_FORCING)
    number = still_scenes(1)[0]
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


def test_a_film_without_clean_passes_is_another_from_its_second_chunk_on(small: None) -> None:
    bundle = load_bundle(family=SELF_FORCING)
    film = clean_passes(bundle, 0)
    every, none = (film[name]["film"] for name in ("every", "none"))
    assert torch.equal(every[:9], none[:9])
    assert not torch.equal(every[12:], none[12:])
    figures = without_passes([film, film])
    assert figures["every"]["sprites"] == 2 * len(scene_of(0).sprites)
    assert figures["psnr"] == figures["psnr_of_other_prompts"]
    assert figures["psnr"][0] < 60
