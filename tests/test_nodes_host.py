"""The nodes in a real ComfyUI: needs COMFYUI_PATH (its source tree) and COMFYUI_PYTHON (its interpreter).

COMFYUI_LAUNCH may name a launcher that is run as PYTHON LAUNCH COMFYUI_PATH arguments; COMFYUI_ARGS holds more arguments.
"""

from __future__ import annotations

import copy
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.host import (
    BIDIRECTIONAL,
    NEEDS_HOST,
    WORKFLOWS,
    Graph,
    Host,
    after_loader,
    error_of,
    node,
    put,
    quick,
    refused,
    said,
    small,
    without_cache,
)

pytestmark = NEEDS_HOST


def test_all_nodes_register_with_help_on_every_input(host: Host) -> None:
    info = {k: v for k, v in host.ask("/object_info").items() if k.startswith("FlowCache")}
    assert set(info) == {
        "FlowCacheLoadModel",
        "FlowCacheLoadMagiVAE",
        "FlowCacheMagiTokens",
        "FlowCachePromptSchedule",
        "FlowCacheScheduler",
        "FlowCacheLatent",
        "FlowCacheConditionFrames",
        "FlowCacheChunkwise",
        "FlowCacheMotion",
        "FlowCachePolicy",
        "FlowCacheKVCompressor",
        "FlowCacheDevices",
        "FlowCacheSampler",
        "FlowCacheReport",
        "FlowCacheOverlay",
        "FlowCacheCompare",
        "FlowCacheSaveVideo",
    }
    for name, one in info.items():
        assert one["category"] == "FlowCache"
        assert one["description"].endswith("."), name
        plain = [key for group in ("required", "optional") for key, spec in one["input"].get(group, {}).items() if not spec[1].get("tooltip")]
        assert not [key for key in plain if key != "model"], name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_workflow_runs(host: Host, path: Path) -> None:
    done = host.run(quick(json.loads(path.read_text())))
    assert done["status"]["status_str"] == "success", error_of(done)
    assert done["outputs"]


def test_the_report_tells_what_the_run_did(host: Host, graph: Graph) -> None:
    done = host.run(put(small(graph, steps=8), "FlowCacheChunkwise", threshold=10, warmup_steps=2))
    assert done["status"]["status_str"] == "success", error_of(done)
    shown = done["outputs"][node(graph, "FlowCacheReport")]
    assert shown["images"]
    assert "computed 3 of 8 chunk-steps" in json.dumps(shown["text"])


@pytest.mark.parametrize("kind", ["json", "csv", "png"])
def test_the_report_is_written_where_the_host_writes(host: Host, graph: Graph, kind: str) -> None:
    done = host.run(put(graph, "FlowCacheReport", save=kind, filename_prefix=f"reports/{kind}"))
    assert done["status"]["status_str"] == "success", error_of(done)
    (file,) = (host.base / "output" / "reports").glob(f"{kind}_*.{kind}")
    assert file.name == f"{kind}_00001_.{kind}"
    assert f"written: reports/{file.name}" in json.dumps(done["outputs"][node(graph, "FlowCacheReport")]["text"])
    if kind == "csv":
        assert len(file.read_text().splitlines()) == 1 + 4


def test_the_same_seed_gives_the_same_latents_and_another_seed_others(host: Host, graph: Graph) -> None:
    first, other = host.latents(put(graph, "RandomNoise", noise_seed=5)), host.latents(put(graph, "RandomNoise", noise_seed=6))
    again = host.latents(put(put(graph, "RandomNoise", noise_seed=5), "FlowCacheLatent", snap="down"))
    assert first.shape == (1, 16, 3, 16, 16)
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_threshold_zero_equals_the_graph_without_the_node(host: Host, graph: Graph, cfg: float) -> None:
    guided = put(small(graph, length=21), "CFGGuider", cfg=cfg)
    assert torch.equal(host.latents(put(guided, "FlowCacheChunkwise", threshold=0)), host.latents(without_cache(guided)))


def test_another_size_and_length_works_right_after(host: Host, graph: Graph) -> None:
    host.latents(graph)
    wide = put(graph, "FlowCacheLatent", width=96, height=64, length=1.0, unit="seconds", snap="down")
    assert host.latents(wide).shape == (1, 16, 6, 8, 12)


