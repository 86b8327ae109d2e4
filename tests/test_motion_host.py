"""Motion Cache in a real ComfyUI."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowcache_core.models.bundle import load_bundle
from flowcache_core.models.wan_vae import normalise
from flowcache_core.policies.multirate import Multirate
from flowcache_core.run.generate import generate
from tests.host import (
    BIDIRECTIONAL,
    CHUNKWISE,
    NEEDS_HOST,
    PACK,
    THRESHOLD,
    Graph,
    Host,
    HostJob,
    after_loader,
    error_of,
    node,
    put,
    refused,
    report_of,
    said,
    small,
    without_cache,
)

pytestmark = NEEDS_HOST


@pytest.fixture
def by_token() -> Graph:
    graph = small(json.loads((PACK / "workflows" / "api" / "motion_cache.json").read_text()), steps=50, length=33)
    return put(graph, "FlowCacheLatent", width=64, height=64)


def test_motion_cache_spends_its_share_by_token_and_repeats_bit_for_bit(host: Host, by_token: Graph) -> None:
    made = put(by_token, "RandomNoise", noise_seed=61)
    report = report_of(host, made)
    assert 0.1 < report["share"] <= 0.13 + 1e-6
    assert report["chunk_steps_refreshed"] > 0
    assert report["host_syncs"] == 1, "one look at the first output"
    assert torch.equal(host.latents(made), host.latents(put(made, "FlowCacheSampler", fps="24")))


def test_motion_cache_by_a_plan_is_the_film_of_the_core(host: Host, by_token: Graph) -> None:
    job = HostJob("red circle moves right, blue square moves down", frames=33, steps=50, seed=62, size=64)
    ours, report = generate(load_bundle(), job, Multirate())
    text = by_token[node(by_token, "CFGGuider")]["inputs"]["positive"][0]
    made = put(by_token, "RandomNoise", noise_seed=62)
    made[text]["inputs"]["text"] = job.prompt
    assert report.chunk_steps_refreshed
    theirs = normalise(host.latents(made))
    assert float((theirs - ours).square().mean()) < 1e-3, "a token whose rank is decided by rounding may be another one"


@pytest.mark.parametrize("preset", ["balanced", "turbo"])
def test_motion_cache_spends_by_token_what_the_plan_in_front_may_spend(host: Host, by_token: Graph, preset: str) -> None:
    graph = after_loader(put(by_token, "RandomNoise", noise_seed=63), CHUNKWISE, preset=preset, **THRESHOLD)
    assert "Chunkwise Cache did better with the same budget" in said(host, graph, "FlowCacheMotion")
    assert report_of(host, put(graph, "RandomNoise", noise_seed=64))["share"] == pytest.approx({"balanced": 0.4, "turbo": 0.13}[preset], abs=0.03)


def test_motion_cache_by_a_plan_behind_a_threshold_is_refused(host: Host, by_token: Graph) -> None:
    refused(host, after_loader(by_token, CHUNKWISE, preset="custom", **THRESHOLD), "preset turbo cannot refine Chunkwise Cache by a threshold, which")


@pytest.fixture
def motion() -> Graph:
    graph = small(json.loads((PACK / "workflows" / "api" / "motion_cache.json").read_text()), steps=10)
    return put(graph, "FlowCacheMotion", preset="custom")


def test_motion_cache_threshold_zero_equals_the_graph_without_the_node(host: Host, motion: Graph) -> None:
    bare = {k: v for k, v in without_cache(motion, "FlowCacheMotion").items() if v["class_type"] not in ("FlowCacheOverlay", "SaveVideo")}
    assert torch.equal(host.latents(put(motion, "FlowCacheMotion", threshold=0)), host.latents(bare))


def test_motion_cache_refreshes_in_part_and_the_overlay_shows_it(host: Host, motion: Graph) -> None:
    """The tint differs from the film, and the report names the steps that ran in part."""
    base = put(motion, "FlowCacheMotion", threshold=0.3, coarse=0.2, alpha=0.1, min_refresh=0.0, full_share=1.0)
    frames = {k: v for k, v in base.items() if v["class_type"] not in ("CreateVideo", "SaveVideo")}
    overlay = node(frames, "FlowCacheOverlay")
    for name, source in (("overlay", [overlay, 0]), ("mask", [overlay, 1])):
        frames[name] = {"class_type": "PreviewImage", "inputs": {"images": source}}
    done = host.run(put(after_loader(frames, "FlowCacheChunkwise", threshold=0.3, warmup_steps=2, max_reuse=8, signature="latent",
                                     replay="velocity", order=1, start_percent=0.0, end_percent=1.0), "FlowCacheLatent", length=9))  # fmt: skip
    assert done["status"]["status_str"] == "success", error_of(done)
    assert "in part" in json.dumps(done["outputs"][node(frames, "FlowCacheReport")]["text"])
    assert len(done["outputs"]["overlay"]["images"]) == len(done["outputs"]["mask"]["images"]) == 9


def test_the_overlay_is_of_the_film_that_it_is_given(host: Host, by_token: Graph) -> None:
    """The host keeps films of earlier prompts: one that is tinted anew has its own run's counts, though the sampler has made another since."""

    def shades(graph: Graph) -> set[int]:
        done = host.run({**graph, "mask": {"class_type": "PreviewImage", "inputs": {"images": [node(graph, "FlowCacheOverlay"), 1]}}})
        assert done["status"]["status_str"] == "success", error_of(done)
        picture = host.base / "temp" / done["outputs"]["mask"]["images"][-1]["filename"]
        return set(np.asarray(Image.open(picture))[..., 0].ravel().tolist())

    frames = {k: v for k, v in by_token.items() if v["class_type"] not in ("CreateVideo", "SaveVideo")}
    made = put(put(frames, "RandomNoise", noise_seed=65), "FlowCacheSampler", fps="24")
    first = shades(made)
    assert shades(without_cache(put(made, "RandomNoise", noise_seed=66), "FlowCacheMotion")) == {255}
    assert shades(put(made, "FlowCacheOverlay", opacity=0.3)) == first != {255}


