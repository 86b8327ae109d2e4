"""MAGI-1 in a real ComfyUI: the bundled tiny model, files of random networks, and what is refused before anything runs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowcache_core.models.bundle import files_of, load_bundle
from flowcache_core.models.magi import MagiConfig
from flowcache_core.models.magi_family import MAGI, MAGI_DISTILLED
from flowcache_core.models.magi_vae import normalise
from flowcache_core.run.generate import Job, generate
from tests.host import NEEDS_HOST, PACK, Graph, Host, after_loader, error_of, inside, node, put, refused, report_of, said, with_nodes, without_cache
from tests.test_magi_checkpoint import fp8_of
from tests.tiny_magi import tiny_magi

pytestmark = NEEDS_HOST

SMALL = MagiConfig(64, 96, 3, 1, head_dim=32, text_dim=256, caption=60)
CHANNELS = SMALL.text_dim
SHARDS = "shards-00001-of-00002.safetensors", "shards-00002-of-00002.safetensors"
TEXTS = '''
"""Texts as the host's encoders of T5 give them, without T5."""
import torch

class Changed:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "change", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"conditioning": ("CONDITIONING",), "how": ("STRING", {{}})}}}}

    def change(self, conditioning, how):
        (text, extra), = conditioning
        junk = torch.full((1, 7, text.shape[2]), 3.0)
        if how == "masked":
            mask = torch.tensor([[1] * text.shape[1] + [0] * 7])
            return [[torch.cat([text, junk], 1), {{**extra, "attention_mask": mask}}]],
        if how == "long":
            return [[text.repeat(1, 26, 1), extra]],
        if how == "pooled":
            return [[text, {{**extra, "pooled_output": torch.zeros(1, 8)}}]],
        if how == "zeros":
            return [[torch.cat([text, torch.zeros(1, 500, text.shape[2])], 1), extra]],
        return [[text[..., :100], extra]],