def test_films_of_a_batch_are_different(host: Host, graph: Graph) -> None:
    two = host.latents(put(graph, "FlowCacheLatent", batch_size=2))
    assert two.shape[0] == 2
    assert not torch.allclose(two[0], two[1])


@pytest.mark.parametrize("settings", [{"solver": "euler"}, {"ar_step": 0}, {"ar_step": 1}, {"chunk_frames": 2}, {"fps": "16"}])
def test_every_setting_of_the_sampler_changes_the_film(host: Host, graph: Graph, settings: dict[str, Any]) -> None:
    base = small(graph, steps=3, length=21)
    assert not torch.equal(host.latents(put(base, "FlowCacheSampler", **settings)), host.latents(base))


def with_frames(graph: Graph, length: float = 33, **inputs: Any) -> Graph:
    """The graph with AR Video Frames In before the sampler; a picture `picture` and a clip `clip` can be connected."""
    frames = {"model": [node(graph, "FlowCacheLoadModel"), 0], "vae": [node(graph, "FlowCacheLoadModel"), 2]}
    frames |= {"latent": [node(graph, "FlowCacheLatent"), 0], **inputs}
    picture = {"width": 96, "height": 128, "batch_size": 1, "color": 0x204080}
    out = put(put(small(graph, 2, length), "FlowCacheLatent", width=64, height=64), "SamplerCustomAdvanced", latent_image=["frames", 0])
    return {
        **out,
        "frames": {"class_type": "FlowCacheConditionFrames", "inputs": frames},
        "picture": {"class_type": "EmptyImage", "inputs": picture},
        "clip": {"class_type": "EmptyImage", "inputs": {**picture, "batch_size": 22}},
    }


def given_latents(host: Host, graph: Graph) -> dict[str, Tensor]:
    """What AR Video Frames In hands on."""
    name = f"g{time.monotonic_ns()}"
    keep = {k: v for k, v in graph.items() if v["class_type"] in ("FlowCacheLoadModel", "FlowCacheLatent", "FlowCacheConditionFrames", "EmptyImage")}
    done = host.run({**keep, "save": {"class_type": "SaveLatent", "inputs": {"samples": ["frames", 0], "filename_prefix": name}}})
    assert done["status"]["status_str"] == "success", error_of(done)
    (path,) = (host.base / "output").glob(f"{name}*.latent")
    return load_file(path)


CASES = [
    ({"start": ["picture", 0]}, 1, 0),
    ({"end": ["picture", 0]}, 0, 1),
    ({"start": ["clip", 0], "history": 17, "end": ["picture", 0]}, 5, 1),
    ({"start": ["clip", 0], "history": 16}, 4, 0),
    ({"start": ["clip", 0]}, 6, 0),
]


@pytest.mark.parametrize(
    ("attention", "inputs", "prefix", "suffix"), [*(("auto", *case) for case in CASES), *((BIDIRECTIONAL, *case) for case in CASES[:3])]
)
def test_given_frames_come_out_bit_for_bit(host: Host, graph: Graph, attention: str, inputs: dict[str, Any], prefix: int, suffix: int) -> None:
    made = put(with_frames(graph, **inputs), "FlowCacheSampler", attention=attention)
    made = without_cache(made) if attention == BIDIRECTIONAL else made
    before, after = given_latents(host, made)["latent_tensor"], host.latents(made)
    assert torch.equal(after[:, :, :prefix], before[:, :, :prefix])
    assert torch.equal(after[:, :, 9 - suffix :], before[:, :, 9 - suffix :])
    assert before[:, :, :prefix].any() or not prefix
    assert not before[:, :, prefix : 9 - suffix].any()
    assert torch.isfinite(after).all()


def test_latents_can_be_gone_on_from_without_decoding(host: Host, graph: Graph) -> None:
    other = {"class_type": "FlowCacheLatent", "inputs": {**graph[node(graph, "FlowCacheLatent")]["inputs"], "length": 21, "width": 64, "height": 64}}
    first = host.run(with_frames(graph, start_latent=["other", 0], history=9) | {"other": other})
    assert first["status"]["status_str"] == "success", error_of(first)
    assert "given: 9 frames (3 latent) at the start" in json.dumps(first["outputs"]["frames"])