@pytest.mark.parametrize("preset", ["skyreels-v2", "magi-1"])
def test_published_presets_of_motion_cache_run(host: Host, motion: Graph, preset: str) -> None:
    assert torch.isfinite(host.latents(put(motion, "FlowCacheMotion", preset=preset))).all()


def test_motion_cache_settings_that_contradict_are_refused(host: Host, motion: Graph) -> None:
    refused(host, put(motion, "FlowCacheMotion", min_refresh=0.9, full_share=0.5), r"min_refresh 0\.9 is larger than full_share 0\.5")


def test_chunks_of_one_frame_under_motion_cache_are_refused(host: Host, motion: Graph) -> None:
    refused(host, put(motion, "FlowCacheSampler", chunk_frames=1, window=9), "chunks of 1 latent frame have none")


def test_chunkwise_behind_motion_cache_is_refused(host: Host, motion: Graph) -> None:
    behind = {"class_type": "FlowCacheChunkwise", "inputs": {"model": [node(motion, "FlowCacheMotion"), 0], "threshold": 0.03, "warmup_steps": 5,
              "max_reuse": 8, "signature": "latent", "replay": "velocity", "order": 0, "start_percent": 0.0, "end_percent": 1.0}}  # fmt: skip
    refused(host, {**put(motion, "CFGGuider", model=["late", 0]), "late": behind}, "put it before Motion Cache")


def test_motion_cache_under_bidirectional_attention_is_refused(host: Host, motion: Graph) -> None:
    refused(host, put(motion, "FlowCacheSampler", attention=BIDIRECTIONAL), "Motion Cache cannot work with the attention of AR Chunk Sampler")


def test_motion_cache_refines_the_threshold_rule_of_the_share_that_a_plan_has(host: Host, motion: Graph) -> None:
    settings = {"threshold": 0.1, "warmup_steps": 5, "max_reuse": 8, "signature": "time", "replay": "velocity", "order": 1, "start_percent": 0.0,
                "end_percent": 1.0, "preset": "safe"}  # fmt: skip
    made = put(small(motion, steps=16), "RandomNoise", noise_seed=51)
    assert "target 55% of chunk-steps" in said(host, after_loader(made, CHUNKWISE, **settings), "FlowCacheMotion")
    refused(host, after_loader(made, CHUNKWISE, **settings, target="seconds"), "custom cannot refine Chunkwise Cache by a plan, which is in front")


def test_motion_cache_under_a_stock_sampler_is_refused(host: Host, motion: Graph) -> None:
    stock = {**motion, node(motion, "FlowCacheSampler"): {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}}
    for kind in ("FlowCacheReport", "FlowCacheOverlay"):
        del stock[node(stock, kind)]
    gone = [k for k, v in stock.items() if v["class_type"] == "CreateVideo" and v["inputs"]["images"][0] not in stock]
    stock = {k: v for k, v in stock.items() if k not in gone and not (v["class_type"] == "SaveVideo" and v["inputs"]["video"][0] in gone)}
    refused(host, stock, "Motion Cache works with the AR Chunk Sampler")


def test_a_second_node_of_a_kind_says_that_the_first_is_not_used(host: Host, by_token: Graph) -> None:
    bare = without_cache(put(by_token, "RandomNoise", noise_seed=67), "FlowCacheMotion")
    graph = small({k: v for k, v in bare.items() if v["class_type"] != "FlowCacheOverlay" and "verlay" not in v["_meta"]["title"]})
    loader = node(graph, "FlowCacheLoadModel")
    graph["first"] = {"class_type": CHUNKWISE, "inputs": {"model": [loader, 0], "preset": "balanced", **THRESHOLD}}
    graph["second"] = {"class_type": CHUNKWISE, "inputs": {"model": ["first", 0], "preset": "fast", **THRESHOLD}}
    graph[node(graph, "CFGGuider")]["inputs"]["model"] = ["second", 0]
    done = host.run(graph)
    assert done["status"]["status_str"] == "success", error_of(done)
    said_by = {name: "\n".join(done["outputs"][name]["text"]) for name in ("first", "second")}
    assert "the Chunkwise Cache in front is not used" in said_by["second"]
    assert "not used" not in said_by["first"]
