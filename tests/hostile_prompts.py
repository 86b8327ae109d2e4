"""Random prompts for a real ComfyUI, made from the schema of a node, with valid and invalid inputs; and the check of how they end.

A prompt depends on its seed, node and number alone.
"""

from __future__ import annotations

import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz_values import Random, value
from tests.host import OPENER, Graph, Host

ODD = '''
"""A node whose output has any type and value, as nodes of other packs may."""
import json
import torch


class Anything(str):
    def __ne__(self, other):
        return False


def zeros(*shape, fill=0.0, dtype=torch.float32):
    return torch.full(shape, fill, dtype=dtype)


def latent(samples, **more):
    return {"samples": samples, **more}


NAN, INF = float("nan"), float("inf")
MADE = {
    "none": lambda: None,
    "object": lambda: object(),
    "empty latent": lambda: {},
    "no samples": lambda: latent(None),
    "listed samples": lambda: latent([[1.0]]),
    "nan latent": lambda: latent(zeros(1, 16, 3, 8, 8, fill=NAN)),
    "infinite latent": lambda: latent(zeros(1, 16, 3, 8, 8, fill=INF)),
    "huge latent": lambda: latent(zeros(1, 16, 3, 8, 8, fill=3e38)),
    "whole numbers": lambda: latent(zeros(1, 16, 3, 8, 8, dtype=torch.int64)),
    "double latent": lambda: latent(zeros(1, 16, 3, 8, 8, dtype=torch.float64)),
    "half latent": lambda: latent(zeros(1, 16, 3, 8, 8, dtype=torch.float16)),
    "picture latent": lambda: latent(zeros(1, 4, 8, 8)),
    "flat latent": lambda: latent(zeros(16)),
    "latent number": lambda: latent(torch.zeros(())),
    "no frames": lambda: latent(zeros(1, 16, 0, 8, 8)),
    "no films": lambda: latent(zeros(0, 16, 3, 8, 8)),
    "no height": lambda: latent(zeros(1, 16, 3, 0, 8)),
    "odd size": lambda: latent(zeros(1, 16, 3, 7, 5)),
    "many channels": lambda: latent(zeros(1, 48, 3, 8, 8)),
    "one channel": lambda: latent(zeros(1, 1, 3, 8, 8)),
    "sound mask": lambda: latent(zeros(1, 16, 3, 8, 8), noise_mask=torch.ones(1, 1, 3, 1, 1)),
    "mask of nothing": lambda: latent(zeros(1, 16, 3, 8, 8), noise_mask=torch.zeros(1, 1, 3, 1, 1)),
    "mask of nan": lambda: latent(zeros(1, 16, 3, 8, 8), noise_mask=torch.full((1, 1, 3, 1, 1), NAN)),
    "other mask": lambda: latent(zeros(1, 16, 3, 8, 8), noise_mask=torch.ones(1, 1, 7, 1, 1)),
    "flat mask": lambda: latent(zeros(1, 16, 3, 8, 8), noise_mask=torch.ones(8, 8)),
    "mask in patches": lambda: latent(zeros(1, 16, 3, 8, 8), noise_mask=torch.rand(1, 1, 3, 8, 8)),
    "batch index": lambda: latent(zeros(1, 16, 3, 8, 8), batch_index=["x"]),
    "image": lambda: zeros(1, 64, 64, 3),
    "no images": lambda: zeros(0, 64, 64, 3),
    "no pixels": lambda: zeros(1, 0, 0, 3),
    "nan image": lambda: zeros(1, 64, 64, 3, fill=NAN),
    "grey image": lambda: zeros(1, 64, 64, 1),
    "clear image": lambda: zeros(5, 64, 64, 4),
    "odd image": lambda: zeros(2, 1, 3, 3),
    "image of bytes": lambda: zeros(1, 64, 64, 3, dtype=torch.uint8),
    "flat image": lambda: zeros(64, 64),
    "no text": lambda: [],
    "text of nothing": lambda: [[None, {}]],
    "text of other width": lambda: [[zeros(1, 4, 7), {}]],
    "text of no words": lambda: [[zeros(1, 0, 64), {}]],
    "text of nan": lambda: [[zeros(1, 4, 64, fill=NAN), {}]],
    "texts of two": lambda: [[zeros(2, 4, 64), {}]],
    "flat text": lambda: [[zeros(64), {}]],
    "text of a time": lambda: [[zeros(1, 4, 64), {"start_percent": 0.9, "end_percent": 0.1}]],
    "no sigmas": lambda: torch.zeros(0),
    "one sigma": lambda: torch.ones(1),
    "sigmas of nan": lambda: torch.tensor([NAN, NAN, 0.0]),
    "rising sigmas": lambda: torch.tensor([0.1, 0.5, 1.0, 0.0]),
    "equal sigmas": lambda: torch.tensor([1.0, 1.0, 0.0]),
    "negative sigmas": lambda: torch.tensor([1.0, -0.5, 0.0]),
    "large sigmas": lambda: torch.tensor([14.6, 3.0, 0.0]),
    "sigmas in rows": lambda: torch.ones(2, 3),
    "wide text": lambda: "x" * 100_000,
}


class Odd:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"what": ("STRING", {"default": "none"})}})
    RETURN_TYPES, FUNCTION, CATEGORY = (Anything("*"),), "run", "tests"

    def run(self, what):
        return (MADE[what]() if what in MADE else json.loads(what),)


NODE_CLASS_MAPPINGS = {"Odd": Odd}
'''
LATENTS = ("empty latent", "no samples", "listed samples", "nan latent", "infinite latent", "huge latent", "whole numbers", "double latent",
           "half latent", "picture latent", "flat latent", "latent number", "no frames", "no films", "no height", "odd size", "many channels",
           "one channel", "sound mask", "mask of nothing", "mask of nan", "other mask", "flat mask", "mask in patches", "batch index")  # fmt: skip
