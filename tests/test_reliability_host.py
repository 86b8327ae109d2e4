"""Faults in a real ComfyUI: the error is told, and the next film is the one that would have been without it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.host import NEEDS_HOST, PACK, Graph, Host, after_loader, error_of, inside, node, put, small, with_nodes, without_cache

pytestmark = NEEDS_HOST
KV = "FlowCacheKVCompressor"
BUDGET = {"budget": 1.5, "unit": "chunks", "policy": "importance-redundancy", "dtype": "as computed", "sink": 1, "recent": 0,
          "granularity": "token", "offload": False, "soft": 0.0}  # fmt: skip
FAULTS = '''
"""Wraps a function of the pack, or of the host, when the file "fault.json" in the temp folder of the host asks for it."""
import functools, importlib, json, os, sys
import comfy.model_management, comfy.model_patcher, comfy.samplers, folder_paths, server
import torch

KINDS = {
    "error": lambda: RuntimeError("a fault on purpose"),
    "out of memory": lambda: torch.OutOfMemoryError("a fault on purpose"),
    "interrupt": comfy.model_management.InterruptProcessingException,
}
STATE = {"calls": 0}


def asked():
    path = os.path.join(folder_paths.get_temp_directory(), "..", "fault.json")
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return json.load(file)


def wrap(owner, name, key):
    original = getattr(owner, name)

    @functools.wraps(original)
    def faulty(*args, **kwargs):
        wanted = asked()
        if wanted and wanted["stage"] == key:
            STATE["calls"] += 1
            if STATE["calls"] == wanted["at"]:
                STATE["calls"] = 0
                raise KINDS[wanted["kind"]]()
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


def patch_pack(core):
    load = lambda name: importlib.import_module(core + name)
    wrap(load(".models.skyreels").Block, "forward", "block")
    wrap(load(".kv.cache").KVStore, "settle", "history")
    wrap(load(".kv.keeper").Keeper, "settle", "eviction")
    wrap(load(".sampling.walk").ChunkWalk, "step", "solver")
    wrap(load(".run.report").RunReport, "decided", "report")
    wrap(load(".models.wan_vae").WanVAE, "decode", "decoder")


send = server.PromptServer.send_sync


def send_sync(self, event, data, sid=None):
    wanted = asked()
    if event == "flowcache.steps" and wanted and wanted["stage"] == "page":
        raise RuntimeError("the page is gone")
    return send(self, event, data, sid)


server.PromptServer.send_sync = send_sync
patch_model = comfy.model_patcher.ModelPatcher.patch_model


def offloaded(self, device_to=None, lowvram_model_memory=0, *args, **kwargs):
    wanted = asked()
    if wanted and wanted["stage"] == "offload" and type(self.model).__name__ == "HostModel":
        lowvram_model_memory = 1
        print("offloaded: every weight is cast where it is used")
    return patch_model(self, device_to, lowvram_model_memory, *args, **kwargs)


comfy.model_patcher.ModelPatcher.patch_model = offloaded


class Faults:
    """Behind the loader, so that the pack has been loaded when it is patched."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tests"

    def run(self, model):
        if "patched" not in STATE:
            STATE["patched"] = True
            core = next(name for name in sys.modules if name.endswith("flowcache_core.run.run"))
            patch_pack(core[: -len(".run.run")])
        return (model,)


