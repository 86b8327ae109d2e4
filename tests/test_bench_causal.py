"""What `bench causal` measures of films without clean passes."""

from __future__ import annotations

import pytest
import torch

from flowcache_core.bench import causal
from flowcache_core.bench.causal import clean_passes, still_scenes, without_passes
from flowcache_core.bench.long import scene_of
from flowcache_core.models.bundle import load_bundle
from flowcache_core.models.causal_wan_family import SELF_FORCING
from flowcache_core.run.generate import Job

USUAL = Job.usual


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Films of a quarter of the usual picture."""
    monkeypatch.setattr(causal.Job, "usual", lambda family, prompt, **settings: USUAL(family, prompt, size=64, **settings))


def test_scenes_are_those_whose_camera_stands_still() -> None:
    assert not any(scene_of(number).pan_word for number in still_scenes(3))


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
