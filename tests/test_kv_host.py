"""KV Compressor in a real ComfyUI."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flowcache_core.kv.scores.salience import BUNDLED
from tests.host import BIDIRECTIONAL, NEEDS_HOST, PACK, Graph, Host, after_loader, error_of, node, put, refused, said, small, without_cache

pytestmark = NEEDS_HOST
KIND = "FlowCacheKVCompressor"
SETTINGS = {"budget": 1.5, "unit": "chunks", "policy": "importance-redundancy", "dtype": "as computed", "sink": 1, "recent": 0,
            "granularity": "token", "offload": False, "soft": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("comfy")
    (base / "models" / "salience").mkdir(parents=True)
    shutil.copy(BUNDLED, base / "models" / "salience" / "mine.safetensors")
    with Host(base) as running:
        yield running


@pytest.fixture
def graph() -> Graph:
    """Three chunks of three latent frames, two steps, behind Chunkwise Cache."""
    whole = json.loads((PACK / "workflows" / "api" / "text_to_video.json").read_text())
    return put(put(small(whole, 2, 33), "FlowCacheLatent", width=64, height=64), "FlowCacheChunkwise", preset="custom")


def before(graph: Graph, **settings: Any) -> Graph:
    """With KV Compressor right behind the loader."""
    return after_loader(graph, KIND, **{**SETTINGS, **settings})


def behind(graph: Graph, kind: str, **settings: Any) -> Graph:
    """With KV Compressor between a cache node and everything that took its MODEL."""
    out, source = copy.deepcopy(graph), [node(graph, kind), 0]
    for one in out.values():
        one["inputs"] = {k: ["extra", 0] if v == source else v for k, v in one["inputs"].items()}
    return {**out, "extra": {"class_type": KIND, "inputs": {"model": source, **SETTINGS, **settings}}}


def test_saved_workflows_keep_their_inputs_in_order(host: Host) -> None:
    both = host.ask(f"/object_info/{KIND}")[KIND]["input"]
    inputs = both["required"]
    assert list(inputs) == ["model", *SETTINGS]
    assert list(both["optional"]) == ["policy_settings", "salience_head", "clean_pass", "positions"]
    assert [name for name, spec in inputs.items() if spec[1].get("advanced")] == ["sink", "recent", "granularity", "offload", "soft"]
    assert inputs["policy"][1]["default"] == "even"


def test_a_budget_for_all_of_history_equals_the_graph_without_the_node_bit_for_bit(host: Host, graph: Graph) -> None:
    assert torch.equal(host.latents(before(graph, budget=100)), host.latents(graph))


def test_a_plan_chains_with_it_and_a_budget_for_all_of_history_changes_nothing(host: Host, graph: Graph) -> None:
    made = put(put(graph, "BasicScheduler", steps=6), "FlowCacheChunkwise", preset="balanced")
    film = host.latents(made)
    assert torch.equal(host.latents(before(made, budget=100)), film)
    assert not torch.equal(host.latents(before(made)), film)


def test_under_bidirectional_attention_it_is_refused_beside_a_plan_too_and_alone_to_blame(host: Host, graph: Graph) -> None:
    both = put(put(before(graph), "FlowCacheChunkwise", preset="balanced"), "FlowCacheSampler", attention=BIDIRECTIONAL)
    refused(host, both, "^KV Compressor cannot work with .* there is no KV cache; .*or bypass KV Compressor$")


def test_it_chains_with_chunkwise_cache_in_either_order(host: Host, graph: Graph) -> None:
    """Neither node takes away what the other one set."""
    cached = put(graph, "FlowCacheChunkwise", threshold=10, warmup_steps=1)
    cached = put(cached, "BasicScheduler", steps=4)
    first, last = host.latents(before(cached)), host.latents(behind(cached, "FlowCacheChunkwise"))
    assert torch.equal(first, last)
    assert not torch.equal(first, host.latents(cached))
    assert not torch.equal(first, host.latents(before(without_cache(cached))))


def test_it_chains_with_motion_cache_in_either_order(host: Host) -> None:
    whole = json.loads((PACK / "workflows" / "api" / "motion_cache.json").read_text())
    moving = put(put(small(whole, 6, 33), "FlowCacheLatent", width=64, height=64), "FlowCacheMotion", threshold=0.3, coarse=0.2)
    sampler = node(moving, "SamplerCustomAdvanced")
    kept = ("FlowCacheLoadModel", "CLIPTextEncode", "FlowCacheLatent", "FlowCacheMotion", "CFGGuider", "RandomNoise", "BasicScheduler")
    moving = {k: v for k, v in moving.items() if k == sampler or v["class_type"] in (*kept, "FlowCacheSampler")}
    first, last = host.latents(before(moving)), host.latents(behind(moving, "FlowCacheMotion"))
    assert torch.equal(first, last)
    assert not torch.equal(first, host.latents(moving))


def test_two_runs_are_equal(host: Host, graph: Graph) -> None:
    once = host.latents(before(graph))
    assert torch.isfinite(once).all()
    assert torch.equal(once, host.latents(put(before(graph), "FlowCacheLatent", snap="down")))
    assert not torch.equal(once, host.latents(graph))


def test_every_policy_runs_and_the_control_makes_another_film(host: Host, graph: Graph) -> None:
    names = host.ask(f"/object_info/{KIND}")[KIND]["input"]["required"]["policy"][1]["options"]
    films = {name: host.latents(before(graph, policy=name)) for name in names}
    assert all(torch.isfinite(film).all() for film in films.values())
    assert not torch.equal(films["random"], films["importance-redundancy"])


def test_settings_of_a_policy_count_and_wrong_ones_are_refused(host: Host, graph: Graph) -> None:
    plain, asked = (before(graph, budget=1.7, policy_settings=settings) for settings in ("", "lam=1, queries=chunk"))
    assert not torch.equal(host.latents(plain), host.latents(asked))
    text = said(host, before(graph, budget=1.7, policy_settings=" lam=0.9, queries=chunk"), KIND)
    assert "chosen by importance-redundancy (lam=0.9, queries=chunk), token by token" in text
    refused(host, before(graph, policy_settings="lamb=1"), r"^importance-redundancy has no setting 'lamb': it has lam=0\.07, kernel=7, queries=frame")


def test_a_salience_head_in_the_models_folder_can_be_chosen(host: Host, graph: Graph) -> None:
    heads = host.ask(f"/object_info/{KIND}")[KIND]["input"]["optional"]["salience_head"][1]["options"]
    assert heads == ["of the bundled model", "mine.safetensors"]
    bundled, mine = (host.latents(before(graph, policy="salience", salience_head=head)) for head in heads)
    assert torch.equal(bundled, mine)


def test_even_says_that_what_is_kept_counts_for_what_went(host: Host, graph: Graph) -> None:
    sentence = "what is kept of the rest counts for what went, each for up to"
    assert f"{sentence} 4" in said(host, before(graph, policy="even"), KIND)
    assert f"{sentence} 2.5" in said(host, before(graph, policy="even", policy_settings="stands_for=2.5"), KIND)
    assert sentence not in said(host, before(graph, policy="even", policy_settings="stands_for=1"), KIND)


def test_the_report_tells_and_shows_the_history(host: Host, graph: Graph) -> None:
    done = host.run(before(put(graph, "RandomNoise", noise_seed=3)))
    assert done["status"]["status_str"] == "success", error_of(done)
    shown = done["outputs"][node(graph, "FlowCacheReport")]
    assert len(shown["images"]) == 2
    text = "\n".join(shown["text"])
    assert "without the budget)" in text
    assert "history in tokens per layer: 48 after chunk 1 (" in text
    assert ", 72 after chunk 2 (" in text
    assert "history is kept to 72 tokens per layer: 4.5 latent frames of up to 6" in text
    assert "FlowCache: history is kept to 72 tokens per layer" in host.log.read_text()


def test_the_report_without_the_node_has_no_second_picture(host: Host, graph: Graph) -> None:
    done = host.run(put(graph, "RandomNoise", noise_seed=4))
    assert len(done["outputs"][node(graph, "FlowCacheReport")]["images"]) == 1


def test_the_node_says_in_words_what_was_set(host: Host, graph: Graph) -> None:
    text = said(host, before(graph, budget=1.7, granularity="frame", sink=2), KIND)
    assert "history is kept to 1.7 chunks; what goes is chosen by importance-redundancy, whole latent frames at a time" in text
    assert "the film's first 2 latent frames and the latest chunk of history always stay" in text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"ar_step": 0}, "the budget saves nothing here: ar_step 0 denoises all chunks together"),
     ({}, "the budget saves nothing here: it has room for 30 latent frames, and the history of this film is never longer than 6")],
)  # fmt: skip
def test_a_budget_that_saves_nothing_is_said_to(host: Host, graph: Graph, settings: dict[str, Any], sentence: str) -> None:
    assert sentence in said(host, put(before(graph, budget=10.0), "FlowCacheSampler", **settings), "FlowCacheReport")


def test_too_small_a_budget_is_refused_before_weights_load(host: Host, graph: Graph) -> None:
    host.ask("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    loads = host.log.read_text().count("Requested to load HostModel")
    refused(host, before(graph, budget=1.0), r"a budget of 1 chunks is 3\.0 latent frames, but history needs 4: .* use 1\.334 chunks or more")
    assert host.log.read_text().count("Requested to load HostModel") == loads, "no weights are loaded for a refusal"


def test_bidirectional_attention_is_refused(host: Host, graph: Graph) -> None:
    both = put(before(graph), "FlowCacheSampler", attention=BIDIRECTIONAL)
    refused(host, both, r"Chunkwise Cache and KV Compressor cannot work with the attention of AR Chunk Sampler")
    sentence = r"KV Compressor cannot work with .* there is no KV cache; set attention to block-causal \(KV cache\), or bypass KV Compressor"
    refused(host, without_cache(both), f"^{sentence}")


def test_a_stock_sampler_is_refused(host: Host, graph: Graph) -> None:
    stock = without_cache({**graph, node(graph, "FlowCacheSampler"): {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}})
    del stock[node(stock, "FlowCacheReport")]
    refused(host, before(stock), "^KV Compressor works with the AR Chunk Sampler: connect that node to the sampler input, or bypass KV Compressor")


def test_an_interrupted_run_leaves_the_next_one_right(host: Host, graph: Graph) -> None:
    base = before(graph)
    first = host.latents(base)
    long = put(put(base, "BasicScheduler", steps=300), "RandomNoise", noise_seed=9)
    host.interrupt(put(long, "FlowCacheLatent", length=57, width=128, height=128), after=6)
    assert torch.equal(host.latents(base), first)
