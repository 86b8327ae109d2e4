"""The subgraph blueprint: the whole chain as one node, its links whole, its nodes those of text_to_video."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.host import NEEDS_HOST, PACK, Host
from tests.node_texts import keys, read

FILE = PACK / "subgraphs" / "Text to Video (FlowCache).json"
INPUT, OUTPUT = -10, -20
"""Ids that the page gives the two ends of a subgraph."""


@pytest.fixture(scope="module")
def blueprint() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return read


@pytest.fixture(scope="module")
def inside(blueprint: dict[str, Any]) -> dict[str, Any]:
    (graph,) = blueprint["definitions"]["subgraphs"]
    (outer,) = blueprint["nodes"]
    assert outer["type"] == graph["id"]
    assert graph["name"] == outer["title"] == FILE.stem
    return graph  # type: ignore[no-any-return]


def test_both_ends_of_every_link_know_it(inside: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in inside["nodes"]}
    for link in inside["links"]:
        start = inside["inputs"][link["origin_slot"]] if link["origin_id"] == INPUT else nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
        end = inside["outputs"][link["target_slot"]] if link["target_id"] == OUTPUT else nodes[link["target_id"]]["inputs"][link["target_slot"]]
        assert link["id"] in (start.get("linkIds") or start["links"])
        assert link["id"] in (end.get("linkIds") or [end["link"]])
        assert start["type"] == end["type"] == link["type"]
    known = {link["id"] for link in inside["links"]}
    assert {slot["link"] for node in nodes.values() for slot in node.get("inputs", []) if slot.get("link") is not None} <= known
    assert max(known) <= inside["state"]["lastLinkId"]


def test_what_is_in_sight_belongs_to_a_node_inside(blueprint: dict[str, Any], inside: dict[str, Any]) -> None:
    (outer,) = blueprint["nodes"]
    assert [slot["name"] for slot in outer["inputs"]] == [slot["name"] for slot in inside["inputs"]]
    assert [slot["name"] for slot in outer["outputs"]] == [slot["name"] for slot in inside["outputs"]]
    kinds = {str(node["id"]): node["type"] for node in inside["nodes"]}
    texts = keys(read("en", "nodeDefs.json"))
    for node, widget in outer["properties"]["proxyWidgets"]:
        if kinds[node].startswith("FlowCache"):
            assert f"{kinds[node]}/inputs/{widget}/name" in texts


def test_our_nodes_list_all_of_their_inputs(inside: dict[str, Any]) -> None:
    """The page finds the value of a widget by its place among those that are listed."""
    texts = read("en", "nodeDefs.json")
    for node in inside["nodes"]:
        if node["type"] in texts:
            wanted, listed = list(texts[node["type"]]["inputs"]), [slot["name"] for slot in node["inputs"]]
            widgets = [slot["name"] for slot in node["inputs"] if "widget" in slot]
            assert sorted(listed) == sorted(wanted)
            assert widgets == [name for name in wanted if name in widgets]


def test_its_nodes_links_and_values_are_those_of_text_to_video(inside: dict[str, Any]) -> None:
    workflow = json.loads((PACK / "workflows" / "text_to_video.json").read_text(encoding="utf-8"))
    left_out = ("SaveVideo", "MarkdownNote")
    wanted = {node["id"]: (node["type"], node.get("widgets_values")) for node in workflow["nodes"] if node["type"] not in left_out}
    assert {node["id"]: (node["type"], node.get("widgets_values")) for node in inside["nodes"]} == wanted
    names = {(node["id"], slot): one["name"] for node in inside["nodes"] for slot, one in enumerate(node["inputs"])}
    ends = [(link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"]) for link in inside["links"]]
    inner = {(start, out, end, names[end, slot]) for start, out, end, slot in ends if start != INPUT and end != OUTPUT}
    slots = {(node["id"], slot): one["name"] for node in workflow["nodes"] for slot, one in enumerate(node.get("inputs", []))}
    assert inner == {(start, out, end, slots[end, slot]) for _, start, out, end, slot, _ in workflow["links"] if {start, end} <= set(wanted)}


@pytest.mark.host
@pytest.mark.skipif(NEEDS_HOST[1].args[0], reason=NEEDS_HOST[1].kwargs["reason"])
def test_the_host_lists_it(host: Host) -> None:
    listed = {key: one for key, one in host.ask("/global_subgraphs").items() if one["info"]["node_pack"].endswith("flowcache")}
    ((key, one),) = listed.items()
    assert one["name"] == FILE.stem
    assert json.loads(host.ask(f"/global_subgraphs/{key}")["data"])["nodes"][0]["title"] == FILE.stem
