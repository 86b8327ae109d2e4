"""Cache Policy in a real ComfyUI, and what the nodes before and behind it say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flowcache_core.policies import POLICIES
from tests.host import (
    BIDIRECTIONAL,
    NEEDS_HOST,
    PACK,
    THRESHOLD,
    Graph,
    Host,
    after_loader,
    node,
    put,
    refused,
    said,
    small,
    without_cache,
)

pytestmark = NEEDS_HOST
KIND, CHUNKWISE, MOTION = "FlowCachePolicy", "FlowCacheChunkwise", "FlowCacheMotion"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with Host(tmp_path_factory.mktemp("comfy")) as running:
        yield running


@pytest.fixture
def bare() -> Graph:
    """Two chunks, 24 steps, no cache node."""
    whole = small(json.loads((PACK / "workflows" / "api" / "text_to_video.json").read_text()), 24, 21)
    return put(without_cache(whole), "FlowCacheLatent", width=32, height=32)


@pytest.fixture
def moving() -> Graph:
    """The same with Motion Cache."""
    whole = small(json.loads((PACK / "workflows" / "api" / "motion_cache.json").read_text()), 24, 21)
    return put(whole, "FlowCacheLatent", width=32, height=32)


def before(graph: Graph, policy: str, settings: str = "") -> Graph:
    """With Cache Policy right behind the loader."""
    return after_loader(graph, KIND, policy=policy, settings=settings)


def test_every_policy_is_offered(host: Host) -> None:
    inputs: dict[str, Any] = host.ask(f"/object_info/{KIND}")[KIND]["input"]
    assert list(inputs["required"]) == ["model", "policy", "settings"]
    assert inputs["required"]["policy"][1]["options"] == [kind.name for kind in POLICIES]
    assert inputs["required"]["policy"][1]["default"] == "planned"


@pytest.mark.parametrize("kind", POLICIES, ids=lambda kind: kind.name)
def test_every_policy_makes_a_film_and_says_what_it_is(host: Host, bare: Graph, kind: type) -> None:
    shown = said(host, before(bare, kind.name), KIND)
    assert shown.splitlines()[0] == kind.title
    assert torch.isfinite(host.latents(before(bare, kind.name))).all()


def test_always_is_the_graph_without_the_node_and_planned_is_chunkwise_cache(host: Host, bare: Graph) -> None:
    assert torch.equal(host.latents(before(bare, "always")), host.latents(bare))
    chunkwise = after_loader(bare, CHUNKWISE, preset="fast", **THRESHOLD)
    assert torch.equal(host.latents(before(bare, "planned", "share=0.3")), host.latents(chunkwise))


def test_settings_that_do_not_exist_are_refused(host: Host, bare: Graph) -> None:
    refused(host, before(bare, "planned", "shares=0.3"), r"^planned has no setting 'shares': it has share=0\.4, seconds=0\.0$")


def test_two_nodes_with_a_policy_each_are_refused(host: Host, bare: Graph) -> None:
    chunkwise = {"preset": "fast", **THRESHOLD}
    late = behind(before(bare, "planned"), CHUNKWISE, **chunkwise)
    refused(host, late, "^Chunkwise Cache after Cache Policy would take its place: bypass one of the two$")
    late = behind(after_loader(bare, CHUNKWISE, **chunkwise), KIND, policy="planned", settings="")
    refused(host, late, "^Cache Policy after Chunkwise Cache would take its place: bypass one of the two$")


def behind(graph: Graph, kind: str, **inputs: Any) -> Graph:
    """With one more node between the one behind the loader and the guider."""
    return {**put(graph, "CFGGuider", model=["late", 0]), "late": {"class_type": kind, "inputs": {"model": ["extra", 0], **inputs}}}


def test_motion_cache_refines_it_or_refuses_it_by_name_and_never_drops_it(host: Host, moving: Graph) -> None:
    custom = put(moving, MOTION, preset="custom")
    assert "threshold 0.07, warm-up 3" in said(host, before(custom, "threshold", "threshold=0.07 warmup_steps=3"), MOTION)
    assert "within 30% of all tokens" in said(host, before(put(moving, MOTION, preset="turbo"), "planned", "share=0.3"), MOTION)
    assert "Chunkwise Cache by a plan, in front, is not used" in said(host, before(put(moving, MOTION, preset="magi-1"), "planned"), MOTION)
    refused(host, before(custom, "motion-plan"), "^Motion Cache with preset custom cannot refine Motion Cache by a plan, which is in front of it: ")
    refused(host, before(custom, "planned", "seconds=9"), "^Motion Cache with preset custom cannot refine Chunkwise Cache by a plan")
    turbo = put(moving, MOTION, preset="turbo")
    refused(host, before(turbo, "motion-threshold"), "^Motion Cache with preset turbo cannot refine Motion Cache by a threshold")


def test_refusals_name_the_node_that_has_set_the_policy(host: Host, bare: Graph) -> None:
    sections = put(bare, "FlowCacheSampler", attention=BIDIRECTIONAL)
    refused(host, before(sections, "threshold"), "^Cache Policy cannot work with the attention of AR Chunk Sampler.* or bypass Cache Policy;")
    assert torch.isfinite(host.latents(before(sections, "planned"))).all()
    stock = {**bare, node(bare, "FlowCacheSampler"): {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}}
    del stock[node(stock, "FlowCacheReport")]
    refused(host, before(stock, "motion-plan"), "^Cache Policy works with the AR Chunk Sampler: .* or bypass Cache Policy$")