IMAGES = ("image", "no images", "no pixels", "nan image", "grey image", "clear image", "odd image", "image of bytes", "flat image")
TEXTS = ("no text", "text of nothing", "text of other width", "text of no words", "text of nan", "texts of two", "flat text", "text of a time")
SIGMAS = ("no sigmas", "one sigma", "sigmas of nan", "rising sigmas", "equal sigmas", "negative sigmas", "large sigmas", "sigmas in rows")
OF_TYPE = {"LATENT": LATENTS, "IMAGE": IMAGES, "CONDITIONING": TEXTS, "SIGMAS": SIGMAS}
ANY = ("none", "object", "wide text")
WORDS = ("", " ", "x", "\0", "..", "/", "\n", "\u202e", "../../x", "/etc/passwd", "x" * 300, "%date%", "share=0.3", "=", "lam=nan", "a=1 a=2", "{}",
         "[]", "nan", "1e999", "\U0001f3ac", '{"plan": {}}')  # fmt: skip
AMOUNTS = (0, 1, -1, 2, 3, 1000, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-300, 1e308, math.nan, math.inf, -math.inf, True)
QUEUE_LENGTH, TIMEOUT_S = 20, 120.0
"""Prompts in the queue of the host, and seconds in which they have to end."""
MOST = {"width": 256, "height": 256, "length": 2000, "batch_size": 4}
"""What is really made stays small."""
HELPERS: Graph = {
    "loader": {"class_type": "FlowCacheLoadModel", "inputs": {"model_name": "tiny-skyreels (bundled)"}},
    "film": {"class_type": "FlowCacheLatent", "inputs": {"model": ["loader", 0], "width": 64, "height": 64, "length": 9, "unit": "frames",
                                                         "snap": "nearest", "batch_size": 1}},
    "cached": {"class_type": "FlowCachePolicy", "inputs": {"model": ["loader", 0], "policy": "planned", "settings": ""}},
    "sampler": {"class_type": "FlowCacheSampler", "inputs": {"solver": "euler", "ar_step": 1, "chunk_frames": 0, "window": 0, "fps": "24"}},
    "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["loader", 1], "text": "red circle"}},
    "image": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 5, "color": 0}},
    "stock": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
    "levels": {"class_type": "BasicScheduler", "inputs": {"model": ["loader", 0], "scheduler": "simple", "steps": 1, "denoise": 1.0}},
    "guider": {"class_type": "BasicGuider", "inputs": {"model": ["loader", 0], "conditioning": ["text", 0]}},
    "made": {"class_type": "SamplerCustomAdvanced", "inputs": {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["sampler", 0],
                                                               "sigmas": ["levels", 0], "latent_image": ["film", 0]}},
    "decoded": {"class_type": "VAEDecode", "inputs": {"samples": ["made", 0], "vae": ["loader", 2]}},
    "word": {"class_type": "PrimitiveString", "inputs": {"value": ""}},
    "number": {"class_type": "PrimitiveInt", "inputs": {"value": 3}},
    "amount": {"class_type": "PrimitiveFloat", "inputs": {"value": 0.5}},
    "truth": {"class_type": "PrimitiveBoolean", "inputs": {"value": True}},
}  # fmt: skip
LINKS = {"MODEL": ("loader", 0), "CLIP": ("loader", 1), "VAE": ("loader", 2), "LATENT": ("film", 0), "SAMPLER": ("sampler", 0),
         "FLOWCACHE_REPORT": ("sampler", 1), "CONDITIONING": ("text", 0), "IMAGE": ("image", 0), "STRING": ("word", 0), "INT": ("number", 0),
         "FLOAT": ("amount", 0), "BOOLEAN": ("truth", 0)}  # fmt: skip
