"""The attention that a real ComfyUI was started with: the film it makes, and its name in the report. test_other_nodes_host.py has the default."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from flowcache_core.models.bundle import Bundle
from flowcache_core.models.wan_vae import normalise
from flowcache_core.run.generate import generate
from tests.host import NEEDS_HOST, Graph, Host, HostJob, node, put, small, without_cache

pytestmark = NEEDS_HOST


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with Host(tmp_path_factory.mktemp("comfy"), options=("--fp32-unet", "--use-split-cross-attention")) as running:
        yield running


def test_the_attention_that_the_host_was_started_with_makes_the_same_film_and_is_named(host: Host, graph: Graph, bundle: Bundle) -> None:
    plain = put(put(without_cache(small(graph, steps=5, length=21)), "FlowCacheLatent", width=64, height=64), "RandomNoise", noise_seed=3)
    prompt, negative = (plain[plain[node(plain, "CFGGuider")]["inputs"][side][0]]["inputs"]["text"] for side in ("positive", "negative"))
    cfg = plain[node(plain, "CFGGuider")]["inputs"]["cfg"]
    default, _ = generate(bundle, HostJob(prompt, frames=21, steps=5, seed=3, size=64, cfg=cfg, negative=negative))
    film = normalise(host.latents(plain))
    assert not torch.equal(film, default)
    torch.testing.assert_close(film, default, rtol=2e-3, atol=2e-3)
    shown = [{"class_type": "PreviewAny", "inputs": {"source": [node(plain, "FlowCacheReport"), output]}} for output in (0, 1)]
    done = host.run({**plain, "text": shown[0], "json": shown[1]})
    text, kernels = done["outputs"]["text"]["text"][0], json.loads(done["outputs"]["json"]["text"][0])["kernels"]
    assert kernels["attention"] == ["ComfyUI's attention_split"]
    assert f"attention by ComfyUI's attention_split; other kernels by {kernels['path']}" in text