def test_video_to_video_with_little_denoising_stays_near_its_source(host: Host, graph: Graph) -> None:
    graph = put(graph, "FlowCacheLatent", width=64, height=64)
    source = host.latents(graph)
    sampled = [node(graph, "SamplerCustomAdvanced"), 0]
    again = {"class_type": "SamplerCustomAdvanced", "inputs": {**graph[sampled[0]]["inputs"], "latent_image": sampled, "sigmas": ["sigmas", 0]}}
    again["inputs"]["noise"] = ["noise", 0]
    noise = {"class_type": "RandomNoise", "inputs": {"noise_seed": 78}}
    error = []
    for denoise in (0.02, 0.9):
        scheduler = {"class_type": "BasicScheduler", "inputs": {**graph[node(graph, "BasicScheduler")]["inputs"], "denoise": denoise}}
        name = f"v{time.monotonic_ns()}"
        save = {"class_type": "SaveLatent", "inputs": {"samples": ["again", 0], "filename_prefix": name}}
        done = host.run({**graph, "again": again, "noise": noise, "sigmas": scheduler, "save": save})
        assert done["status"]["status_str"] == "success", error_of(done)
        (path,) = (host.base / "output").glob(f"{name}*.latent")
        error.append(float((load_file(path)["latent_tensor"] - source).abs().mean()))
    assert 0 < error[0] < error[1] / 2


def test_bidirectional_windows_run_and_make_another_film(host: Host, graph: Graph) -> None:
    base = put(put(without_cache(small(graph, 2, 69)), "FlowCacheSampler", ar_step=1), "FlowCacheLatent", width=64, height=64)
    causal, sections = host.latents(base), host.latents(put(base, "FlowCacheSampler", attention=BIDIRECTIONAL, overlap_history=9))
    assert causal.shape == sections.shape == (1, 16, 18, 8, 8)
    assert torch.isfinite(sections).all()
    assert not torch.allclose(causal, sections)


def test_one_chunk_alone_is_the_same_either_way(host: Host, graph: Graph) -> None:
    """Where there is no other chunk to look at, block-causal and bidirectional are one."""
    base = without_cache(graph)
    either = [host.latents(put(base, "FlowCacheSampler", attention=kind)) for kind in ("block-causal (KV cache)", BIDIRECTIONAL)]
    torch.testing.assert_close(*either, rtol=0.1, atol=0.1)


def test_auto_is_block_causal_for_the_bundled_model(host: Host, graph: Graph) -> None:
    base = without_cache(small(graph, length=21))
    either = [host.latents(put(base, "FlowCacheSampler", attention=kind)) for kind in ("block-causal (KV cache)", "auto")]
    assert torch.equal(*either)


def test_a_graph_of_before_the_new_inputs_still_runs(host: Host, graph: Graph) -> None:
    old = copy.deepcopy(graph)
    old[node(old, "FlowCacheSampler")]["inputs"] = {"solver": "unipc", "ar_step": 5, "chunk_frames": 0, "window": 0, "fps": "24"}
    assert torch.equal(host.latents(old), host.latents(graph))


def test_two_samplers_of_equal_settings_keep_their_own_reports(host: Host, graph: Graph) -> None:
    twice = put(graph, "RandomNoise", noise_seed=77)
    twice["s2"] = copy.deepcopy(graph[node(graph, "FlowCacheSampler")])
    twice["film2"] = copy.deepcopy(graph[node(graph, "SamplerCustomAdvanced")])
    twice["film2"]["inputs"].update(sampler=["s2", 0], sigmas=["sigmas", 0])
    scheduler = graph[node(graph, "BasicScheduler")]["inputs"]
    twice["sigmas"] = {"class_type": "BasicScheduler", "inputs": {**scheduler, "steps": 3}}
    twice["report2"] = {"class_type": "FlowCacheReport", "inputs": {"report": ["s2", 1], "latent": ["film2", 0]}}
    done = host.run(twice)
    assert done["status"]["status_str"] == "success", error_of(done)
    assert "of 4 chunk-steps" in json.dumps(done["outputs"][node(graph, "FlowCacheReport")]["text"])
    assert "of 3 chunk-steps" in json.dumps(done["outputs"]["report2"]["text"])


