"""KV Compressor on ComfyUI's own causal model and its own sampler, in a real ComfyUI: random weights, so only equalities mean anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.named import policy_named
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.models.causal_wan import CausalWan
from flowcache_core.run.footprint import readable
from flowcache_core.run.sequential import SequentialFilm
from tests.host import NEEDS_HOST, Graph, Host, error_of, refused, said, with_nodes

pytestmark = NEEDS_HOST
KIND = "FlowCacheKVCompressor"
LAYERS, WIDTH = 2, 256
TESTS = '''
"""A causal model of random weights, references that are made another way, and what watches a run."""
import gc, json, os
import comfy.ldm.wan.model, comfy.model_management, comfy.ops, comfy.patcher_extension, comfy.sd, folder_paths
import torch

LAYERS, WIDTH = 2, 256
KINDS = comfy.patcher_extension.WrappersMP
OVERRIDE = "optimized_attention_override"


class Node:
    CATEGORY, FUNCTION, RETURN_TYPES, inputs = "tests", "run", ("MODEL",), {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": cls.inputs}


class RandomModel(Node):
    inputs = {"seed": ("INT",), "weights": ("STRING",), "causal": ("BOOLEAN",)}

    def run(self, seed, weights, causal):
        generator = torch.Generator().manual_seed(seed)
        with torch.device("cpu"):
            net = comfy.ldm.wan.model.WanModel(
                model_type="t2v", dim=WIDTH, ffn_dim=WIDTH, num_heads=WIDTH // 128, num_layers=LAYERS, in_dim=16, out_dim=16, text_dim=4096,
                dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
        scale = lambda k, v: 1.5 if "norm" in k else 0.2 if v.ndim == 1 else v[0].numel() ** -0.5
        sd = {k: torch.randn(v.shape, generator=generator) * scale(k, v) for k, v in net.state_dict().items()}
        if weights != "float32":
            sd = {k: v.to(torch.float8_e4m3fn).float() for k, v in sd.items()}
        options = {"dtype": torch.float8_e4m3fn if weights == "fp8" else torch.float32}
        metadata = {"config": json.dumps({"transformer": {"causal_ar": True}})} if causal else None
        return (comfy.sd.load_diffusion_model_state_dict(sd, model_options=options, metadata=metadata),)


class RandomText(Node):
    RETURN_TYPES, inputs = ("CONDITIONING",), {"seed": ("INT",), "tokens": ("INT",)}

    def run(self, seed, tokens):
        return ([[torch.randn(1, tokens, 4096, generator=torch.Generator().manual_seed(seed)), {}]],)


class StartFrame(Node):
    """As ARVideoI2V sets it, without a VAE."""

    inputs = {"model": ("MODEL",), "side": ("INT",)}

    def run(self, model, side):
        model = model.clone()
        latent = torch.randn(1, 16, 1, side, side, generator=torch.Generator().manual_seed(3))
        model.model_options.setdefault("transformer_options", {}).setdefault("ar_config", {})["initial_latent"] = latent
        return (model,)


class Gathered(Node):
    """The host's whole KV cache, of which every block attends to the sink and the latest frames of history alone. A frame that lies farther
    back than `room` latent frames is turned by the host's own positions until it lies there."""

    inputs = {"model": ("MODEL",), "sink": ("INT",), "latest": ("INT",), "tokens": ("INT",), "room": ("INT",)}

    def run(self, model, sink, latest, tokens, room):
        model, net = model.clone(), model.model.diffusion_model
        sink, latest = sink * tokens, latest * tokens

        def patched(before):
            def forward(x, freqs, kv_cache=None, transformer_options={}):
                def gathered(func, q, k, v, heads, **kwargs):
                    history = k.shape[1] - q.shape[1]
                    near = k
                    far = history // tokens - room
                    if far > 0:
                        turn = net.rope_encode(1, 2, 2, t_start=far, device=k.device, dtype=torch.float32)
                        from comfy.ldm.flux.math import apply_rope1
                        near = apply_rope1(k.unflatten(2, (heads, -1)), turn).flatten(2)
                    if history <= sink + latest:
                        return func(q, k, v, heads=heads)
                    parts = [near[:, :sink], k[:, history - latest:]], [v[:, :sink], v[:, history - latest:]]
                    return func(q, *(torch.cat(part, 1) for part in parts), heads=heads)

                return before(x, freqs, kv_cache=kv_cache, transformer_options={OVERRIDE: gathered})

            return forward

        for layer in range(LAYERS):
            place = f"diffusion_model.blocks.{layer}.self_attn.forward"
            model.add_object_patch(place, patched(model.get_model_object(place)))
        return (model,)