OF_FILM = {"LATENT": ("made", 0), "IMAGE": ("decoded", 0)}
"""Of a film that the sampler makes."""
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Input:
    """As the host describes it. `options`: of a choice."""

    name: str
    kind: str
    required: bool
    rule: dict[str, Any]

    @property
    def options(self) -> list[Any]:
        return list(self.rule.get("options", ()))

    @property
    def linked(self) -> bool:
        return bool(self.rule.get("forceInput")) or self.kind not in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@dataclass(frozen=True)
class Node:
    name: str
    inputs: tuple[Input, ...]
    is_output: bool

    @classmethod
    def of(cls, name: str, info: dict[str, Any]) -> Node:
        """`info`: the host's /object_info of the node."""
        found = [(key, rule, part == "required") for part in ("required", "optional") for key, rule in info["input"].get(part, {}).items()]
        return cls(name, tuple(_input(key, rule, required) for key, rule, required in found), bool(info["output_node"]))


def _input(name: str, info: list[Any], required: bool) -> Input:
    kind, rule = info[0], info[1] if len(info) > 1 else {}
    return Input(name, "COMBO", required, {**rule, "options": kind}) if isinstance(kind, list) else Input(name, kind, required, rule)


@dataclass
class Prompt:
    """A graph that is being made. Helper nodes come in where they are linked to."""

    graph: Graph = field(default_factory=dict)

    def link(self, name: str, slot: int) -> list[Any]:
        if name in HELPERS and name not in self.graph:
            self.graph[name] = HELPERS[name]
            for one in HELPERS[name]["inputs"].values():
                if isinstance(one, list):
                    self.link(*one)
        return [name, slot]

    def odd(self, what: Any) -> list[Any]:
        """A link to a node with this output: a name of `MADE`, or any JSON value."""
        value = what if isinstance(what, str) and what in MADE_NAMES else json.dumps(what)
        name = f"odd {len(self.graph)}"
        self.graph[name] = {"class_type": "Odd", "inputs": {"what": value}}
        return [name, 0]


MADE_NAMES = frozenset(re.findall(r'^    "([a-z ]+)": lambda', ODD, re.MULTILINE))


def own_nodes(host: Host) -> list[Node]:
    """All nodes of this pack, as the host lists them."""
    every = host.ask("/object_info")
    return [Node.of(name, info) for name, info in sorted(every.items()) if info.get("python_module", "").endswith("custom_nodes.flowcache")]


def valid(rng: Random, one: Input, prompt: Prompt) -> Any:
    """A value within the schema, often at its limits."""
    match one.kind:
        case "COMBO":
            return rng.choice(one.options or [""])
        case "INT" | "FLOAT" if not one.linked:
            low, high, now = one.rule.get("min", 0), one.rule.get("max", 100), one.rule.get("default", 1)
            step = one.rule.get("step", 1)
            high = min(high, MOST.get(one.name, high))
            picked = rng.choice((now, now, low, high, min(high, low + step), max(low, high - step)))
            return int(picked) if one.kind == "INT" else float(picked)
        case "BOOLEAN" if not one.linked:
            return rng.random() < 0.5
        case "STRING" if not one.linked:
            return rng.choice((one.rule.get("default", ""), one.rule.get("default", ""), *WORDS))
    return prompt.link(*rng.choice((LINKS.get(one.kind, ("loader", 0)), OF_FILM.get(one.kind, LINKS.get(one.kind, ("loader", 0))))))


