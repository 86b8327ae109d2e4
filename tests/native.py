"""ComfyUI's own causal model with random weights, its own sampler, and what watches a run: a pack of test nodes, and the graphs they are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.host import Graph, Host

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


class RandomClip(Node):
    """A prompt is the seed of a RandomText; with hooks there are two texts of it."""

    RETURN_TYPES, inputs = ("CLIP",), {"tokens": ("INT",), "hooks": ("BOOLEAN",)}

    def run(self, tokens, hooks):
        class Clip:
            def tokenize(self, text):
                return int(text)

            def encode_from_tokens_scheduled(self, seed):
                return RandomText().run(seed, tokens)[0] * (2 if hooks else 1)

        return (Clip(),)


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
        model, seen = model.clone(), {"most": 0, "calls": 0, "forwards": 0}
        forward = model.get_model_object("diffusion_model.forward_block")

        def forward_block(*args, **kwargs):
            seen["forwards"] += 1
            return forward(*args, **kwargs)

        model.add_object_patch("diffusion_model.forward_block", forward_block)

        def outer(executor, *args, **kwargs):
            gc.collect()
            seen.update(most=0, calls=0, forwards=0)
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
            if seen["calls"] in (2, 20, 120):
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


class LeavesOut(Node):
    """On the host's own caches: leaves out the clean passes, or the last step, which then gives the prediction of the step before."""

    inputs = {"model": ("MODEL",), "clean": ("BOOLEAN",), "steps": ("INT",)}

    def run(self, model, clean, steps):
        model, last = model.clone(), {"step": 0}

        def evaluate(executor, x, t, c_concat, c_crossattn, control, options, **more):
            last["step"] = last["step"] % (steps + 1) + 1
            if last["step"] != (steps + 1 if clean else steps):
                last["clean"] = executor(x, t, c_concat, c_crossattn, control, options, **more)
                return last["clean"]
            for cache in options["ar_state"]["kv_caches"]:
                cache["end"] += x.shape[2] * (x.shape[3] // 2) * (x.shape[4] // 2)
            return last["clean"]

        model.add_wrapper_with_key(KINDS.APPLY_MODEL, "leaves out", evaluate)
        return (model,)


class Switched(Node):
    """On the host's own caches: the prompt alone is another one from a latent frame on. `recache`: all earlier blocks are evaluated with it first."""

    inputs = {"model": ("MODEL",), "text": ("CONDITIONING",), "frame": ("INT",), "tokens": ("INT",), "recache": ("BOOLEAN",)}

    def run(self, model, text, frame, tokens, recache):
        model, seen = model.clone(), {"start": -1, "clean": []}

        def evaluate(executor, x, t, c_concat, c_crossattn, control, options, **more):
            state = options["ar_state"]
            start = state["start_frame"]
            if options["cond_or_uncond"] != [0]:
                return executor(x, t, c_concat, c_crossattn, control, options, **more)
            if start >= frame:
                c_crossattn = text[0][0]
            if start == frame != seen["start"]:
                for cache in state["crossattn_caches"]:
                    cache["is_init"] = False
                for cache in state["kv_caches"] if recache else []:
                    cache["end"] = 0
                for first, clean in seen["clean"] if recache else []:
                    before = {**options, "ar_state": {**state, "start_frame": first}}
                    executor(clean, torch.zeros_like(t), c_concat, c_crossattn, control, before, **more)
            seen["start"] = start
            if not t.any():
                seen["clean"].append((start, x))
            return executor(x, t, c_concat, c_crossattn, control, options, **more)

        model.add_wrapper_with_key(KINDS.APPLY_MODEL, "switched", evaluate)
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
         weights: str = "float32", causal: bool = True, side: int = SIDE, steps: int = STEPS) -> Graph:  # fmt: skip
    """The host's own graph for its causal models, with nodes between the model and all that takes it."""
    graph: Graph = {
        "model": {"class_type": "RandomModel", "inputs": {"seed": seed, "weights": weights, "causal": causal}},
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}},
        "latent": {"class_type": "EmptyARVideoLatent",
                   "inputs": {"width": 8 * side, "height": 64, "length": 4 * frames - 3, "batch_size": batch}},
        "sampler": {"class_type": "SamplerARVideo", "inputs": {"num_frame_per_block": block}},
        "positive": {"class_type": "RandomText", "inputs": {"seed": 1, "tokens": texts[0]}},
        "negative": {"class_type": "RandomText", "inputs": {"seed": 2, "tokens": texts[1]}},
        "sigmas": {"class_type": "BasicScheduler", "inputs": {"model": ["model", 0], "scheduler": "simple", "steps": steps, "denoise": 1.0}},
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