def test_easycache_before_chunkwise_is_refused(host: Host, graph: Graph) -> None:
    easy = after_loader(graph, "EasyCache", reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False)
    refused(host, easy, "easycache skips steps without knowing of chunks, so they cannot work together; bypass that node")


def test_easycache_after_chunkwise_is_refused(host: Host, graph: Graph) -> None:
    easy = {"class_type": "EasyCache", "inputs": {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}}
    easy["inputs"]["model"] = [node(graph, "FlowCacheChunkwise"), 0]
    refused(host, {**put(graph, "CFGGuider", model=["easy", 0]), "easy": easy}, "easycache skips steps without knowing of chunks")


def test_chunkwise_under_a_stock_sampler_is_refused(host: Host, graph: Graph) -> None:
    stock = {**graph, node(graph, "FlowCacheSampler"): {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}}
    del stock[node(graph, "FlowCacheReport")]
    host.ask("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    before = host.log.read_text().count("Requested to load HostModel")
    refused(host, put(stock, "RandomNoise", noise_seed=77), "Chunkwise Cache works with the AR Chunk Sampler")
    assert host.log.read_text().count("Requested to load HostModel") == before, "no weights are loaded for a refusal"


def test_saved_workflows_keep_their_inputs_in_order_and_new_ones_may_be_missing(host: Host, graph: Graph) -> None:
    inputs = host.ask("/object_info/FlowCacheChunkwise")["FlowCacheChunkwise"]["input"]
    saved = ["model", "threshold", "warmup_steps", "max_reuse", "signature", "replay", "order", "start_percent", "end_percent"]
    newer = ["rescale", "preset", "target", "target_share", "target_speedup", "target_seconds", "plan"]
    assert list(inputs["required"]) == saved
    assert list(inputs["optional"]) == newer
    assert list(graph[node(graph, "FlowCacheChunkwise")]["inputs"]) == [*saved, *newer]
    assert inputs["optional"]["preset"][1]["default"] == "balanced"
    assert inputs["optional"]["target"][1]["default"] == "off"
    old = copy.deepcopy(graph)
    old[node(old, "FlowCacheChunkwise")]["inputs"] = {k: graph[node(graph, "FlowCacheChunkwise")]["inputs"][k] for k in saved}
    assert torch.equal(host.latents(old), host.latents(graph)), "a saved call that names no preset means custom"


def test_a_preset_replaces_every_widget_and_the_node_says_by_what(host: Host, graph: Graph) -> None:
    named = put(small(graph, steps=12), "FlowCacheChunkwise", preset="flowcache-slow", start_percent=0.9, end_percent=0.1)
    done = host.run(named)
    assert done["status"]["status_str"] == "success", error_of(done)
    shown = "\n".join(done["outputs"][node(graph, "FlowCacheChunkwise")]["text"])
    assert "flowcache-slow: threshold 0.1, warmup_steps 5, max_reuse 1000, signature time, rescale clamped, replay residual" in shown
    assert "no polynomial was published for this model" in shown
    told = "\n".join(done["outputs"][node(graph, "FlowCacheReport")]["text"])
    (computed,) = re.findall(r"computed (\d+) of 12 chunk-steps", told)
    assert f"\n{computed} of 12 chunk-steps were to be computed" in told
    assert f"FlowCache: {computed} of 12 chunk-steps will be computed" in host.log.read_text()


@pytest.mark.parametrize("settings", [{"target": "computed share", "target_share": 0.5}, {"target": "speed-up", "target_speedup": 2.0}])
@pytest.mark.parametrize("signature", ["latent", "time"])
def test_a_target_is_met(host: Host, graph: Graph, signature: str, settings: dict[str, Any]) -> None:
    base = put(small(graph, steps=16, length=21), "FlowCacheChunkwise", signature=signature, warmup_steps=3, **settings)
    text = said(host, base, "FlowCacheReport")
    assert "computed 16 of 32 chunk-steps" in text
    assert ("the threshold lay between" if signature == "latent" else "was found") in text


def test_a_target_out_of_reach_is_refused(host: Host, graph: Graph) -> None:
    far = put(small(graph, steps=12), "FlowCacheChunkwise", target="computed share", target_share=0.1)
    refused(host, far, "a computed share of 10% cannot be reached: .* at least 6 of 12 are computed")


def test_few_steps_are_called_too_few(host: Host, graph: Graph) -> None:
    assert "of 4 steps per chunk 4 are always computed, so none can be reused" in said(
        host, put(graph, "RandomNoise", noise_seed=4), "FlowCacheReport"
    )


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ("1.0, 1.0, 0.5, 0.5, 0.0", "the noise level stays at 1 or rises, to 1, at step 1 of 4"),
        ("0.9, 0.3, 0.6, 0.0", "rises, to 0.6, at step 2 of 3"),
    ],
)
def test_noise_levels_that_do_not_fall_are_refused(host: Host, graph: Graph, levels: str, said: str) -> None:
    sigmas = {"class_type": "ManualSigmas", "inputs": {"sigmas": levels}}
    refused(host, {**put(graph, "SamplerCustomAdvanced", sigmas=["sigmas", 0]), "sigmas": sigmas}, said)
    refused(host, put(graph, "BasicScheduler", steps=1200), "1200 steps were asked for: the models tell 1000 noise levels apart, so use at most 1000")