def invalid(rng: Random, one: Input, prompt: Prompt) -> Any:
    """Mostly a value outside the schema."""
    match rng.randrange(9):
        case 0:
            return value(rng)
        case 1:
            return {"__value__": value(rng)}
        case 2:
            return rng.choice(AMOUNTS)
        case 3:
            return rng.choice(WORDS)
        case 4:
            return rng.choice((["nobody", 0], ["film", 99], [1, 2, 3], [], ["loader"], ["node", 0], [None, 0], ["loader", "0"], ["loader", -1]))
        case 5:
            return prompt.link(*rng.choice(list(LINKS.values())))
        case 6:
            return prompt.odd(rng.choice((*AMOUNTS, *WORDS)))
        case 7:
            return prompt.odd(rng.choice((*OF_TYPE.get(one.kind, ANY), *ANY)))
    return prompt.odd(rng.choice((rng.choice(one.options or ["x"]), value(rng), rng.choice(AMOUNTS))))


def inputs_of(rng: Random, node: Node, prompt: Prompt, share: float) -> Inputs:
    """`share`: probability that an input is invalid."""
    out: Inputs = {}
    for one in node.inputs:
        if not one.required and rng.random() < 0.3:
            continue
        out[one.name] = invalid(rng, one, prompt) if rng.random() < share else valid(rng, one, prompt)
    if rng.random() < share:
        out.pop(rng.choice(list(out) or [""]), None)
    if rng.random() < share / 2:
        out[rng.choice(("extra", "self", "cls", "", "model", "samples", *(one.name for one in node.inputs)))] = rng.choice(
            (value(rng), ["loader", 0])
        )
    return out


def prompt_of(seed: int, node: Node, number: int) -> Graph:
    """One node of this pack as "node", with valid and invalid inputs, and the nodes it needs to run."""
    rng, prompt = Random(f"{seed} {node.name} {number}"), Prompt()
    inputs = inputs_of(rng, node, prompt, rng.choice((0.0, 0.1, 0.2, 0.4, 1.0)))
    return graph_of(prompt, node.name, inputs, node.is_output)


def graph_of(prompt: Prompt, name: str, inputs: Inputs, is_output: bool) -> Graph:
    """A node of these inputs as "node", with the helpers that it is linked to."""
    shown = {} if is_output else {"shown": {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}}}
    for link in [one for one in inputs.values() if isinstance(one, list) and one and isinstance(one[0], str)]:
        if link[0] in HELPERS:
            prompt.link(link[0], 0)
    return {**prompt.graph, "node": {"class_type": name, "inputs": inputs}, **shown}