NODE_CLASS_MAPPINGS = {{"Changed": Changed}}
'''


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("comfy")
    for folder in ("models/diffusion_models", "models/vae", "models/text_encoders", "models/loras"):
        (base / folder).mkdir(parents=True)
    models, weights = base / "models" / "diffusion_models", tiny_magi(SMALL).state_dict()
    save_file(weights, models / "silent.safetensors")
    save_file(weights, models / "base.safetensors", {"architecture": MAGI.name})
    save_file(weights, models / "distilled.safetensors", {"architecture": MAGI_DISTILLED.name})
    save_file(fp8_of(weights, last=2), models / "fp8.safetensors", {"architecture": MAGI.name})
    for n, name in enumerate(SHARDS):
        save_file({key: weights[key] for key in sorted(weights)[n::2]}, models / name, {"architecture": MAGI.name})
    q = "videodit_blocks.layers.0.self_attention.linear_qkv.q"
    lora = {f"diffusion_model.{q}.lora_{part}.weight": torch.randn(shape) for part, shape in (("up", (64, 2)), ("down", (2, 64)))}
    save_file(lora, base / "models" / "loras" / "q.safetensors")
    shutil.copy(files_of(MAGI)[1], base / "models" / "vae" / "magi.safetensors")
    shutil.copy(files_of()[1], base / "models" / "vae" / "wan.safetensors")
    rows = np.random.default_rng(0).standard_normal((100, CHANNELS))
    np.savez(base / "models" / "text_encoders" / "special_tokens.npz", caption_token=rows[:1], logo_token=rows[1:2], other_tokens=rows)
    with with_nodes(base, TEXTS.format(), ("--fp32-unet", "--fp32-vae")) as running:
        yield running


@pytest.fixture
def graph() -> Graph:
    """The shipped workflow, two chunks of 64 x 64 pixels in four steps, guided as published, without a cache."""
    whole: Graph = json.loads((PACK / "workflows" / "api" / "magi_text_to_video.json").read_text())
    published = put(put(whole, "FlowCacheScheduler", steps=4), "CFGGuider", cfg=7.5)
    return sized(without_cache(put(published, "RandomNoise", noise_seed=7)))


def sized(graph: Graph, length: int = 48, width: int = 64, height: int = 64) -> Graph:
    return put(graph, "FlowCacheLatent", length=length, width=width, height=height)


def loading(graph: Graph, name: str, family: str = "auto") -> Graph:
    """The graph with another model; text encoder and VAE stay those of the bundled one."""
    old, model = node(graph, "FlowCacheLoadModel"), {"class_type": "FlowCacheLoadModel", "inputs": {"model_name": name, "family": family}}
    out = {key: {**one, "inputs": {k: ["model", 0] if v == [old, 0] else v for k, v in one["inputs"].items()}} for key, one in graph.items()}
    return {**out, "model": model}


def texts(graph: Graph, kind: str, **inputs: Any) -> Graph:
    """The graph with one more node between the prompt and the guider."""
    prompt = node(graph, "CLIPTextEncode")
    out = put(graph, "CFGGuider", positive=["text", 0])
    return {**out, "text": {"class_type": kind, "inputs": {"conditioning": [prompt, 0], **inputs}}}


def cached(graph: Graph, kind: str = "FlowCacheChunkwise", **inputs: Any) -> Graph:
    """The shipped workflow's cache, or another one, behind the loader."""
    shipped: Graph = json.loads((PACK / "workflows" / "api" / "magi_long_film.json").read_text())
    settings = {key: value for key, value in shipped[node(shipped, kind)]["inputs"].items() if key != "model"}
    return after_loader(graph, kind, **{**settings, **inputs})


def with_frames(graph: Graph, images: int = 1, **inputs: Any) -> Graph:
    """The graph with AR Video Frames In before the sampler, given so many grey images."""
    loader, latent = node(graph, "FlowCacheLoadModel"), node(graph, "FlowCacheLatent")
    frames = {"model": [loader, 0], "vae": [loader, 2], "latent": [latent, 0], "start": ["images", 0], "history": 0, **inputs}
    return {
        **put(graph, "SamplerCustomAdvanced", latent_image=["frames", 0]),
        "images": {"class_type": "EmptyImage", "inputs": {"width": 96, "height": 64, "batch_size": images, "color": 0x204080}},
        "frames": {"class_type": "FlowCacheConditionFrames", "inputs": {key: value for key, value in frames.items() if value is not None}},
    }


def given(host: Host, graph: Graph, source: str) -> torch.Tensor:
    """The latents that a node puts out."""
    name = f"g{time.monotonic_ns()}"
    done = host.run({**graph, "kept": {"class_type": "SaveLatent", "inputs": {"samples": [source, 0], "filename_prefix": name}}})
    assert done["status"]["status_str"] == "success", error_of(done)
    (path,) = (host.base / "output").glob(f"{name}*.latent")
    return load_file(path)["latent_tensor"]


def test_the_film_is_that_of_the_core_from_either_scheduler(host: Host, graph: Graph) -> None:
    film = host.latents(graph)
    prompt = graph[node(graph, "CLIPTextEncode")]["inputs"]["text"]
    job = Job(prompt, frames=48, steps=4, seed=7, size=64, cfg=7.5, ar_step=1, shift=3.0, solver="euler", addnoise=0)
    alone, _ = generate(load_bundle(family=MAGI), job)
    assert film.shape == alone.shape == (1, 16, 12, 8, 8)
    torch.testing.assert_close(normalise(film), alone, atol=2e-3, rtol=2e-3)
    stock = put(graph, "SamplerCustomAdvanced", sigmas=["stock", 0])
    basic = {"model": [node(graph, "FlowCacheLoadModel"), 0], "scheduler": "simple", "steps": 4, "denoise": 1.0}
    torch.testing.assert_close(host.latents({**stock, "stock": {"class_type": "BasicScheduler", "inputs": basic}}), film, atol=2e-3, rtol=2e-3)


def test_cfg_counts_and_what_is_connected_to_negative_does_not(host: Host, graph: Graph) -> None:
    film = host.latents(graph)
    assert not torch.equal(host.latents(put(graph, "CFGGuider", cfg=4.0)), film)
    other = {"class_type": "CLIPTextEncode", "inputs": {**graph[node(graph, "CLIPTextEncode")]["inputs"], "text": "blue square"}}
    assert torch.equal(host.latents({**put(graph, "CFGGuider", negative=["other", 0]), "other": other}), film)
    assert "the negative prompt is not read" in host.log.read_text()
    alone = {"class_type": "BasicGuider", "inputs": {"model": graph[node(graph, "CFGGuider")]["inputs"]["model"], "conditioning": ["2", 0]}}
    basic = put(graph, "SamplerCustomAdvanced", guider=["alone", 0])
    assert torch.equal(host.latents({**basic, "alone": alone}), host.latents(put(graph, "CFGGuider", cfg=1.0)))


def test_cached_twice_and_another_size_the_second_time(host: Host, graph: Graph) -> None:
    made = cached(put(graph, "FlowCacheScheduler", steps=8))
    film = host.latents(made)
    assert torch.isfinite(film).all()
    assert host.latents(sized(made, 72, 96, 64)).shape == (1, 16, 18, 8, 12)
    assert torch.equal(host.latents(put(made, "FlowCacheLatent", snap="down")), film)
    assert not torch.equal(film, host.latents(put(graph, "FlowCacheScheduler", steps=8)))
    report = report_of(host, made)
    assert report["chunk_steps"] == 16
    assert report["chunk_steps_computed"] < 16


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("FlowCacheMotion", {}), ("FlowCacheKVCompressor", {"budget": 1.5}), ("FlowCacheChunkwise", {"preset": "custom", "threshold": 0.3}),
     ("FlowCacheChunkwise", {"preset": "flowcache-magi-fast"})],
)  # fmt: skip
def test_every_cache_works(host: Host, graph: Graph, kind: str, settings: dict[str, Any]) -> None:
    film = host.latents(cached(sized(put(graph, "FlowCacheScheduler", steps=8), 96), kind, **settings))
    assert film.shape == (1, 16, 24, 8, 8)
    assert torch.isfinite(film).all()


def test_an_interrupted_run_leaves_the_next_one_right(host: Host, graph: Graph) -> None:
    film = host.latents(graph)
    host.interrupt(sized(put(put(graph, "FlowCacheScheduler", steps=400), "RandomNoise", noise_seed=8), 96), after=3)
    assert torch.equal(host.latents(graph), film)


def test_an_image_stands_for_four_frames_and_is_kept(host: Host, graph: Graph) -> None:
    made = with_frames(graph)
    assert "given: 4 frames (1 latent) at the start" in said(host, made, "FlowCacheConditionFrames")
    source, film = given(host, made, "frames"), host.latents(made)
    torch.testing.assert_close(film[:, :, :1], source[:, :, :1], atol=1e-5, rtol=1e-5)
    assert source[:, :, :1].abs().sum() > 0
    assert not torch.equal(film, host.latents(graph))


def test_a_clip_goes_on_from_its_last_frames(host: Host, graph: Graph) -> None:
    made = with_frames(sized(graph, 72), 40, history=33)
    assert "given: 32 frames (8 latent) at the start" in said(host, made, "FlowCacheConditionFrames")
    film = host.latents(made)
    torch.testing.assert_close(film[:, :, :8], given(host, made, "frames")[:, :, :8], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(film).all()


def test_a_film_is_made_of_a_film(host: Host, graph: Graph) -> None:
    """At denoise 0.5, four of eight steps; nearer to the film than one from noise."""
    loader = node(graph, "FlowCacheLoadModel")
    made = {
        **put(put(graph, "FlowCacheScheduler", denoise=0.5), "SamplerCustomAdvanced", latent_image=["encoded", 0]),
        "images": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 48, "color": 0x204080}},
        "encoded": {"class_type": "VAEEncode", "inputs": {"pixels": ["images", 0], "vae": [loader, 2]}},
    }
    film, source = host.latents(made), given(host, made, "encoded")
    assert film.shape == source.shape == (1, 16, 12, 8, 8)
    assert (film - source).square().mean() < (host.latents(graph) - source).square().mean()
    odd = put(made, "EmptyImage", batch_size=49)
    refused(host, odd, "49 frames are not 4n: use 48 or 52")


def test_the_saved_film_is_the_film_decoded_whole(host: Host, graph: Graph) -> None:
    """Bit for bit, piece by piece; decoded in the host's tiles it is near; the loader of the VAE alone gives the same."""
    film, vae = (
        {"samples": [node(graph, "SamplerCustomAdvanced"), 0]},
        {"class_type": "FlowCacheLoadMagiVAE", "inputs": {"vae_name": "magi.safetensors"}},
    )
    saving = {"filename_prefix": "video/magi", "fps": 24.0, "crf": 19, "images_out": True, **film, "vae": ["vae", 0]}
    graph = put(graph, "VAEDecode", vae=["vae", 0])
    tiles = {**film, "vae": ["vae", 0], "tile_size": 64, "overlap": 16, "temporal_size": 24, "temporal_overlap": 8}
    compare = {"film": ["stream", 1], "reference": [node(graph, "VAEDecode"), 0], "name": "stream", "difference": 4.0}
    tiled = {**compare, "film": ["tiles", 0], "name": "tiles"}
    done = host.run({
        **graph, "vae": vae, "stream": {"class_type": "FlowCacheSaveVideo", "inputs": saving},
        "tiles": {"class_type": "VAEDecodeTiled", "inputs": tiles},
        "compare": {"class_type": "FlowCacheCompare", "inputs": compare}, "compare tiles": {"class_type": "FlowCacheCompare", "inputs": tiled},
    })  # fmt: skip
    assert done["status"]["status_str"] == "success", error_of(done)
    assert "stream is equal to the reference in every pixel of 48 frames of 64 x 64" in done["outputs"]["compare"]["text"][0]
    assert "48 frames" in done["outputs"]["compare tiles"]["text"][0]
    assert "joints" not in "\n".join(done["outputs"]["stream"]["text"])
    assert "No VAE weights detected" not in host.log.read_text()


def test_files_whole_sharded_fp8_and_with_a_lora(host: Host, graph: Graph) -> None:
    film = host.latents(loading(graph, "base.safetensors"))
    torch.testing.assert_close(host.latents(loading(graph, SHARDS[1])), film, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(host.latents(loading(graph, "silent.safetensors", MAGI.name)), film, atol=1e-2, rtol=1e-3)
    fp8 = host.latents(loading(graph, "fp8.safetensors"))
    assert 0 < (fp8 - film).square().mean() < 0.2 * film.square().mean()
    lora = {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["model", 0], "lora_name": "q.safetensors", "strength_model": 1.0}}
    wired = {**put(loading(graph, "base.safetensors"), "CFGGuider", model=["lora", 0]), "lora": lora}
    assert not torch.equal(host.latents(wired), film)


BANDS = """
import pathlib
import comfy.model_management
from comfy.cli_args import args

args.fp32_unet, args.bf16_unet = False, True
bands = []
for name in ("plain", "fp8"):
    for static in (True, False):
        model = node("patcher").load(pathlib.Path(base, name + ".safetensors"), name, "magi-1", static)
        comfy.model_management.load_models_gpu([model])
        network = model.model.diffusion_model
        bands.append([str(network.x_embedder.weight.dtype), network.rope.bands.tolist()])
print(json.dumps(bands))
"""


def test_rotary_bands_stay_in_float32_where_the_rest_is_computed_in_16_bits(tmp_path: Path) -> None:
    bands = torch.tensor([0.95, 0.31, 0.123, 0.0111])
    weights = {**tiny_magi(SMALL).state_dict(), "rope.bands": bands}
    save_file(weights, tmp_path / "plain.safetensors")
    save_file(fp8_of(weights, last=2), tmp_path / "fp8.safetensors")
    assert inside(tmp_path, BANDS) == [["torch.bfloat16", bands.tolist()]] * 4


def test_base_and_distilled_are_never_mistaken(host: Host, graph: Graph) -> None:
    one = put(graph, "CFGGuider", cfg=1.0)
    distilled = host.latents(loading(one, "distilled.safetensors"))
    assert not torch.equal(distilled, host.latents(loading(one, "base.safetensors")))
    torch.testing.assert_close(host.latents(loading(one, "silent.safetensors", MAGI_DISTILLED.name)), distilled, atol=1e-2, rtol=1e-3)
    refused(
        host, loading(graph, "silent.safetensors"), "could be MAGI-1 or MAGI-1 distilled, which have the same shapes: choose one in the input family"
    )
    refused(host, loading(graph, "base.safetensors", MAGI_DISTILLED.name), "says that it is MAGI-1, and the input family that it is MAGI-1 distilled")
    refused(host, loading(graph, "distilled.safetensors", MAGI.name), "says that it is MAGI-1 distilled, and the input family that it is MAGI-1:")
    refused(host, loading(graph, "distilled.safetensors"), "guidance is trained into MAGI-1 distilled, and cfg 7.5 would change nothing")
    basic = {"model": ["model", 0], "scheduler": "simple", "steps": 12, "denoise": 1.0}
    even = {**put(loading(one, "distilled.safetensors"), "SamplerCustomAdvanced", sigmas=["even", 0])}
    refused(host, {**even, "even": {"class_type": "BasicScheduler", "inputs": basic}}, "told how long its steps are.*12 steps of its shortcut")


def test_special_tokens_and_padding(host: Host, graph: Graph) -> None:
    film = host.latents(graph)
    assert torch.equal(host.latents(texts(graph, "Changed", how="masked")), film)
    tokens = {"file": "special_tokens.npz", "quality": True, "duration": True, "motion": "none", "style": "none", "border": False}
    told = texts(graph, "FlowCacheMagiTokens", **tokens)
    assert "in front: chunks to come, hq; 34 tokens of text in all" in said(host, told, "FlowCacheMagiTokens")
    counted = host.latents(told)
    quiet = host.latents(texts(graph, "FlowCacheMagiTokens", **{**tokens, "duration": False}))
    assert not torch.equal(counted, film)
    assert not torch.equal(counted, quiet)
    padded = texts(graph, "FlowCacheMagiTokens", **tokens)
    padded["text"]["inputs"]["conditioning"] = ["padded", 0]
    padded["padded"] = {"class_type": "Changed", "inputs": {"conditioning": [node(graph, "CLIPTextEncode"), 0], "how": "masked"}}
    assert torch.equal(host.latents(padded), counted)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [("long", "the text has 832 tokens, and MAGI-1 reads at most 800: shorten the prompt by 32"), ("narrow", "the text has 100 channels.*takes 256"),
     ("pooled", "loaded as a type that pads prompts"), ("zeros", "ends in rows of zeros, as umT5 pads it")],
)  # fmt: skip
def test_texts_that_it_cannot_read_are_refused(host: Host, graph: Graph, how: str, sentence: str) -> None:
    refused(host, texts(graph, "Changed", how=how), sentence)


@pytest.mark.parametrize(
    ("kind", "inputs", "sentence"),
    [
        ("FlowCacheScheduler", {"steps": 50}, "MAGI-1 goes through its steps in 4 stages of equal length, and 50 steps do not divide: use 48 or 52"),
        ("FlowCacheLatent", {"snap": "off", "length": 57}, "MAGI-1 makes whole chunks of 24 frames, and 56 do not divide: use 48 or 72"),
        ("FlowCacheSampler", {"ar_step": 3}, "MAGI-1 denoises at most 4 chunks together.*use ar_step 1"),
        ("FlowCacheSampler", {"attention": "bidirectional (as trained)"}, "use block-causal attention"),
        ("FlowCacheSampler", {"fps": "16"}, "fps 16 would change nothing"),
    ],
)
def test_settings_that_it_was_not_trained_for_are_refused(host: Host, graph: Graph, kind: str, inputs: dict[str, Any], sentence: str) -> None:
    refused(host, put(graph, kind, **inputs), sentence)


def test_given_frames_that_it_was_not_trained_for_are_refused(host: Host, graph: Graph) -> None:
    refused(host, with_frames(graph, start=None, end=["images", 0]), "was not trained with given last frames")
    refused(host, with_frames(graph, 3), "3 frames do not fill a latent frame, which has 4: give at least 4, or one image")
    noisy = put(with_frames(graph), "FlowCacheSampler", addnoise_condition=20)
    refused(host, noisy, "addnoise_condition 20 lays noise on the 1 given latent frames, and MAGI-1 was trained with clean ones")


def test_parts_of_two_families_in_one_graph_are_refused(host: Host, graph: Graph) -> None:
    sky = {"class_type": "FlowCacheLoadModel", "inputs": {"model_name": "tiny-skyreels (bundled)"}}
    refused(host, {**with_frames(graph, vae=["sky", 2]), "sky": sky}, "this VAE makes 17 frames of 5 latent frames, and that of MAGI-1 makes 20")
    refused(host, {**with_frames(graph, model=["sky", 0]), "sky": sky}, "these latents are of MAGI-1, and the model is SkyReels-V2")
    film = {"samples": [node(graph, "SamplerCustomAdvanced"), 0], "vae": ["sky", 2]}
    saving = {"filename_prefix": "video/mixed", "fps": 24.0, "crf": 19, "images_out": False, **film}
    refused(host, {**graph, "sky": sky, "stream": {"class_type": "FlowCacheSaveVideo", "inputs": saving}}, "Save AR Video: this VAE makes 17 frames")
    other = {"model": ["sky", 0], "width": 64, "height": 64, "length": 33, "unit": "frames", "snap": "nearest", "batch_size": 1}
    latent = {"class_type": "FlowCacheLatent", "inputs": other}
    refused(
        host, {**put(graph, "SamplerCustomAdvanced", latent_image=["latent", 0]), "sky": sky, "latent": latent}, "makes whole chunks of 24 frames"
    )
    refused(host, {"vae": {"class_type": "FlowCacheLoadMagiVAE", "inputs": {"vae_name": "wan.safetensors"}},
                   "look": {"class_type": "PreviewAny", "inputs": {"source": ["vae", 0]}}}, "wan.safetensors: this is not a MAGI-1 VAE")  # fmt: skip
    loaded = {"class_type": "FlowCacheLoadModel", "inputs": {"model_name": "tiny-magi (bundled)"}}
    tokens = {"file": "special_tokens.npz", "quality": True, "duration": True, "motion": "none", "style": "none", "border": False}
    told = texts(graph, "FlowCacheMagiTokens", **tokens)
    mixed = put(put(told, "FlowCacheLatent", model=["sky", 0], length=33), "CFGGuider", model=["sky", 0])
    mixed = put(put(mixed, "FlowCacheScheduler", model=["sky", 0]), "SamplerCustomAdvanced")
    refused(host, {**mixed, "sky": sky, "other": loaded}, "MAGI Special Tokens says how many chunks are to come, which SkyReels-V2")


def test_nodes_that_combine_texts_are_refused_by_name(host: Host, graph: Graph) -> None:
    rescaled = after_loader(graph, "RescaleCFG", multiplier=0.7)
    refused(host, put(rescaled, "CFGGuider", model=["extra", 0]), "RescaleCFG changes how texts are combined, and MAGI-1 does that inside the run")


def test_weights_do_not_move_for_what_is_refused(host: Host, graph: Graph) -> None:
    host.ask("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    before = host.log.read_text().count("Requested to load HostModel")
    assert before
    refused(host, put(graph, "FlowCacheScheduler", steps=6), "6 steps do not divide")
    assert host.log.read_text().count("Requested to load HostModel") == before


def test_the_files_of_this_test_are_where_the_host_looks(host: Host) -> None:
    nodes = host.ask("/object_info")
    assert nodes["FlowCacheMagiTokens"]["input"]["required"]["file"][1]["options"] == ["special_tokens.npz"]
    assert Path(host.base, "models", "vae", "magi.safetensors").exists()
    assert {"auto", MAGI.name, MAGI_DISTILLED.name} <= set(nodes["FlowCacheLoadModel"]["input"]["optional"]["family"][1]["options"])