class Apart(Node):
    """Every text is evaluated by itself, against whole caches of its own made by the host: two runs side by side."""

    inputs = {"model": ("MODEL",), "frames": ("INT",), "tokens": ("INT",)}

    def run(self, model, frames, tokens):
        model, net, held = model.clone(), model.model.diffusion_model, {}

        def evaluate(executor, x, t, c_concat, c_crossattn, control, options, **more):
            state, out = options["ar_state"], []
            begin, end = state["start_frame"] * tokens, (state["start_frame"] + x.shape[2]) * tokens
            parts = zip(options["cond_or_uncond"], *(one.chunk(len(options["uuids"])) for one in (x, t, c_crossattn)))
            for branch, part, level, text in parts:
                if branch not in held:
                    held[branch] = net.init_kv_caches(1, frames * tokens, x.device, torch.float32), net.init_crossattn_caches(1, x.device, None)
                caches, crossed = held[branch]
                for cache in caches:
                    cache["end"] = begin
                mine = {**options, "ar_state": {**state, "kv_caches": caches, "crossattn_caches": crossed}}
                out.append(executor(part, level, c_concat, text, control, mine, **more))
            for cache in state["kv_caches"]:
                cache["end"] = end
            return torch.cat(out)

        def outer(executor, *args, **kwargs):
            held.clear()
            return executor(*args, **kwargs)

        model.add_wrapper_with_key(KINDS.OUTER_SAMPLE, "apart", outer)
        model.add_wrapper_with_key(KINDS.APPLY_MODEL, "apart", evaluate)
        return (model,)


load_models = comfy.model_management.load_models_gpu
ESTIMATES = []


def counted_load(models, memory_required=0, **kwargs):
    ESTIMATES.append(kwargs.get("minimum_memory_required"))
    return load_models(models, memory_required=memory_required, **kwargs)


comfy.model_management.load_models_gpu = counted_load


def alive():
    """Bytes of keys and values: tensors of four dimensions whose last is a head's channels, in any dtype, views not counted."""
    found = {}
    for one in gc.get_objects():
        if torch.is_tensor(one) and one.ndim == 4 and one.shape[-1] == 128 and type(one) is torch.Tensor:
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(found.values())


class Watched(Node):
    """Writes what keys and values took, most of all and behind the run; ends the run at the evaluation `fault`, by error or interrupt."""

    inputs = {"model": ("MODEL",), "name": ("STRING",), "fault": ("INT",), "kind": ("STRING",)}

    def run(self, model, name, fault, kind):
        model, seen = model.clone(), {"most": 0, "calls": 0}

        def outer(executor, *args, **kwargs):
            seen.update(most=0, calls=0)
            before = executor.class_obj.model_options
            try:
                return executor(*args, **kwargs)
            finally:
                gc.collect()
                seen["behind"], seen["estimate"] = alive(), ESTIMATES[-1]
                seen["patched"] = executor.class_obj.model_options is not before or {"memory_required", "get_dtype"} & set(vars(model.model)) != set()
                with open(os.path.join(folder_paths.get_output_directory(), name), "w") as file:
                    json.dump(seen, file)

        def evaluate(executor, *args, **kwargs):
            seen["calls"] += 1
            if seen["calls"] == fault:
                raise comfy.model_management.InterruptProcessingException() if kind == "interrupt" else RuntimeError("a fault on purpose")
            out = executor(*args, **kwargs)
            if seen["calls"] in (2, 20):
                seen["most"] = max(seen["most"], alive())
            return out

        model.add_wrapper_with_key(KINDS.OUTER_SAMPLE, "watched", outer)
        model.add_wrapper_with_key(KINDS.APPLY_MODEL, "watched", evaluate)
        return (model,)