def film_of(seed: int, nodes: Iterable[Node], number: int) -> Graph:
    """A small film that is sampled, with random nodes of this pack on its MODEL and random settings."""
    rng, prompt = Random(f"{seed} film {number}"), Prompt()
    model = prompt.link("loader", 0)
    left_out = ("FlowCacheLatent", "FlowCachePolicy", "FlowCacheScheduler", "FlowCacheDevices")  # the last would start processes for every film
    chain = [one for one in nodes if {"MODEL"} == {i.kind for i in one.inputs if i.linked} and one.name not in left_out]
    for place, node in enumerate(rng.sample(chain, rng.randrange(len(chain) + 1))):
        inputs = {one.name: valid(rng, one, prompt) for one in node.inputs if one.required or rng.random() < 0.7}
        prompt.graph[f"on model {place}"] = {"class_type": node.name, "inputs": {**inputs, "model": model}}
        model = [f"on model {place}", 0]
    named = {one.name: one for one in nodes}
    latent, sampler = named["FlowCacheLatent"], named["FlowCacheSampler"]
    size = {one.name: valid(rng, one, prompt) for one in latent.inputs}
    size |= {name: min(most, max(size[name], least)) for name, most, least in (("width", 64, 16), ("height", 64, 16), ("length", 33, 1),
                                                                                ("batch_size", 2, 1))}  # fmt: skip
    text, empty = (prompt.odd(rng.choice(TEXTS)) if rng.random() < 0.1 else prompt.link("text", 0) for _ in range(2))
    noise_levels = {"class_type": "BasicScheduler", "inputs": {"model": model, "scheduler": "simple", "steps": rng.choice((1, 2, 3)), "denoise": 1.0}}
    graph: Graph = {
        **prompt.graph,
        "film of its own": {"class_type": latent.name, "inputs": {**size, "unit": "frames", "model": ["loader", 0]}},
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": number}},
        "levels": noise_levels,
        "guider": {"class_type": "CFGGuider", "inputs": {"model": model, "positive": text, "negative": empty, "cfg": rng.choice((1.0, 3.0))}},
        "own": {
            "class_type": sampler.name,
            "inputs": {one.name: valid(rng, one, prompt) for one in sampler.inputs if rng.random() < 0.9 or one.required},
        },
    }
    if rng.random() < 0.15:
        graph["levels"] = {"class_type": "Odd", "inputs": {"what": rng.choice(SIGMAS)}}
    if rng.random() < 0.25:
        graph["film of its own"] = {"class_type": "Odd", "inputs": {"what": rng.choice(LATENTS)}}
    links = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["own", 0], "sigmas": ["levels", 0], "latent_image": ["film of its own", 0]}
    graph["node"] = {"class_type": "SamplerCustomAdvanced", "inputs": links}
    graph["shown"] = {"class_type": "FlowCacheReport", "inputs": {"report": ["own", 1], "latent": ["node", 0]}}
    return graph


RAW = re.compile(
    r"cannot convert|could not convert|object is not|has no attribute|unexpected keyword|invalid literal|math domain|must be real|size mismatch|"
    r"must match the size|out of range|allocate|expected scalar|not supported between|Expected|shape '\[|dimension"
)
"""Parts of messages of Python and torch."""
KINDS = {"ValueError", "FileNotFoundError", "RuntimeError"}


def fault_of(done: dict[str, Any]) -> str:
    """An error of this pack that is no sentence; "" for success, for a sentence, and for errors of the host itself."""
    for event, data in done["status"]["messages"]:
        if event == "execution_error" and any("flowcache" in line for line in data["traceback"]):
            kind, message = data["exception_type"].rpartition(".")[2], data["exception_message"].strip()
            if kind not in KINDS or RAW.search(message) or len(message.split()) < 4 or len(message) > 1500 or not message.isprintable():
                return f"{kind}: {message[:300]}\n{''.join(data['traceback'][-3:])}"
    return ""


def answers(host: Host, graphs: Iterable[Graph]) -> Iterator[tuple[Graph, dict[str, Any] | None]]:
    """The host's entry of every graph, in some order; None for one that it refused before it ran."""
    waiting: dict[str, Graph] = {}
    for graph in graphs:
        name = post(host, graph)
        if name is None:
            yield graph, None
            continue
        waiting[name] = graph
        if len(waiting) >= QUEUE_LENGTH:
            yield from _ended(host, waiting)
    yield from _ended(host, waiting)


def post(host: Host, graph: Graph) -> str | None:
    """-> under which name it runs; None where it is refused."""
    request = urllib.request.Request(f"{host.url}/prompt", json.dumps({"prompt": graph}).encode(), {"Content-Type": "application/json"})
    try:
        with OPENER.open(request, timeout=60) as answer:
            name: str = json.loads(answer.read())["prompt_id"]
            return name
    except urllib.error.HTTPError as refused:
        refused.close()
        return None


def _ended(host: Host, waiting: dict[str, Graph]) -> Iterator[tuple[Graph, dict[str, Any]]]:
    end = time.monotonic() + TIMEOUT_S
    while any(host.ask("/queue").values()):
        assert host.process.poll() is None, host.log.read_text()[-3000:]
        assert time.monotonic() < end, f"stuck over {json.dumps(_running(host, waiting))}"
        time.sleep(0.05)
    for number, done in host.ask("/history").items():
        if number in waiting:
            yield waiting.pop(number), done
    assert not waiting, "every prompt ends"
    host.ask("/history", {"clear": True})


def _running(host: Host, waiting: dict[str, Graph]) -> Graph:
    names = [entry[1] for entry in host.ask("/queue")["queue_running"]]
    return {name: waiting[name]["node"] for name in names if name in waiting}
