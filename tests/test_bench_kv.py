"""What `bench kv` measures: the hidden sprite is hidden, and the whole history is its own reference."""

from __future__ import annotations

import pytest
import torch

from flowcache_core.bench.kv import LEVELS, WHOLE, Point, jobs_of, levels_of, measure, points, reappearing
from flowcache_core.bench.prompts import PROMPTS, seed_of
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.kv.scores.h2o import H2O
from flowcache_core.kv.scores.importance import ImportanceRedundancy
from flowcache_core.models.bundle import Bundle, files_of, load_bundle
from flowcache_core.models.causal_wan_family import SELF_FORCING
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.models.wan_vae import TEMPORAL
from flowcache_core.run.generate import Job
from flowcache_core.show.metrics import mean_and_error
from flowcache_core.training.measures import colour_masks
from flowcache_core.training.scenes import HIDDEN_CHUNK, hidden_scene, render

CHUNK = 3 * TEMPORAL


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_hidden_sprite_is_seen_then_wholly_hidden_then_comes_out(seed: int) -> None:
    scene = hidden_scene(seed)
    area = colour_masks(render(scene))[scene.sprites[0].colour].sum((1, 2))
    first = HIDDEN_CHUNK * CHUNK - TEMPORAL + 1
    assert area[0] > 100
    assert (area[first - CHUNK : first] == 0).all()
    assert area[first] == 0
    assert area[first + CHUNK - 1] > 40


def test_every_policy_stands_in_the_sweep_at_every_fraction() -> None:
    plain = [(point.policy.name, point.fraction) for point in points() if not point.soft and point.dtype == "as computed"]
    assert sorted(plain) == sorted((kind.name, fraction) for kind in KV_POLICIES for fraction in (0.5, 0.25, 0.125))
    fewer = [(point.fraction, point.dtype) for point in points() if point.dtype != "as computed"]
    assert sorted(fewer) == [(fraction, dtype) for fraction in (0.25, 1.0) for dtype in ("fp8", "int4", "int8")]


def test_policies_can_be_asked_for_with_settings() -> None:
    asked = points("importance-redundancy lam=0.5 queries=chunk, h2o", "frame")
    assert {point.policy for point in asked} == {ImportanceRedundancy(lam=0.5, queries="chunk"), H2O()}
    assert {point.name for point in asked} == {"importance-redundancy lam=0.5 queries=chunk", "h2o"}
    assert {point.compressor(12).granularity for point in asked} == {"frame"}
    with pytest.raises(ValueError, match="no KV policy is called 'best'"):
        points("best")


def test_a_mean_comes_with_its_standard_error() -> None:
    assert mean_and_error([1.0, 2.0, 3.0, 6.0]) == (3.0, 1.08)
    assert mean_and_error([1.0]) == (1.0, None)


def test_the_whole_history_is_the_reference_and_less_of_it_is_not() -> None:
    bundle = load_bundle()
    whole, bits, half = measure(
        bundle,
        Job("red circle", 141, 1, size=32, ar_step=1),
        [Point("whole", WHOLE, 1.0), Point("h2o", H2O(), 1.0, "int8"), Point("h2o", H2O(), 0.5)],
    )
    assert whole["psnr"] is None
    assert whole["errors"] == [0.0] * 6
    assert all(0 < few < less for few, less in zip(bits["errors"], half["errors"], strict=True))
    assert half["psnr"] > 0
    assert half["peak"] < whole["peak"]


def test_films_are_as_the_model_makes_them() -> None:
    ours, few = (Bundle(family, None, None, family.layout) for family in (SKYREELS, SELF_FORCING))
    frames = (SKYREELS.frames.pixel(12 * SKYREELS.layout.chunk_frames), SELF_FORCING.frames.pixel(36))
    assert jobs_of(ours, 2, 12, 4)[1] == Job(PROMPTS[1], frames[0], 4, seed_of(1), ar_step=4)
    assert jobs_of(few, 2, 12, 4)[1] == Job.usual(SELF_FORCING, PROMPTS[1], frames=frames[1], seed=seed_of(1))
    assert (levels_of(SKYREELS), levels_of(SELF_FORCING)) == (LEVELS, SELF_FORCING.noise.levels(4, 5.0)[1:4])
    with pytest.raises(ValueError, match="distilled on 4 noise levels"):
        jobs_of(few, 1, 12, 3)


@pytest.mark.skipif(not files_of(SELF_FORCING)[0].exists(), reason="tiny-causal is not in flowcache_core/models/weights")
def test_the_model_of_few_steps_is_measured_with_its_own_history() -> None:
    bundle = load_bundle(family=SELF_FORCING)
    wanted = [Point("whole", WHOLE, 1.0), Point("h2o", H2O(), 0.5)]
    whole, half = measure(bundle, Job.usual(SELF_FORCING, "red circle", frames=81, steps=1, size=32), wanted)
    assert whole["psnr"] is None
    assert half["psnr"] > 0
    assert half["peak"] < whole["peak"]
    same, less = reappearing(bundle, 0, wanted)
    assert same != less


def test_a_budget_for_all_rows_changes_no_error_of_a_true_clip() -> None:
    bundle = load_bundle(torch.float32)
    whole, same, less = reappearing(bundle, 0, [Point("whole", WHOLE, 1.0), Point("h2o", H2O(), 1.0), Point("h2o", H2O(), 0.25)])
    assert whole == same != less