NODE_CLASS_MAPPINGS = {"Faults": Faults}
'''


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with with_nodes(tmp_path_factory.mktemp("comfy"), FAULTS) as running:
        yield running


@pytest.fixture(scope="module")
def graph(host: Host) -> Graph:
    """Four chunks under a budget of one and a half, behind a node that makes faults."""
    whole = without_cache(small(json.loads((PACK / "workflows" / "api" / "text_to_video.json").read_text()), steps=4, length=45))
    whole = put(whole, "FlowCacheLatent", width=32, height=32)
    whole = after_loader(whole, KV, **BUDGET)
    loader = node(whole, "FlowCacheLoadModel")
    whole["extra"]["inputs"]["model"] = ["faults", 0]
    return {**whole, "faults": {"class_type": "Faults", "inputs": {"model": [loader, 0]}}}


@pytest.fixture(scope="module")
def reference(host: Host, graph: Graph) -> torch.Tensor:
    return host.latents(graph)


class Asked:
    """While it is open, the host makes this fault."""

    def __init__(self, host: Host, stage: str, kind: str = "error", at: int = 5) -> None:
        self.path, self.wanted = host.base / "fault.json", {"stage": stage, "kind": kind, "at": at}

    def __enter__(self) -> None:
        self.path.write_text(json.dumps(self.wanted))

    def __exit__(self, *raised: object) -> None:
        self.path.unlink()


def files(host: Host) -> set[Path]:
    return {path for name in ("output", "temp", "input") for path in (host.base / name).rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["error", "out of memory", "interrupt"])
@pytest.mark.parametrize(("stage", "at"), [("block", 9), ("history", 1), ("eviction", 2), ("solver", 5), ("report", 6)])
def test_a_fault_is_told_and_the_next_film_is_right(host: Host, graph: Graph, reference: torch.Tensor, stage: str, at: int, kind: str) -> None:
    before = files(host)
    with Asked(host, stage, kind, at):
        done = host.run(put(graph, "RandomNoise", noise_seed=9))
    assert done["status"]["status_str"] == "error"
    events = [event for event, _ in done["status"]["messages"]]
    assert ("execution_interrupted" in events) == (kind == "interrupt")
    if kind == "error":
        assert "a fault on purpose" in error_of(done)
    assert files(host) == before, "nothing is written"
    assert torch.equal(host.latents(graph), reference)


def test_a_page_that_is_gone_ends_no_run(host: Host, graph: Graph, reference: torch.Tensor) -> None:
    with Asked(host, "page"):
        assert torch.equal(host.latents(graph), reference)


def test_a_model_that_the_host_lets_go_of_between_runs_makes_the_same_film(host: Host, graph: Graph, reference: torch.Tensor) -> None:
    host.ask("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    assert torch.equal(host.latents(graph), reference)


def test_weights_that_are_cast_where_they_are_used_make_the_same_film(host: Host, graph: Graph, reference: torch.Tensor) -> None:
    """What --lowvram and --novram do to a model; a host without a GPU refuses the options themselves."""
    host.ask("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    with Asked(host, "offload"):
        assert torch.equal(host.latents(graph), reference)
    assert "offloaded: every weight is cast where it is used" in host.log.read_text()
    host.ask("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    assert torch.equal(host.latents(graph), reference)


def test_a_node_that_was_taken_out_leaves_nothing_behind(host: Host, graph: Graph, reference: torch.Tensor) -> None:
    bare = without_cache(graph, KV)
    alone = host.latents(bare)
    assert not torch.equal(alone, reference)
    assert torch.equal(host.latents(graph), reference)
    assert torch.equal(host.latents(bare), alone)


def test_a_host_that_keeps_nothing_makes_the_same_film(
    graph: Graph, reference: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMFYUI_ARGS", f"{os.environ.get('COMFYUI_ARGS', '')} --disable-smart-memory --cache-none")
    with with_nodes(tmp_path, FAULTS) as fresh:
        assert torch.equal(fresh.latents(graph), reference)
        assert torch.equal(fresh.latents(graph), reference)


def test_a_film_is_not_shown_where_decoding_would_unload_the_network(tmp_path: Path) -> None:
    """With --disable-smart-memory the host unloads all other models of a card, however much is free."""
    code = """
import comfy.model_management as host

model, _, vae = node("load_model").LoadARVideoModel.execute(model_name="tiny-skyreels (bundled)").result
host.get_free_memory = lambda device=None, torch_free_too=False: (1 << 40, 0) if torch_free_too else 1 << 40
host.load_models_gpu([model])
card, found = torch.device("cuda", 0), []
vae.device = host.current_loaded_models[0].device = card
for host.DISABLE_SMART_MEMORY in (False, True):
    said = node("projector").hindrance(vae, torch.Size((1, 16, 3, 8, 8)))
    found.append(["--disable-smart-memory" in said, bool(host.free_memory(1, card))])
print(json.dumps(found))
"""
    assert inside(tmp_path, code) == [[False, False], [True, True]]


HOSTILE = {"": "", "null byte": "a\0b", "long": "x" * 100_000, "path": "../../../etc/passwd", "absolute": "/etc/passwd", "letters": "\u202e\u0000"}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_text_from_the_api_is_refused_with_a_sentence(host: Host, graph: Graph, text: str) -> None:
    done = host.run(put(graph, "FlowCacheLoadModel", model_name=text))
    assert done["status"]["status_str"] == "error"
    policy = {"class_type": "FlowCachePolicy", "inputs": {"model": ["faults", 0], "policy": "planned", "settings": text or "="}}
    graph = {**graph, "policy": policy}
    said = error_of(host.run(put(graph, KV, model=["policy", 0])))
    assert re.search(r"is no setting|it has", said), said[:300]
    assert len(said) < 1000
