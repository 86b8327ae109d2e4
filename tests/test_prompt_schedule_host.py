"""Prompt Schedule in a real ComfyUI: under its own AR sampler with KV Compressor, against switches made another way, and under ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.host import NEEDS_HOST, PACK, Graph, Host, node, put, refused, said, small, with_nodes
from tests.native import FRAMES, SEVEN, STEPS, TESTS, TOKENS, Chain, film, kv, seen, watched

pytestmark = NEEDS_HOST
KIND = "FlowCachePromptSchedule"
SWITCH = "1: 1\n3: 7"
"""From the third chunk on, which begins with latent frame 6."""
ANEW = "at every change"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with with_nodes(tmp_path_factory.mktemp("comfy"), TESTS) as running:
        yield running


def scheduled(graph: Graph, schedule: str = SWITCH, recache: str = "off", tokens: int = 8, hooks: bool = False, branch: str = "positive") -> Graph:
    """A film whose prompt is a schedule."""
    clip = {"class_type": "RandomClip", "inputs": {"tokens": tokens, "hooks": hooks}}
    return {**graph, "clip": clip, branch: {"class_type": KIND, "inputs": {"clip": ["clip", 0], "schedule": schedule, "recache": recache}}}


def switched(*chain: Chain, recache: bool = False, **settings: Any) -> Graph:
    """The same by a node that changes the text on its way to the network, on the caches of the sampler itself."""
    text = {"class_type": "RandomText", "inputs": {"seed": 7, "tokens": 8}}
    switch: Chain = ("Switched", {"text": ["text", 0], "frame": 6, "tokens": TOKENS, "recache": recache})
    return {**film(*chain, switch, **settings), "text": text}


@pytest.mark.parametrize("recache", [False, True], ids=["history stays", "recache"])
def test_the_prompt_changes_with_a_chunk_bit_for_bit(host: Host, recache: bool) -> None:
    made = host.latents(scheduled(film(kv()), recache=ANEW if recache else "off"))
    assert torch.equal(made, host.latents(switched(recache=recache)))
    alone = host.latents(film())
    assert torch.equal(made[:, :, :6], alone[:, :, :6])
    assert not torch.equal(made[:, :, 6:], alone[:, :, 6:])


def test_history_made_anew_is_another(host: Host) -> None:
    kept, anew = (host.latents(scheduled(film(kv()), recache=recache)) for recache in ("off", ANEW))
    assert torch.equal(kept[:, :, :6], anew[:, :, :6])
    assert not torch.equal(kept[:, :, 6:], anew[:, :, 6:])


def test_one_prompt_for_all_chunks_is_the_film_without_the_node(host: Host) -> None:
    alone = host.latents(film())
    assert torch.equal(host.latents(scheduled(film(), "1: 1")), alone)
    assert torch.equal(host.latents(scheduled(film(kv()), "1: 1\n2: 1\n4: 1")), alone)


@pytest.mark.parametrize("recache", [False, True], ids=["history stays", "recache"])
def test_guidance_is_two_runs_combined_and_only_the_prompt_changes(host: Host, recache: bool) -> None:
    """Texts of two lengths, which are evaluated one after the other; where history is made anew, that of the other text is the same again."""
    apart: Chain = ("Apart", {"frames": FRAMES, "tokens": TOKENS})
    guided = host.latents(scheduled(film(kv(), cfg=3.0), recache=ANEW if recache else "off"))
    assert torch.equal(guided, host.latents(switched(apart, recache=recache, cfg=3.0)))
    beside = host.latents(scheduled(film(kv(), cfg=3.0, texts=(8, 8)), recache=ANEW if recache else "off"))
    assert beside.isfinite().all()
    assert torch.equal(beside[:, :, :6], host.latents(film(kv(), cfg=3.0, texts=(8, 8)))[:, :, :6])


@pytest.mark.parametrize("policy", ["sink-recent", "even", "h2o"])
def test_within_a_budget_history_is_made_anew_of_what_is_left(host: Host, policy: str) -> None:
    """Of 15 frames, in chunks of 3, the sink and the latest six are left where the prompt changes; other policies keep something of every chunk."""
    settings = {**SEVEN, "policy": policy}
    made = host.latents(scheduled(film(watched(policy), kv(**settings), frames=21), "1: 1\n6: 7", ANEW))
    again = 3 if policy == "sink-recent" else 5
    assert seen(host, policy)["forwards"] == 7 * (STEPS + 1) - 1 + again
    assert f"where the prompt changed, chunks were evaluated once more, {again} in all" in host.log.read_text()
    plain = host.latents(film(watched("plain"), kv(**settings), frames=21))
    assert torch.equal(made[:, :, :15], plain[:, :, :15])
    assert not torch.equal(made[:, :, 15:], plain[:, :, 15:])
    assert seen(host, policy)["most"] == seen(host, "plain")["most"]
    assert seen(host, policy)["behind"] == 0


def test_a_long_film_of_many_prompts_holds_as_much_as_a_short_one(host: Host) -> None:
    most = {}
    for frames in (21, 63):
        lines = "\n".join(f"{chunk}: {chunk}" for chunk in range(1, frames // 3 + 1, 2))
        host.latents(scheduled(film(watched(f"many {frames}"), kv(**SEVEN), frames=frames), lines, ANEW))
        most[frames] = seen(host, f"many {frames}")["most"]
    assert most[21] == most[63]


EULER = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}


@pytest.mark.parametrize(
    ("graph", "sentence"),
    [
        (scheduled(film(kv()), "1: 1\n5: 7"), "a prompt for chunk 5, and a film of 45 frames has 4 chunks of 3 latent frames"),
        (scheduled(film(kv()), "2: 1"), "the first prompt of the schedule is for chunk 2"),
        (scheduled(film(kv()), "  "), "the prompt schedule is empty"),
        (scheduled(film(kv()), hooks=True), "this CLIP makes 2 texts of one prompt"),
        (scheduled(film()), "has a prompt for every chunk, and what samples here knows no chunks: .* put KV Compressor between"),
        (scheduled({**film(causal=False), "sampler": EULER}), "what samples here knows no chunks"),
    ],
    ids=["beyond", "second", "empty", "hooks", "without KV Compressor", "not causal"],
)
def test_what_cannot_be_scheduled_is_refused_with_a_sentence(host: Host, graph: Graph, sentence: str) -> None:
    refused(host, graph, sentence)


@pytest.fixture(scope="module")
def ours() -> Graph:
    """Three chunks of the bundled model, every step of which is computed."""
    graph = small(json.loads((PACK / "workflows" / "api" / "text_to_video.json").read_text()), steps=4, length=33)
    cache = node(graph, "FlowCacheChunkwise")
    source = graph.pop(cache)["inputs"]["model"]
    for one in graph.values():
        one["inputs"] = {name: source if value == [cache, 0] else value for name, value in one["inputs"].items()}
    return put(put(graph, "FlowCacheLatent", width=64, height=64), "FlowCacheSampler", ar_step=2)


RED, GREEN = "red circle moves right", "green square moves left"


def prompted(graph: Graph, text: str, kind: str = KIND, **settings: Any) -> Graph:
    """With a prompt or a schedule."""
    guider = graph[node(graph, "CFGGuider")]["inputs"]
    clip = graph[guider["positive"][0]]["inputs"]["clip"]
    inputs = {"text": text} if kind == "CLIPTextEncode" else {"schedule": text, **settings}
    out = {**graph, "prompt": {"class_type": kind, "inputs": {"clip": clip, **inputs}}}
    inside = guider["positive"] == guider["negative"]
    return put(out, "CFGGuider", positive=["prompt", 0], **({"negative": ["prompt", 0]} if inside else {}))


def magi() -> Graph:
    graph = json.loads((PACK / "workflows" / "api" / "magi_text_to_video.json").read_text())
    graph = put(put(graph, "FlowCacheLatent", width=64, height=64, length=48), "FlowCacheScheduler", steps=4)
    return put(graph, "FlowCacheChunkwise", preset="custom", threshold=0.0)


@pytest.mark.parametrize(("family", "chunk", "begins"), [("SkyReels-V2", 3, 6), ("MAGI-1", 2, 6)])
def test_under_our_sampler_it_changes_with_a_chunk(host: Host, ours: Graph, family: str, chunk: int, begins: int) -> None:
    """`begins`: the chunk's first latent frame. With one text for all chunks they are evaluated together, and round otherwise."""
    graph = ours if family == "SkyReels-V2" else magi()
    plain = host.latents(prompted(graph, RED, "CLIPTextEncode"))
    same = host.latents(prompted(graph, f"1: {RED}\n{chunk}: {RED}"))
    assert torch.allclose(same, plain, atol=1e-3)
    changing = host.latents(prompted(graph, f"1: {RED}\n{chunk}: {GREEN}"))
    assert torch.equal(changing[:, :, :begins], same[:, :, :begins]), "earlier chunks do not see the later ones"
    assert not torch.allclose(changing[:, :, begins:], plain[:, :, begins:], atol=1e-1)


