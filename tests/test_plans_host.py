"""Plans in a real ComfyUI: the film is that of the core, and a budget is what is spent."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import torch

from flowcache_core.models.bundle import load_bundle
from flowcache_core.models.wan_vae import normalise
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.presets import PLANS, preset
from flowcache_core.run.generate import generate, generate_upstream
from flowcache_core.sampling.schedule import ChunkSchedule
from tests.host import (
    BIDIRECTIONAL,
    CHUNKWISE,
    NEEDS_HOST,
    Graph,
    Host,
    HostJob,
    error_of,
    node,
    put,
    refused,
    report_of,
    said,
    small,
)

pytestmark = NEEDS_HOST

EITHER = pytest.mark.parametrize("attention", ["block-causal (KV cache)", BIDIRECTIONAL])


@EITHER
def test_the_shipped_workflow_makes_the_film_that_the_core_makes(host: Host, planned: Graph, attention: str) -> None:
    job = HostJob("red circle moves right, blue square moves down", frames=33, steps=10, seed=1, size=64)
    if attention == BIDIRECTIONAL:
        ours, report = generate_upstream(load_bundle(), job, policy=preset("balanced"))
    else:
        ours, report = generate(load_bundle(), job, policy=preset("balanced"))
    made = put(planned, "FlowCacheSampler", attention=attention)
    theirs = host.latents(made)
    assert report.chunk_steps_computed < report.chunk_steps
    torch.testing.assert_close(normalise(theirs), ours, rtol=1e-2, atol=1e-2)
    assert torch.equal(host.latents(put(made, "FlowCacheLatent", snap="down")), theirs), "run again, bit for bit"


@EITHER
def test_a_planned_film_is_right_after_another_size_and_after_an_interrupt(host: Host, planned: Graph, attention: str) -> None:
    made = put(planned, "FlowCacheSampler", attention=attention)
    before = host.latents(made)
    assert host.latents(put(made, "FlowCacheLatent", width=96, height=64, length=21)).shape == (1, 16, 6, 8, 12)
    running = host.ask("/prompt", {"prompt": put(small(made, steps=60, length=57), "RandomNoise", noise_seed=9)})["prompt_id"]
    time.sleep(4)
    host.ask("/interrupt", {})
    end = time.monotonic() + 120
    while not (done := host.ask(f"/history/{running}")) and time.monotonic() < end:
        time.sleep(0.2)
    assert "execution_interrupted" in [kind for kind, _ in done[running]["status"]["messages"]]
    assert torch.equal(host.latents(put(made, "FlowCacheLatent", snap="up")), before)


@pytest.mark.parametrize("name", PLANS)
def test_a_preset_that_plans_serves_any_number_of_steps_and_says_what_it_does(host: Host, planned: Graph, name: str) -> None:
    for steps in (1, 2, 3, 7, 10, 16, 20, 24):
        made = put(put(planned, "BasicScheduler", steps=steps), CHUNKWISE, preset=name)
        done = host.run(put(made, "FlowCacheSampler", ar_step=1))
        assert done["status"]["status_str"] == "success", error_of(done)
        if steps == 1:  # later runs take the node from the host's cache
            shown = "\n".join(done["outputs"][node(made, CHUNKWISE)]["text"])
            assert re.match(rf"{name}: \d\d% of all tokens are computed; in which steps is settled before the run", shown)
        _, summary, *_, forecast, _ = "\n".join(done["outputs"][node(made, "FlowCacheReport")]["text"]).splitlines()
        expected, did = (re.findall(r"(\d+) of (\d+) chunk-steps|all (\d+) chunk-steps", line) for line in (forecast, summary))
        assert expected == did or expected == [("", "", did[0][1])]
        assert re.findall(r"\d+% of all tokens", forecast)[0] in summary


def test_a_plan_in_sections_of_a_long_film_is_reported_by_rows(host: Host, planned: Graph) -> None:
    made = put(put(small(planned, 8, 93), "FlowCacheLatent", width=64, height=64), "FlowCacheSampler", attention=BIDIRECTIONAL, ar_step=2)
    text = said(host, made, "FlowCacheReport")
    assert re.search(r"\d+ of \d+ rows \(\d+ of \d+ chunk-steps\) were to be computed, \d+% of all tokens", text)
    assert "computed " in text


@EITHER
@pytest.mark.parametrize(
    "settings",
    [
        {"target": "computed share", "target_share": 0.6},
        {"target": "speed-up", "target_speedup": 1 / 0.6},
        {"target": "seconds", "target_seconds": 1e6},
        {"target": "seconds", "target_seconds": 0.1},
    ],
)
def test_a_budget_on_a_preset_that_plans_is_kept(host: Host, planned: Graph, attention: str, settings: dict[str, Any]) -> None:
    made = put(put(put(planned, CHUNKWISE, **settings), "FlowCacheSampler", attention=attention), "RandomNoise", noise_seed=21)
    text = said(host, made, "FlowCacheReport")
    forecast = text[text.rindex("\n", 0, text.index(" to be computed")) + 1 :]
    (share,) = re.findall(r"(\d+)% of all tokens", forecast.splitlines()[0])[:1]
    if settings["target"] != "seconds":
        assert 45 <= int(share) <= 60
    elif settings["target_seconds"] == 1e6:
        assert forecast.startswith("all ")
        assert "so 1e+06 s are 100% of all tokens" in forecast
    else:
        assert int(share) < 60
        assert "all steps would take the network about" in forecast


@EITHER
def test_a_plan_goes_out_by_cache_report_and_comes_back(host: Host, planned: Graph, attention: str) -> None:
    made = put(put(planned, CHUNKWISE, preset="fast"), "FlowCacheSampler", attention=attention)
    report, film = report_of(host, made), host.latents(made)
    assert isinstance(report["plan"], list) == (attention == BIDIRECTIONAL)
    for text in (json.dumps(report), json.dumps(report["plan"])):
        again = put(made, CHUNKWISE, preset="custom", plan=text)
        assert "plan: the given plan says what is computed" in said(host, again, CHUNKWISE)
        assert torch.equal(host.latents(again), film)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"plan": "{"}, r"the plan is no JSON \(.*: give it what Cache Report writes as json"),
        ({"plan": "[1]"}, "this is no plan"),
        ({"plan": '{"plan": null}'}, "this report is of a run without a plan"),
        ({"plan": "{}", "target": "seconds"}, "was given a plan and target seconds, which contradict each other: empty plan, or set target to off"),
        ({"preset": "custom", "target": "seconds"}, "a budget in seconds is spent by a plan, but preset custom decides by threshold: set preset to"),
        ({"preset": "flowcache-fast", "target": "seconds"}, "but preset flowcache-fast decides by threshold"),
    ],
)
def test_budgets_that_contradict_and_plans_that_are_none_are_refused(host: Host, planned: Graph, settings: dict[str, Any], sentence: str) -> None:
    refused(host, put(planned, CHUNKWISE, **settings), sentence)


@pytest.mark.parametrize(
    ("steps", "settings", "sentence"),
    [
        (12, {}, "the plan is for 3 chunks of 10 steps, this run has 3 chunks of 12 steps"),
        (10, {"ar_step": 2}, "the plan is out of step: row "),
        (10, {"attention": BIDIRECTIONAL}, "the plan is for block-causal attention, and this run is bidirectional"),
    ],
)
def test_a_plan_of_another_run_is_refused_before_weights_move(
    host: Host, planned: Graph, steps: int, settings: dict[str, Any], sentence: str
) -> None:
    text = json.dumps(Planned(share=0.4).plan(ChunkSchedule(9, 3, 10, 5, 5)).as_dict())
    host.ask("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    before = host.log.read_text().count("Requested to load HostModel")
    other = put(put(put(planned, CHUNKWISE, plan=text), "BasicScheduler", steps=steps), "FlowCacheSampler", **settings)
    refused(host, put(other, "RandomNoise", noise_seed=31), sentence)
    assert host.log.read_text().count("Requested to load HostModel") == before, "no weights are loaded for a refusal"


def test_a_rule_that_depends_on_nothing_but_time_is_told_to_be_a_plan_too(host: Host, graph: Graph) -> None:
    sentence = "under signature time this rule is a plan too, only a worse one"
    assert sentence in said(host, put(graph, "RandomNoise", noise_seed=41), CHUNKWISE)
    assert sentence not in said(host, put(graph, CHUNKWISE, signature="latent"), CHUNKWISE)