class Skipping(Node):
    """Leaves an evaluation out without telling anybody."""

    inputs = {"model": ("MODEL",)}

    def run(self, model):
        model, calls = model.clone(), []

        def evaluate(executor, x, *args, **kwargs):
            calls.append(1)
            return x if len(calls) == 2 else executor(x, *args, **kwargs)

        model.add_wrapper_with_key(KINDS.APPLY_MODEL, "skipping", evaluate)
        return (model,)


class OtherAttention(Node):
    inputs = {"model": ("MODEL",)}

    def run(self, model):
        model = model.clone()
        place = "diffusion_model.blocks.1.self_attn.forward"
        before = model.get_model_object(place)
        model.add_object_patch(place, lambda *args, **kwargs: before(*args, **kwargs))
        return (model,)


NODE_CLASS_MAPPINGS = {one.__name__: one for one in Node.__subclasses__()}
'''
STEPS, FRAMES, SIDE, TOKENS = 2, 12, 8, 16
"""Latent frames, latent cells along a side, tokens of a frame."""
SETTINGS = {"budget": 1000.0, "unit": "seconds", "policy": "sink-recent", "dtype": "as computed", "sink": 1, "recent": 0, "granularity": "token",
            "offload": False, "soft": 0.0}  # fmt: skip
SEVEN = {"budget": 7 / 4}
"""Latent frames, of four a second: the sink and six."""
Chain = tuple[str, dict[str, Any]]


def kv(**settings: Any) -> Chain:
    return KIND, {**SETTINGS, **settings}


def film(*chain: Chain, frames: int = FRAMES, block: int = 3, cfg: float = 1.0, texts: tuple[int, int] = (8, 12), batch: int = 1, seed: int = 0,
         weights: str = "float32", causal: bool = True, side: int = SIDE) -> Graph:  # fmt: skip
    """The host's own graph for its causal models, with nodes between the model and all that takes it."""
    graph: Graph = {
        "model": {"class_type": "RandomModel", "inputs": {"seed": seed, "weights": weights, "causal": causal}},
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}},
        "latent": {"class_type": "EmptyARVideoLatent",
                   "inputs": {"width": 8 * side, "height": 64, "length": 4 * frames - 3, "batch_size": batch}},
        "sampler": {"class_type": "SamplerARVideo", "inputs": {"num_frame_per_block": block}},
        "positive": {"class_type": "RandomText", "inputs": {"seed": 1, "tokens": texts[0]}},
        "negative": {"class_type": "RandomText", "inputs": {"seed": 2, "tokens": texts[1]}},
        "sigmas": {"class_type": "BasicScheduler", "inputs": {"model": ["model", 0], "scheduler": "simple", "steps": STEPS, "denoise": 1.0}},
    }  # fmt: skip
    last = "model"
    for number, (kind, inputs) in enumerate(chain):
        graph[f"patch{number}"] = {"class_type": kind, "inputs": {"model": [last, 0], **inputs}}
        last = f"patch{number}"
    guided = {"model": [last, 0], "positive": ["positive", 0], "negative": ["negative", 0], "cfg": cfg}
    graph["guider"] = {"class_type": "CFGGuider", "inputs": guided}
    taken = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["latent", 0]}
    graph["out"] = {"class_type": "SamplerCustomAdvanced", "inputs": taken}
    graph["end"] = {"class_type": "SaveLatent", "inputs": {"samples": ["out", 0], "filename_prefix": "end"}}
    return graph


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with with_nodes(tmp_path_factory.mktemp("comfy"), TESTS) as running:
        yield running


@pytest.fixture(scope="module")
def alone(host: Host) -> Tensor:
    """The film that the sampler makes by itself."""
    return host.latents(film())


def watched(name: str, fault: int = 0, kind: str = "") -> Chain:
    return "Watched", {"name": name, "fault": fault, "kind": kind}


def seen(host: Host, name: str) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(Path(host.base, "output", name).read_text())
    return written


def fails(host: Host, graph: Graph) -> None:
    """While it runs: it was not refused as a graph."""
    assert "execution_error" in [kind for kind, _ in host.run(graph)["status"]["messages"]]


def start(side: int = SIDE) -> Chain:
    return "StartFrame", {"side": side}


@pytest.mark.parametrize("policy", ["sink-recent", "even"])
def test_a_budget_for_everything_is_the_sampler_alone_bit_for_bit(host: Host, alone: Tensor, policy: str) -> None:
    assert alone.isfinite().all()
    assert torch.equal(host.latents(film(kv(policy=policy))), alone)


@pytest.mark.parametrize(
    ("chain", "settings"),
    [
        ((), {"block": 1, "frames": 6}),
        ((), {"frames": 11}),
        ((), {"batch": 2, "frames": 6}),
        ((start(),), {"frames": 8}),
        ((start(),), {"frames": 5, "block": 1}),
    ],
    ids=["frame by frame", "short last block", "two films", "start image", "start image, frame by frame"],
)
def test_so_it_is_however_the_film_is_cut(host: Host, chain: tuple[Chain, ...], settings: dict[str, Any]) -> None:
    assert torch.equal(host.latents(film(*chain, kv(), **settings)), host.latents(film(*chain, **settings)))


def gathered(room: int = 1000) -> Chain:
    return "Gathered", {"sink": 1, "latest": 6, "tokens": TOKENS, "room": room}


@pytest.mark.parametrize("block", [3, 1])
def test_a_budget_is_the_same_tokens_gathered_from_a_whole_cache_bit_for_bit(host: Host, alone: Tensor, block: int) -> None:
    kept = host.latents(film(kv(**SEVEN), block=block))
    assert torch.equal(kept, host.latents(film(gathered(), block=block)))
    assert not torch.equal(kept, alone)


def test_beyond_the_trained_length_the_sink_counts_as_just_within_it(host: Host) -> None:
    kept, turned, as_ever = (host.latents(film(one, frames=27)) for one in (kv(**SEVEN), gathered(18), gathered()))
    assert torch.equal(kept[:, :, :21], turned[:, :, :21])
    assert 0 < 50 * (kept - turned).abs().max() < (kept - as_ever).abs().max()


@pytest.mark.parametrize("texts", [(8, 12), (8, 8)], ids=["one after the other", "side by side"])
@pytest.mark.parametrize("settings", [{}, SEVEN], ids=["everything", "sink and recent"])
def test_guidance_is_two_runs_combined(host: Host, texts: tuple[int, int], settings: dict[str, Any]) -> None:
    apart: Chain = ("Apart", {"frames": FRAMES, "tokens": TOKENS})
    reference = host.latents(film(apart, *([gathered()] if settings else []), cfg=3.0, texts=texts))
    guided = host.latents(film(kv(**settings), cfg=3.0, texts=texts))
    if texts[0] != texts[1]:
        assert torch.equal(guided, reference)
    torch.testing.assert_close(guided, reference, rtol=1e-3, atol=1e-3)


def test_without_the_node_guidance_fails(host: Host) -> None:
    fails(host, film(cfg=3.0, texts=(8, 8)))


@pytest.mark.parametrize("dtype", ["as computed", "int8"])
def test_a_longer_film_needs_no_more_and_the_host_is_told_before(host: Host, dtype: str) -> None:
    taken = {}
    for frames in (21, 33):
        host.latents(film(watched(f"{dtype}{frames}"), kv(**SEVEN, dtype=dtype), frames=frames))
        taken[frames] = seen(host, f"{dtype}{frames}")
    planned = settled(21, dtype=dtype)
    assert taken[21]["most"] == taken[33]["most"] <= planned.kv
    assert taken[21]["estimate"] == taken[33]["estimate"] > planned.held
    assert taken[33]["behind"] == 0
    if dtype == "as computed":
        assert taken[21]["most"] == planned.budget.cache_bytes(planned.sizes, 1, 4)
        assert f"the KV cache took {readable(taken[21]['most'])} at its peak" in host.log.read_text()
        host.latents(film(watched("without"), frames=21))
        assert seen(host, "without")["most"] == planned.kv_unbounded > 2 * taken[21]["most"]


def settled(frames: int, dtype: str) -> SequentialFilm:
    compressor = Compressor(policy_named("sink-recent"), 7 / 4, "seconds", dtype=dtype)  # type: ignore[arg-type]
    network = CausalWan(LAYERS, WIDTH, WIDTH // 128)
    return SequentialFilm.settled(network, compressor, frames, 3, STEPS, (SIDE, SIDE), itemsize=4, text_tokens=8)


@pytest.mark.parametrize("policy", sorted({kind.name for kind in KV_POLICIES} - {"salience"}))
def test_every_policy_keeps_another_history(host: Host, alone: Tensor, policy: str) -> None:
    kept = host.latents(film(kv(**SEVEN, policy=policy)))
    assert kept.isfinite().all()
    assert torch.equal(kept[:, :, :9], alone[:, :, :9]), "nothing goes before there are more than seven frames of history"
    assert not torch.equal(kept[:, :, 9:], alone[:, :, 9:])


@pytest.mark.parametrize(
    ("settings", "near"),
    [({"dtype": "int8"}, 0.05), ({"dtype": "fp8"}, 0.2), ({"dtype": "int4"}, 1.0), ({"offload": True}, 0.0), ({**SEVEN, "soft": 0.2}, None),
     ({**SEVEN, "granularity": "frame"}, None)],
    ids=["int8", "fp8", "int4", "offload", "soft", "frames"],
)  # fmt: skip
def test_history_is_stored_and_chosen_as_under_our_sampler(host: Host, alone: Tensor, settings: dict[str, Any], near: float | None) -> None:
    kept = host.latents(film(kv(**settings)))
    assert kept.isfinite().all()
    if near is not None:
        assert (kept - alone).abs().mean() <= near * alone.abs().mean()


def test_salience_asks_for_a_head_of_this_size(host: Host) -> None:
    refused(host, film(kv(policy="salience")), "this head is for .* layers of .* channels .*, the model has 2 layers of 256")


def test_weights_in_fp8_are_their_rounded_values(host: Host) -> None:
    assert torch.equal(host.latents(film(kv(), weights="fp8")), host.latents(film(weights="rounded")))
    assert torch.equal(host.latents(film(start(), kv(), weights="fp8", frames=4)), host.latents(film(start(), weights="rounded", frames=4)))
    fails(host, film(weights="fp8"))


@pytest.mark.parametrize("kind", ["error", "interrupt"])
def test_a_run_that_is_ended_leaves_nothing_and_the_next_is_right(host: Host, alone: Tensor, kind: str) -> None:
    for fault in (1, 8):
        done = host.run(film(watched(kind, fault, kind), kv(**SEVEN)))
        assert done["status"]["status_str"] == "error"
        left = seen(host, kind)
        assert (left["behind"], left["patched"], left["calls"]) == (0, False, fault)
    assert torch.equal(host.latents(film()), alone)
    assert torch.equal(host.latents(film(kv(policy="even"))), alone)


def test_runs_change_each_other_in_no_way(host: Host, alone: Tensor) -> None:
    """The same model without the node, in another size, another model and the first again."""
    kept = host.latents(film(kv(**SEVEN)))
    assert torch.equal(host.latents(film()), alone)
    assert host.latents(film(kv(**SEVEN), side=12, frames=6)).shape[-1] == 12
    assert not torch.equal(host.latents(film(kv(**SEVEN), seed=1)), kept)
    again = film(kv(**SEVEN))
    again["noise"]["inputs"]["noise_seed"] = 6
    assert not torch.equal(host.latents(again), kept)
    assert torch.equal(host.latents(film(watched("again"), kv(**SEVEN))), kept)


def test_a_second_node_takes_the_place_of_the_first(host: Host) -> None:
    assert torch.equal(host.latents(film(kv(), kv(**SEVEN))), host.latents(film(kv(**SEVEN))))


EULER = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
EASY: Chain = ("EasyCache", {"reuse_threshold": 0.2, "start_percent": 0.0, "end_percent": 1.0, "verbose": False})


@pytest.mark.parametrize(
    ("graph", "sentence"),
    [
        (film(kv(budget=0.75)), r"a budget of 0\.75 seconds is 3\.0 latent frames, but history needs 4: .* use 1 seconds or more"),
        (film(kv(), side=9), "multiples of 16 pixels"),
        (film(kv(), EASY), "easycache skips steps without knowing of chunks"),
        (film(("LazyCache", EASY[1]), kv()), "lazycache skips steps without knowing of chunks"),
        (film(("TorchCompileModel", {"backend": "inductor"}), kv()), "the model goes through torch.compile"),
        (film(kv(), causal=False), "KV Compressor cannot serve a WAN21 model: .* causal model of ComfyUI's own"),
        (film(("Skipping", {}), kv()), "an evaluation was left out by a node that skips steps"),
        (film(kv(), ("OtherAttention", {})), r"diffusion_model\.blocks\.1\.self_attn\.forward of the network was replaced by OtherAttention"),
        (film(start(), kv(), batch=2), "one film at a time from a start image, not 2: set batch_size to 1"),
        (film(kv(**SEVEN), block=9), "is 7.0 latent frames, but history needs 10"),
        (
            {**film(kv()), "sampler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}},
            "works with Sampler AR Video on this model",
        ),
        (
            {
                **film(kv()),
                "latent": {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["empty", 0], "mask": ["mask", 0]}},
                "empty": film()["latent"],
                "mask": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 64}},
            },
            "Sampler AR Video cannot keep a part of the latent",
        ),
        (
            {
                **film(kv()),
                "sigmas": {"class_type": "SplitSigmas", "inputs": {"sigmas": ["all", 0], "step": 1}},
                "all": film()["sigmas"],
            },
            r"needs noise levels that end in 0, these end in 0\.[0-9]+: do not split",
        ),
    ],
    ids=["budget", "odd", "easycache", "lazycache", "compile", "not causal", "skipping", "attention", "batch", "block", "sampler", "mask", "sigmas"],
)
def test_what_cannot_work_is_refused_with_a_sentence(host: Host, graph: Graph, sentence: str) -> None:
    refused(host, graph, sentence)


def test_a_text_that_does_not_count_at_the_end_of_a_block_is_told(host: Host) -> None:
    graph = film(kv(), cfg=3.0)
    graph["early"] = {"class_type": "ConditioningSetTimestepRange", "inputs": {"conditioning": ["negative", 0], "start": 0.0, "end": 0.5}}
    graph["guider"]["inputs"]["negative"] = ["early", 0]
    refused(host, graph, "with every text of guidance")


def test_the_node_says_what_is_planned(host: Host) -> None:
    text = said(host, film(kv(budget=2.0, policy="even")), KIND)
    assert "history is kept to 2 seconds" in text
    assert re.search(r"under Sampler AR Video with 3 frames per block, at 832 x 480 in 16 bits: a KV cache of at most [0-9.]+ MiB", text)
    for frames in (21, 241):
        assert readable(frames * 30 * 52 * 2 * LAYERS * WIDTH * 2) in text
    assert "with 1 frame per block" in text


def test_another_sampler_on_the_model_without_the_node_runs_as_ever(host: Host) -> None:
    """The node's functions are gone from the network."""
    host.latents(film(kv(**SEVEN), frames=6))
    done = host.run({**film(frames=6), "sampler": EULER})
    assert done["status"]["status_str"] == "success", error_of(done)
