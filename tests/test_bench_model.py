"""`bench model`: operations are those of the shapes, and what is asked for is checked before anything is made."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch

from flowcache_core.bench import model
from flowcache_core.bench.model import ARMS, GEOMETRIES, Arm, Sized, asked, compare, operations, profiled, randomise, sized
from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from flowcache_core.models.skyreels_checkpoint import RELEASES
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.run.generate import Job

SMALL = replace(GEOMETRIES["smoke"], job=Job("", 17, 2, size=32, width=48, ar_step=1, cfg=1.0))


def arguments(*texts: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    model.add_arguments(parser)
    return parser.parse_args(texts)


def test_operations_of_all_layers_follow_from_one_and_two() -> None:
    three = model._counted(sized(SMALL, 3, torch.float32, "cpu"), SMALL.job, Arm())
    assert operations(SMALL, Arm(), torch.float32, "cpu") == pytest.approx(three, rel=1e-9)


def test_operations_are_those_of_the_formula() -> None:
    """Per token of a block: 2 x (6 d^2 + 2 d x ffn) for the products with weights, 4 d x (keys + words) for attention."""
    one, two = (model._counted(sized(SMALL, layers, torch.float32, "cpu"), SMALL.job, Arm()) for layers in (1, 2))
    d, ffn, words, tokens, chunk_steps = 128, 256, 16, 5 * 6, 2
    evaluations = tokens * (2 * (6 * d * d + 2 * d * ffn) + 4 * d * (tokens + words)) * chunk_steps
    text = 2 * words * 2 * d * d
    assert two - one == pytest.approx(evaluations + text, rel=1e-9)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_runs_and_is_measured(name: str) -> None:
    geometry = replace(SMALL, job=replace(SMALL.job, frames=37, steps=8))
    row = model.measure(name, sized(geometry, 1, torch.float32, "cpu"), geometry, torch.float32, torch.device("cpu"), 1e12)
    assert row["tflop"] > 0
    assert row["network_s"] >= 0
    assert row["peak_mib"] is None
    assert (row["share_of_tokens"] == 1) == (name in ("upstream", "uncached", "kv-quarter", "flowcache-slow", "flowcache-fast")), (
        "the published rules compute the first steps"
    )


def test_arms_are_compared_with_the_uncached_one() -> None:
    rows = [{"arm": "uncached", "network_s": 8.0, "tflop": 6.0}, {"arm": "fast", "network_s": 2.0, "tflop": 2.0}]
    compare(rows)
    assert (rows[1]["speed"], rows[1]["predicted"]) == (4.0, 3.0)
    alone = [{"arm": "fast", "network_s": 2.0, "tflop": 2.0}]
    compare(alone)
    assert "speed" not in alone[0]


def test_geometries_are_those_of_released_models_and_their_films_fit() -> None:
    for name in ("skyreels-1.3b", "skyreels-14b"):
        config = GEOMETRIES[name].config
        assert (config.dim, config.ffn_dim, config.layers, config.fps) in RELEASES
    for geometry in GEOMETRIES.values():
        schedule = geometry.job.schedule(Sized(SKYREELS, None, None, geometry.layout))
        assert schedule.frames == schedule.chunks * geometry.layout.chunk_frames


def test_random_weights_keep_the_size_of_what_passes() -> None:
    network = SkyReelsV2(SkyReelsConfig(256, 512, 2, 64))
    randomise(network)
    x = torch.randn(1, 30, 256)
    assert 0.5 < float(network.blocks[0].ffn(x).std()) < 2  # type: ignore[operator, union-attr]
    assert torch.equal(network.blocks[0].self_attn.norm_q.weight, torch.ones(256))  # type: ignore[union-attr, arg-type]


def test_the_profile_names_operators_by_their_part() -> None:
    rows = profiled(sized(SMALL, 1, torch.float32, "cpu"), SMALL.job, 3)
    assert len(rows) == 3
    assert rows[0]["part"] >= rows[1]["part"] >= rows[2]["part"] > 0


@pytest.mark.parametrize(("texts", "sentence"), [
    (("--layers", "99"), "99 layers were asked for: smoke has 3"),
    (("--frames", "34"), "34 frames"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_made(texts: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        asked(arguments(*texts))


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is no arm x: choose from upstream; uncached; "):
        model.run(arguments("--arms", "x"))


def test_a_picture_need_not_be_square() -> None:
    bundle = Sized(SKYREELS, None, None, SMALL.layout)
    assert Job("", 21, size=32, width=48).noise(bundle).shape == (1, 16, 6, 4, 6)
    assert Job("", 21, size=32).noise(bundle).shape == (1, 16, 6, 4, 4)
    with pytest.raises(ValueError, match="a picture of 40 pixels does not fit: use a multiple of 16, such as 32"):
        Job("", 21, size=32, width=40).schedule(bundle)


def test_the_table_of_memory_is_what_a_run_announces() -> None:
    """SkyReels-V2 1.3B, 960 x 544, one chunk after the other: five chunks of 10200 tokens, two branches, 30 layers, 16 bits."""
    whole = model.held(GEOMETRIES["skyreels-1.3b"], 497, ARMS["uncached"], 50)
    assert whole.kv == 2 * 5 * 10200 * 2 * 1536 * 30 * 2
    quarter = model.held(GEOMETRIES["skyreels-1.3b"], 497, ARMS["kv-quarter"], 50)
    assert 2 / 5 * whole.kv < quarter.kv < 1 / 2 * whole.kv
    assert GEOMETRIES["skyreels-1.3b"].frames_of(20) == 497
