"""The real page in Chromium, in both renderers: texts of nodes are seen, few widgets are in sight, and workflows are saved as ever."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.host import NEEDS_HOST, PACK, Host

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
pytestmark = [
    *NEEDS_HOST,
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("PLAYWRIGHT_CORE"), reason="set PLAYWRIGHT_CORE to the folder of playwright-core to test the page"),
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no Chromium at {CHROMIUM}: set CHROMIUM to test the page"),
]
SAYING = {"FlowCacheLatent", "FlowCacheChunkwise", "FlowCacheSampler", "FlowCacheReport"}
Found = dict[str, Any]


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped workflow, as small as it makes sense."""
    graph = json.loads((PACK / "workflows" / "text_to_video.json").read_text())
    small = {"BasicScheduler": {1: 6}, "FlowCacheLatent": {0: 64, 1: 64, 2: 21}}
    for node in graph["nodes"]:
        for place, value in small.get(node["type"], {}).items():
            node["widgets_values"][place] = value
    path = tmp_path_factory.mktemp("page") / "small.json"
    path.write_text(json.dumps(graph))
    return path


@pytest.fixture(scope="module", params=["canvas", "vue"])
def found(request: pytest.FixtureRequest, host: Host, workflow: Path) -> Found:
    host.ask("/free", {"unload_models": True, "free_memory": True})
    command = ["node", str(PACK / "tests" / "web" / "check.mjs"), host.url, str(workflow), request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout), "vue": request.param == "vue"}


def test_nothing_breaks(found: Found) -> None:
    assert found["faults"] == []
    assert (found["end"]["end"], found["endAgain"]["end"]) == ("success", "success")


@pytest.mark.parametrize("when", ["after", "reloaded", "kept"])
def test_what_a_node_says_is_seen(found: Found, when: str) -> None:
    """After a run, when the page was loaded again, and in another page where the host kept every result."""
    shown = found[when]
    assert set(shown) == SAYING
    assert all(one["seen"] and one["height"] > 5 for one in shown.values()), shown
    assert shown["FlowCacheLatent"]["text"].startswith("21 frames (0.88 s) = 6 latent frames = 2 chunks of 3")
    assert shown["FlowCacheChunkwise"]["text"].startswith("balanced: 40% of all tokens are computed")
    assert "of 12 chunk-steps" in shown["FlowCacheReport"]["text"]
    assert "step 12 of 12" in shown["FlowCacheSampler"]["text"]
    assert "x as fast" in shown["FlowCacheSampler"]["text"]


def test_before_a_run_the_text_is_not_that_of_another(found: Found) -> None:
    assert all("appears here" in one["text"] or "appear here" in one["text"] for one in found["before"].values())


def test_report_and_panel_round_alike(found: Found) -> None:
    def share(kind: str) -> str:
        return str(found["after"][kind]["text"].split("% of")[0].split()[-1])

    assert share("FlowCacheSampler") == share("FlowCacheReport")


def test_what_people_turn_stands_first_and_alone(found: Found) -> None:
    rows, more = found["rows"], [] if found["vue"] else ["more settings"]
    assert rows["plan"]["FlowCacheChunkwise"] == ["preset", "target", *more, "node_text"]
    assert rows["share"]["FlowCacheChunkwise"] == ["preset", "target", "target_share", *more, "node_text"]
    assert rows["custom"]["FlowCacheChunkwise"] == ["preset", "target", "threshold", "warmup_steps", *more, "node_text"]
    assert rows["plan"]["FlowCacheSampler"] == ["ar_step", "attention", "solver", *more, "live_panel"]
    settings = [[name for name in names if name not in {"node_text", "live_panel", "more settings"}] for names in rows["plan"].values()]
    assert max(map(len, settings)) < 5


def test_nodes_2_draws_what_is_chosen(found: Found) -> None:
    if found["vue"]:
        assert found["drawn"]["FlowCacheChunkwise"] == ["preset", "target"]
        assert found["drawnShare"]["FlowCacheChunkwise"] == ["preset", "target", "target_share"]
        assert found["drawnCustom"]["FlowCacheChunkwise"] == ["preset", "target", "threshold", "warmup_steps"]


def test_a_workflow_is_saved_and_sent_as_it_was(found: Found, workflow: Path) -> None:
    nodes = {str(node["id"]): node for node in json.loads(workflow.read_text())["nodes"]}
    for key, node in nodes.items():
        if node["type"].startswith("FlowCache"):
            before, after = node.get("widgets_values") or [], found["saved"][key]
            assert after[: len(before)] == before, node["type"]
    api = json.loads((PACK / "workflows" / "api" / "text_to_video.json").read_text())
    mine = {key: node for key, node in api.items() if node["class_type"] in {"FlowCacheChunkwise", "FlowCacheSampler"}}
    for key, node in mine.items():
        assert node["inputs"] == {name: found["sent"][key]["inputs"][name] for name in node["inputs"]}
        assert set(found["sent"][key]["inputs"]) >= set(node["inputs"])


def test_a_workflow_of_before_there_were_presets_means_its_widgets(found: Found) -> None:
    old = found["old"]
    assert (old["preset"], old["target"], old["threshold"], old["warmup_steps"], old["signature"]) == ("custom", "off", 0.25, 3, "latent")
    assert (old["target_share"], old["plan"]) == (0.5, "")


def test_a_length_keeps_its_meaning_in_another_unit(found: Found) -> None:
    assert (found["seconds"], found["frames"]) == (2.38, 57)


def test_a_film_is_shown_while_it_grows_and_is_the_same_film(found: Found, host: Host) -> None:
    film, texts = found["film"], found["filmTexts"]
    assert (found["unseen"], found["endFilm"]["end"]) == (0, "success")
    assert sum(one["frames"] for one in film) == 21
    assert [one["first"] for one in film] == [sum(one["frames"] for one in film[:n]) for n in range(len(film))]
    assert len({one["run"] for one in film}) == 1
    assert "film so far: 0.9 s" in texts["FlowCacheSampler"]["text"]
    assert "21 frames were decoded and shown on the way" in texts["FlowCacheReport"]["text"]
    without, shown = (load_file(path)["latent_tensor"] for path in sorted((host.base / "output" / "latents").glob("*.latent"))[-2:])
    assert torch.equal(without, shown)


def test_messages_in_no_order_and_of_no_node_change_nothing(found: Found) -> None:
    assert found["order"].startswith("message 5, 5 s left")
    assert found["stopped"].startswith("message 5, stopped")


def test_a_sampler_in_a_subgraph_is_found(found: Found) -> None:
    assert found["inside"].startswith("a large run")


def test_the_recorded_schemas_are_those_of_the_host(host: Host) -> None:
    """Otherwise tests/web/recorded.json is to be written anew: tests/test_page.py says how."""
    recorded = json.loads((PACK / "tests" / "web" / "recorded.json").read_text())["object_info"]
    ours = {key: node for key, node in host.ask("/object_info").items() if key.startswith("FlowCache")}
    assert {key for key in recorded if key.startswith("FlowCache")} == set(ours)
    for key, node in ours.items():
        assert {name: recorded[key][name] for name in ("input_order", "output")} == {name: node[name] for name in ("input_order", "output")}


def test_every_input_and_output_says_what_it_is_for(host: Host) -> None:
    ours = {key: node for key, node in host.ask("/object_info").items() if key.startswith("FlowCache")}
    assert len(ours) >= 10
    for key, node in ours.items():
        assert all(node["output_tooltips"]), key
        for kind in ("required", "optional"):
            assert all(spec[1].get("tooltip") for spec in node["input"].get(kind, {}).values()), key