def test_under_our_sampler_a_run_with_a_schedule_is_saved_and_goes_on(host: Host, ours: Graph) -> None:
    graph = prompted(ours, f"1: {RED}\n3: {GREEN}")
    saved: Tensor = host.latents(put(graph, "FlowCacheSampler", save_every=1))
    assert torch.equal(saved, host.latents(graph))


def test_under_our_sampler_what_cannot_be_is_refused(host: Host, ours: Graph) -> None:
    refused(host, prompted(ours, f"1: {RED}\n4: {GREEN}"), "a prompt for chunk 4, and a film of 33 frames has 3 chunks")
    anew = prompted(ours, f"1: {RED}\n3: {GREEN}", recache=ANEW)
    refused(host, anew, "as LongLive does; SkyReels-V2 diffusion forcing was not trained for that: set recache to off")
    whole = put(prompted(ours, f"1: {RED}\n2: {GREEN}"), "FlowCacheSampler", attention="bidirectional (as trained)")
    refused(host, whole, "all chunks of a section are evaluated at once: set attention of AR Chunk Sampler to block-causal")
    stock = prompted(ours, f"1: {RED}\n2: {GREEN}")
    stock[node(stock, "FlowCacheSampler")] = EULER
    refused(host, stock, "what samples here knows no chunks: use AR Chunk Sampler")


def test_the_node_lists_the_prompts(host: Host, ours: Graph) -> None:
    assert said(host, prompted(ours, f"1: {RED}\n3: {GREEN}"), KIND) == f"from chunk 1 on: {RED}\nfrom chunk 3 on: {GREEN}"


def test_choices_and_comments_are_resolved_as_in_clip_text_encode(host: Host) -> None:
    """By the page, in what both nodes mark alike."""
    marked = [host.ask(f"/object_info/{kind}")[kind]["input"]["required"][name][1]["dynamicPrompts"]
              for kind, name in (("CLIPTextEncode", "text"), ("FlowCachePromptSchedule", "schedule"))]  # fmt: skip
    assert marked == [True, True]