def test_without_a_step_nothing_runs_and_no_report_of_another_run_is_shown(host: Host, graph: Graph) -> None:
    graph = put(graph, "RandomNoise", noise_seed=41)
    assert "of 4 chunk-steps" in said(host, graph, "FlowCacheReport")
    refused(host, put(graph, "BasicScheduler", denoise=0.0), "no run of this sampler made this latent.*with empty sigmas nothing runs")
    one = {"class_type": "SplitSigmas", "inputs": {"sigmas": [node(graph, "BasicScheduler"), 0], "step": 0}}
    refused(host, {**put(graph, "SamplerCustomAdvanced", sigmas=["one", 0]), "one": one}, "AR Chunk Sampler got 0 steps: set at least 1")


def test_a_report_belongs_to_its_latent_whichever_run_was_last(host: Host, graph: Graph) -> None:
    first = said(host, put(graph, "RandomNoise", noise_seed=42), "FlowCacheReport")
    assert first.split("\n")[1:] != said(host, small(graph, 3), "FlowCacheReport").split("\n")[1:]
    clean = copy.deepcopy(graph)
    clean[node(graph, "FlowCacheReport")]["inputs"]["latent"][1] = 1
    assert "of 4 chunk-steps" in said(host, clean, "FlowCacheReport"), "the predicted clean latents will do"


EMPTY = {"width": 128, "height": 128, "batch_size": 1}


@pytest.mark.parametrize(
    ("kind", "inputs", "sentence"),
    [
        ("EmptyLatentImage", EMPTY, r"needs a video latent .*got \(1, 4, 16, 16\): use Empty AR Video Latent"),
        ("EmptySD3LatentImage", EMPTY, r"needs a video latent .*got \(1, 16, 16, 16\)"),
        ("EmptyLatentAudio", {"seconds": 1.0, "batch_size": 1}, "needs a video latent"),
        ("EmptyAceStepLatentAudio", {"seconds": 1.0, "batch_size": 1}, "needs a video latent"),
        ("EmptyMochiLatentVideo", {**EMPTY, "length": 25}, "the latents have 12 channels, and those of SkyReels-V2 diffusion forcing have 16"),
        ("EmptyLTXVLatentVideo", {**EMPTY, "length": 25}, "the latents have 128 channels"),
        ("EmptyHunyuanVideo15Latent", {**EMPTY, "length": 25}, "the latents have 32 channels"),
    ],
)
def test_latents_of_another_kind_are_refused(host: Host, graph: Graph, kind: str, inputs: dict[str, Any], sentence: str) -> None:
    other = {**put(graph, "SamplerCustomAdvanced", latent_image=["empty", 0]), "empty": {"class_type": kind, "inputs": inputs}}
    refused(host, other, sentence)


def test_latents_of_film_and_sound_together_are_refused(host: Host, graph: Graph) -> None:
    sound = {"class_type": "EmptyLatentAudio", "inputs": {"seconds": 1.0, "batch_size": 1}}
    both = {"class_type": "LTXVConcatAVLatent", "inputs": {"video_latent": [node(graph, "FlowCacheLatent"), 0], "audio_latent": ["sound", 0]}}
    refused(host, {**put(graph, "SamplerCustomAdvanced", latent_image=["both", 0]), "both": both, "sound": sound}, "needs a video latent")


