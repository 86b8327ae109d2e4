"""`bench model`: operations are those of the shapes, and what is asked for is checked before anything is made."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from flowcache_core.bench import model
from flowcache_core.bench.geometries import GEOMETRIES, Sized, randomise, sized
from flowcache_core.bench.model import Arm, arms_of, asked, compare, operations, profiled, times_of
from flowcache_core.models.magi import Magi, MagiConfig
from flowcache_core.models.magi_adapter import NULL_WORDS
from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from flowcache_core.policies.presets import MAGI_RULES, RULES
from flowcache_core.run.generate import Job

SMOKE = ("smoke", "smoke-magi", "smoke-causal")
MAGI = ("uncached", "flowcache-magi-slow", "motion", "balanced, kv-quarter")
"""The other arms of MAGI-1 have settings alone that differ."""
RUN = [(smoke, name) for smoke in SMOKE for name in arms_of(GEOMETRIES[smoke].family) if smoke != "smoke-magi" or name in MAGI]
SMALL = replace(GEOMETRIES["smoke"], job=Job("", 17, 2, size=32, width=48, ar_step=1, cfg=1.0))


def arguments(*texts: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    model.add_arguments(parser)
    return parser.parse_args(texts)


def test_operations_of_all_layers_follow_from_one_and_two() -> None:
    three = model._counted(sized(SMALL, 3, torch.float32, "cpu"), SMALL.job, Arm())[0]
    assert operations(SMALL, Arm(), torch.float32, "cpu") == pytest.approx((three, three), rel=1e-9)


def test_operations_are_those_of_the_formula() -> None:
    """Per token of a block: 2 x (6 d^2 + 2 d x ffn) for the products with weights, 4 d x (keys + words) for attention."""
    one, two = (model._counted(sized(SMALL, layers, torch.float32, "cpu"), SMALL.job, Arm())[0] for layers in (1, 2))
    d, ffn, words, tokens, chunk_steps = 128, 256, 16, 5 * 6, 2
    evaluations = tokens * (2 * (6 * d * d + 2 * d * ffn) + 4 * d * (tokens + words)) * chunk_steps
    text = 2 * words * 2 * d * d
    assert two - one == pytest.approx(evaluations + text, rel=1e-9)


def test_operations_are_those_of_the_formula_on_magi() -> None:
    """Per token of a layer: queries for chunks and for text, keys and values, the projection of both, the feed-forward layer; attention to both."""
    geometry = replace(GEOMETRIES["smoke-magi"], job=replace(GEOMETRIES["smoke-magi"].job, frames=24, steps=4, ar_step=1, width=48))
    one, two = (model._counted(sized(geometry, layers, torch.float32, "cpu"), geometry.job, Arm())[0] for layers in (1, 2))
    d, ffn, keys, words, tokens = 128, 256, 32, 16, 6 * 6
    linear, attention, gates = 2 * (4 * d * d + 2 * d * keys + 2 * d * ffn), 4 * d * (tokens + words), 2 * (d // 4) * 2 * d
    evaluations = 3 + 2  # in the last stage the chunk is run once more, without history
    text = 2 * (words + NULL_WORDS) * d * 2 * keys
    assert two - one == pytest.approx(evaluations * (tokens * (linear + attention) + gates) + text, rel=1e-9)


@pytest.mark.parametrize(("smoke", "name"), RUN)
def test_every_arm_runs_and_is_measured(smoke: str, name: str) -> None:
    geometry = GEOMETRIES[smoke].shortened(1)
    row = model.measure(name, sized(geometry, 1, torch.float32, "cpu"), geometry, torch.float32, torch.device("cpu"), 1e12)
    assert row["tflop"] > 0
    assert row["network_s"] >= 0
    assert row["peak_mib"] is None
    assert (row["wall_s"] is None) == (row["every"] > 1)
    whole = ("upstream", "uncached", "kv-quarter", "kv-quarter, int8", *RULES, *MAGI_RULES)
    assert (row["share_of_tokens"] == 1) == (name in whole), "the published rules compute the first steps"


@pytest.mark.parametrize("smoke", SMOKE)
def test_the_bench_runs_on_any_machine(smoke: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "ceiling", lambda *_: 1e12)
    made = model.run(arguments("--geometry", smoke, "--arms", "uncached; kv-quarter", "--dtype", "float32", "--device", "cpu", "--profile", "2"))
    assert [row["arm"] for row in made["rows"]] == ["uncached", "kv-quarter"]
    assert made["rows"][0]["speed"] == made["rows"][0]["predicted"] == 1
    assert made["fidelity"].startswith("none: the weights are random")
    assert made["rows_run"] == model.rows_run(GEOMETRIES[smoke].every)
    assert len(made["profile"]) == 2


def test_only_a_family_that_was_published_otherwise_has_an_upstream_arm() -> None:
    assert [name for name in SMOKE if "upstream" in arms_of(GEOMETRIES[name].family)] == ["smoke"]


def test_arms_are_compared_with_the_uncached_one() -> None:
    rows = [{"arm": "uncached", "network_s": 8.0, "tflop": 6.0}, {"arm": "fast", "network_s": 2.0, "tflop": 2.0}]
    compare(rows)
    assert (rows[1]["speed"], rows[1]["predicted"]) == (4.0, 3.0)
    alone = [{"arm": "fast", "network_s": 2.0, "tflop": 2.0}]
    compare(alone)
    assert "speed" not in alone[0]


def test_geometries_are_those_of_released_models_and_their_films_fit() -> None:
    titles = {name: one.family.release(one.config) for name, one in GEOMETRIES.items() if not one.smoke}
    assert titles == {
        "skyreels-1.3b": "SkyReels-V2-DF 1.3B",
        "skyreels-14b": "SkyReels-V2-DF 14B (540P and 720P have the same shapes)",
        "magi-4.5b": "MAGI-1 4.5B",
        "magi-24b": "MAGI-1 24B",
        "self-forcing": "Self-Forcing 1.3B",
        "krea-14b": "Krea Realtime 14B",
    }
    for name, geometry in GEOMETRIES.items():
        asked(arguments("--geometry", name))
        schedule = geometry.job.schedule(Sized.of(geometry))
        assert schedule.frames == schedule.chunks * geometry.layout.chunk_frames or geometry.smoke


def test_random_weights_keep_the_size_of_what_passes() -> None:
    network = SkyReelsV2(SkyReelsConfig(256, 512, 2, 64))
    randomise(network)
    x = torch.randn(1, 30, 256)
    assert 0.5 < float(network.blocks[0].ffn(x).std()) < 2  # type: ignore[operator, union-attr]
    assert torch.equal(network.blocks[0].self_attn.norm_q.weight, torch.ones(256))  # type: ignore[union-attr, arg-type]
    magi = Magi(MagiConfig(256, 512, 1, 2, 32, text_dim=64, caption=60))
    randomise(magi)
    y = magi.videodit_blocks.final_layernorm(torch.randn(1, 30, 256))
    assert 0.9 < float(y.std()) < 1.1, "its weight is stored as the distance from one"


def test_on_cuda_the_time_of_a_kernel_is_that_of_its_operator_alone() -> None:
    event = partial(FunctionEvent, use_device="cuda", stack=[])
    linear, product, kernel = event(0, "linear", 1, 0, 10), event(1, "mm", 1, 1, 9), event(2, "gemm", 1, 5, 55, device_type=DeviceType.CUDA)
    product.append_kernel("gemm", 0, 50)
    events = EventList([linear, product, kernel], use_device="cuda")
    events._build_tree()
    assert times_of(events.key_averages(), cuda=True) == {"linear": (0, 1), "mm": (50, 1)}


def test_the_profile_is_of_one_evaluation_and_names_operators_by_their_part() -> None:
    rows = profiled(sized(SMALL, 1, torch.float32, "cpu"), SMALL.job, 3)
    assert len(rows) == 3
    assert rows[0]["part"] >= rows[1]["part"] >= rows[2]["part"] > 0
    every = {row["operator"]: row["calls"] for row in profiled(sized(SMALL, 2, torch.float32, "cpu"), SMALL.job, 100)}
    assert every["aten::gelu"] == 2, "one a layer"


@pytest.mark.parametrize(("texts", "sentence"), [
    (("--layers", "99"), "99 layers were asked for: smoke has 3"),
    (("--frames", "34"), "34 frames"),
    (("--every", "0"), "every 0 rows were asked for: 1 runs all of them"),
    (("--geometry", "smoke-causal", "--steps", "3"), "was distilled on 4 noise levels"),
    (("--geometry", "smoke-magi", "--steps", "6"), "6 steps do not divide: use 4 or 8"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_made(texts: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        asked(arguments(*texts))


def test_the_commands_of_the_page_are_ones_that_can_be_given() -> None:
    page = (Path(__file__).parent.parent / "docs" / "gpu.md").read_text()
    commands = [shlex.split(line, comments=True) for line in page.splitlines() if " bench model --geometry" in line and line.startswith("python ")]
    assert len(commands) == 5
    for words in commands:
        *texts, json, _ = words[words.index("model") + 1 :]
        assert json == "--json"
        args = arguments(*texts)
        arms = arms_of(asked(args).family)
        assert all(name in arms for name in filter(None, args.arms.split("; ")))


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"smoke has no arm x: choose from upstream; uncached; "):
        model.run(arguments("--arms", "x"))


def test_a_picture_need_not_be_square() -> None:
    bundle = Sized.of(SMALL)
    assert Job("", 21, size=32, width=48).noise(bundle).shape == (1, 16, 6, 4, 6)
    assert Job("", 21, size=32).noise(bundle).shape == (1, 16, 6, 4, 4)
    with pytest.raises(ValueError, match="a picture of 40 pixels does not fit: use a multiple of 16, such as 32"):
        Job("", 21, size=32, width=40).schedule(bundle)
