"""Every workflow is there twice, for the page and for the API, and the two say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flowcache_core.policies.presets import PLANS
from flowcache_core.sampling.frames import FOUR_N_PLUS_1
from flowcache_core.sampling.schedule import ChunkSchedule
from tests.host import NEEDS_HOST, OPENER, Host

FOLDER = Path(__file__).parent.parent / "workflows"
NAMES = sorted(path.stem for path in (FOLDER / "api").glob("*.json"))
NOTES = {"Note", "MarkdownNote"}


def both(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return json.loads((FOLDER / f"{name}.json").read_text()), json.loads((FOLDER / "api" / f"{name}.json").read_text())


def test_there_is_one_of_each() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == NAMES
    assert {"text_to_video", "image_to_video", "extend_video", "long_text_to_video"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_have_the_same_nodes_links_and_values(name: str) -> None:
    page, api = both(name)
    nodes = {str(node["id"]): node for node in page["nodes"] if node["type"] not in NOTES}
    assert {key: node["type"] for key, node in nodes.items()} == {key: node["class_type"] for key, node in api.items()}
    drawn = {(str(target), nodes[str(target)]["inputs"][slot]["name"], str(source), out) for _, source, out, target, slot, _ in page["links"]}
    wired = {(key, name, *value) for key, node in api.items() for name, value in node["inputs"].items() if isinstance(value, list)}
    assert drawn == wired
    for key, node in api.items():
        shown = iter(nodes[key].get("widgets_values", []))
        for name, value in node["inputs"].items():
            if not isinstance(value, list):
                assert any(value == one for one in shown), f"{key} {name} = {value!r} is not among the page's values, or out of order"


@pytest.mark.parametrize("name", NAMES)
def test_the_page_s_links_agree_with_its_nodes(name: str) -> None:
    page, _ = both(name)
    nodes = {node["id"]: node for node in page["nodes"]}
    assert len(nodes) == len(page["nodes"])
    assert max(nodes) == page["last_node_id"]
    for link, source, out, target, slot, kind in page["links"]:
        assert link <= page["last_link_id"]
        assert nodes[source]["outputs"][out]["type"] == kind
        assert link in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_has_a_note(name: str) -> None:
    page, _ = both(name)
    assert any(len(node["widgets_values"][0]) > 100 for node in page["nodes"] if node["type"] in NOTES)


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_has_a_small_thumbnail(name: str) -> None:
    path = FOLDER / f"{name}.jpg"
    assert path.stat().st_size < 100_000
    with Image.open(path) as picture:
        assert picture.width >= 128


def test_fewer_steps_of_prove_it_take_at_least_the_compute_of_the_cached_run_and_hardly_more() -> None:
    """At the same share of a row between two chunks."""
    _, api = both("prove_it")
    whole, fewer = (api[key]["inputs"]["steps"] for key in ("8", "18"))
    apart, closer = (api[key]["inputs"]["ar_step"] for key in ("14", "19"))
    schedule = ChunkSchedule(FOUR_N_PLUS_1.latent(api["4"]["inputs"]["length"]), 3, whole, apart)
    plan = PLANS[api["5"]["inputs"]["preset"]].plan(schedule)
    computed = sum(map(len, plan.computed))
    assert schedule.chunks * (fewer - 1) < computed <= schedule.chunks * fewer
    assert closer / fewer == apart / whole


@pytest.mark.host
@pytest.mark.skipif(NEEDS_HOST[1].args[0], reason=NEEDS_HOST[1].kwargs["reason"])
def test_the_host_lists_them_with_their_thumbnails(host: Host) -> None:
    assert sorted(host.ask("/workflow_templates")["flowcache"]) == NAMES
    for name in NAMES:
        with OPENER.open(f"{host.url}/api/workflow_templates/flowcache/{name}.jpg") as answer:
            assert answer.read() == (FOLDER / f"{name}.jpg").read_bytes()
