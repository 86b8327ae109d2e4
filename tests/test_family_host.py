"""A family that the pack does not know, in a real ComfyUI: it is put into FAMILIES beside the pack, and nothing of the pack is changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flowcache_core.models.bundle import Bundle
from flowcache_core.models.wan_vae import normalise
from flowcache_core.models.word_text import encode_prompt
from flowcache_core.run.generate import Job, generate
from flowcache_core.sampling.solvers import Renoise
from tests.host import NEEDS_HOST, PACK, Graph, Host, error_of, node, put
from tests.toy_family import TOY, toy_network

pytestmark = NEEDS_HOST

LOADER = '''
"""The pack, with one more family in its tuple."""
import importlib.util, sys
sys.path.append({tests!r})
spec = importlib.util.spec_from_file_location("flowcache_pack", {pack!r} + "/__init__.py", submodule_search_locations=[{pack!r}])
pack = sys.modules["flowcache_pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
import flowcache_pack.flowcache_core as core
import flowcache_pack.flowcache_core.models, flowcache_pack.flowcache_core.models.family, flowcache_pack.flowcache_core.sampling.solvers
for name in [name for name in sys.modules if name.startswith("flowcache_pack.flowcache_core")]:
    sys.modules[name.removeprefix("flowcache_pack.")] = sys.modules[name]
import toy_family
core.models.FAMILIES = (*core.models.FAMILIES, toy_family.TOY)
comfy_entrypoint, WEB_DIRECTORY = pack.comfy_entrypoint, {pack!r} + "/web"
'''
FILE = "toy.safetensors"
TEXT_DIM = 256
"""That of the CLIP that comes with the bundled model."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    pack, base = tmp_path_factory.mktemp("toy_pack"), tmp_path_factory.mktemp("comfy")
    (pack / "__init__.py").write_text(LOADER.format(tests=str(Path(__file__).parent), pack=str(PACK)))
    (base / "models" / "diffusion_models").mkdir(parents=True)
    save_file(toy_network(TEXT_DIM).state_dict(), base / "models" / "diffusion_models" / FILE)
    with Host(base, pack) as running:
        yield running


@pytest.fixture
def graph() -> Graph:
    """The shipped workflow on the toy: its MODEL, the text encoder of the bundled model, one text."""
    shipped: Graph = json.loads((PACK / "workflows" / "api" / "text_to_video.json").read_text())
    keep = ("CLIPTextEncode", "FlowCacheLatent", "FlowCacheChunkwise", "RandomNoise", "FlowCacheSampler", "SamplerCustomAdvanced", "FlowCacheReport")
    out = {k: v for k, v in shipped.items() if v["class_type"] in keep and k != "3"}
    out |= {
        "toy": {"class_type": "FlowCacheLoadModel", "inputs": {"model_name": FILE, "family": "auto"}},
        "words": {"class_type": "FlowCacheLoadModel", "inputs": {"model_name": "tiny-skyreels (bundled)"}},
        "guider": {"class_type": "BasicGuider", "inputs": {"model": ["5", 0], "conditioning": ["2", 0]}},
        "sigmas": {"class_type": "ManualSigmas", "inputs": {"sigmas": "1.0, 0.9, 0.7, 0.45, 0.2, 0.0"}},
    }
    del out[node(out, "FlowCacheSampler")]["inputs"]["vae"]
    out = put(put(out, "CLIPTextEncode", clip=["words", 1]), "FlowCacheLatent", model=["toy", 0], width=64, height=64, length=96)
    out = put(put(out, "FlowCacheChunkwise", model=["toy", 0], preset="custom", threshold=0), "FlowCacheSampler", ar_step=2)
    return put(out, "SamplerCustomAdvanced", guider=["guider", 0], sigmas=["sigmas", 0])


def refusal(host: Host, graph: Graph) -> str:
    done = host.run(graph)
    assert done["status"]["status_str"] == "error"
    return error_of(done)


class Words(Bundle):
    """The toy with the words of the bundled model."""

    def text(self, prompt: str) -> torch.Tensor:
        return encode_prompt(prompt, TEXT_DIM)


class ManualJob(Job):
    def sigmas(self, bundle: Bundle) -> tuple[float, ...]:
        return 1.0, 0.9, 0.7, 0.45, 0.2, 0.0


@pytest.mark.parametrize("solver", ["unipc", "renoise"])
def test_the_toy_makes_the_film_that_it_makes_without_the_host(host: Host, graph: Graph, solver: str) -> None:
    film = host.latents(put(put(graph, "RandomNoise", noise_seed=7), "FlowCacheSampler", solver=solver))
    prompt = graph[node(graph, "CLIPTextEncode")]["inputs"]["text"]
    job = ManualJob(prompt, frames=96, steps=5, seed=7, size=64, cfg=1.0, ar_step=2)
    alone, _ = generate(Words(TOY, toy_network(TEXT_DIM), nn.Identity(), TOY.layout), job, integrator=Renoise() if solver == "renoise" else None)
    assert film.shape == alone.shape
    torch.testing.assert_close(normalise(film), alone, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("settings", [{"preset": "balanced"}, {"preset": "custom", "threshold": 0.3, "signature": "latent", "warmup_steps": 1}])
def test_the_toy_is_cached(host: Host, graph: Graph, settings: dict[str, Any]) -> None:
    film = host.latents(put(graph, "FlowCacheChunkwise", **settings))
    assert torch.isfinite(film).all()
    assert not torch.equal(film, host.latents(graph))


def test_what_the_toy_cannot_do_is_said_before_it_runs(host: Host, graph: Graph) -> None:
    timed = put(graph, "FlowCacheChunkwise", preset="custom", threshold=0.1, signature="time")
    assert "signature time follows the time modulation, which toy does not have" in refusal(host, timed)
    whole = put(graph, "FlowCacheSampler", attention="bidirectional (as trained)")
    assert "toy looks back only" in refusal(host, put(whole, "FlowCacheChunkwise", preset="balanced"))
    three = {"model": ["5", 0], "cond1": ["2", 0], "cond2": ["2", 0], "negative": ["2", 0], "cfg_conds": 3.0, "cfg_cond2_negative": 2.0}
    two = {**graph, "guider": {"class_type": "DualCFGGuider", "inputs": {**three, "style": "regular"}}}
    assert "Toy is guided inside the run, by the prompt alone, and Guider_DualCFG has a text 'middle' too" in refusal(host, two)
    odd = {**graph, "toy": {**graph["toy"], "inputs": {"model_name": FILE, "family": "skyreels-v2-df"}}}
    assert "toy.safetensors" in refusal(host, odd)