def test_empty_latents_of_the_same_kind_run_and_their_size_is_told(host: Host, graph: Graph) -> None:
    same = {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 64, "height": 96, "length": 13, "batch_size": 1}}
    done = host.run({**put(put(graph, "SamplerCustomAdvanced", latent_image=["same", 0]), "RandomNoise", noise_seed=43), "same": same})
    assert done["status"]["status_str"] == "success", error_of(done)
    assert "a film of 13 frames, 64 x 96 pixels" in host.log.read_text()
    assert "the last chunk has 1 latent frame, not 3 as in training" in json.dumps(done["outputs"][node(graph, "FlowCacheReport")]["text"])


def test_split_noise_levels_are_refused(host: Host, graph: Graph) -> None:
    split = {"class_type": "SplitSigmas", "inputs": {"sigmas": [node(graph, "BasicScheduler"), 0], "step": 2}}
    refused(host, {**put(graph, "SamplerCustomAdvanced", sigmas=["split", 0]), "split": split}, "needs noise levels that end in 0")


def test_chunkwise_under_bidirectional_attention_is_refused(host: Host, graph: Graph) -> None:
    sentence = (
        r"Chunkwise Cache cannot work with the attention of AR Chunk Sampler.*set attention to block-causal \(KV cache\), or bypass Chunkwise Cache; "
        "or use Chunkwise Cache with preset safe, balanced, fast or turbo, which skip whole rows"
    )
    refused(host, put(graph, "FlowCacheSampler", attention=BIDIRECTIONAL), sentence)
    refused(host, put(put(graph, "FlowCacheSampler", attention=BIDIRECTIONAL), "FlowCacheChunkwise", preset="flowcache-slow"), sentence)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"start": ["clip", 0], "length": 9}, "6 of 3 latent frames are given: at least one must be left to generate"),
        ({}, "was given nothing: connect start, end or start_latent"),
        ({"start": ["picture", 0], "start_latent": ["1", 0]}, "was given both start and start_latent"),
    ],
)
def test_frames_that_do_not_fit_are_refused(host: Host, graph: Graph, inputs: dict[str, Any], sentence: str) -> None:
    if "start_latent" in inputs:
        inputs = {**inputs, "start_latent": [node(graph, "FlowCacheLatent"), 0]}
    refused(host, with_frames(graph, **inputs), sentence)


def test_a_mask_within_the_picture_is_refused_before_weights_move(host: Host, graph: Graph) -> None:
    host.ask("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1)
    masked = put(graph, "SamplerCustomAdvanced", latent_image=["masked", 0])
    masked["half"] = {"class_type": "SolidMask", "inputs": {"value": 0.5, "width": 128, "height": 128}}
    latent = {"samples": [node(graph, "FlowCacheLatent"), 0], "mask": ["half", 0]}
    masked["masked"] = {"class_type": "SetLatentNoiseMask", "inputs": latent}
    loads = host.log.read_text().count("HostModel")
    refused(host, masked, "the noise mask keeps a part of latent frame 0: whole frames are kept or generated")
    assert host.log.read_text().count("HostModel") == loads, "the host says so when it loads a model"


def test_chunkwise_settings_that_contradict_are_refused(host: Host, graph: Graph) -> None:
    refused(host, put(graph, "FlowCacheChunkwise", start_percent=0.9, end_percent=0.1), r"start_percent 0\.9 lies after end_percent 0\.1")


def test_a_refused_run_leaves_the_host_able_to_run(host: Host, graph: Graph) -> None:
    refused(host, put(small(graph, length=21), "FlowCacheSampler", window=1, ar_step=0), "2 chunks do not fit a window of 1 at ar_step 0")
    assert torch.isfinite(host.latents(graph)).all()


def test_an_interrupted_run_leaves_the_next_one_right(host: Host, graph: Graph) -> None:
    base = small(graph)
    before = host.latents(base)
    host.interrupt(put(small(graph, steps=400, length=57), "RandomNoise", noise_seed=9), after=5)
    assert torch.equal(host.latents(base), before)
