"""Layout of the shipped graphs: every node has the room that it takes up after a run, in both renderers, and none lies over another.

`tests/web/sizes.json` is written from the page of a running host by `node tests/web/sizes.mjs URL FILM.mp4 tests/web/sizes.json`.
"""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest

from tests.host import PACK

SIZES = json.loads((PACK / "tests" / "web" / "sizes.json").read_text())
"""By renderer and kind of node: the least height, and what the renderer adds below the given one."""
NAMES = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))
TITLE = 30
"""Pixels of a node's title, which is above its place."""
BLUEPRINT = PACK / "subgraphs" / "Text to Video (FlowCache).json"
Node = dict[str, Any]


def graph(name: str) -> list[Node]:
    return list(json.loads((PACK / "workflows" / f"{name}.json").read_text())["nodes"])


def kind(workflow: str, node: Node) -> str:
    if node["type"] == "MarkdownNote":
        return f"MarkdownNote of {workflow}"
    film = node["type"] == "FlowCacheSampler" and any(one["name"] == "vae" and one["link"] is not None for one in node["inputs"])
    return node["type"] + (" with a partial film" if film else "")


def box(renderer: str, workflow: str, node: Node) -> tuple[float, float, float, float]:
    """Left, top, right, bottom. Of a kind that was not measured the given height counts."""
    size = SIZES[renderer].get(kind(workflow, node), {"least": 0, "below": 0})
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE, left + width, top + max(height + size["below"], size["least"])


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def overlaps(renderer: str, workflow: str, nodes: list[Node]) -> list[tuple[int, int]]:
    boxes = {node["id"]: box(renderer, workflow, node) for node in nodes}
    return [(one, other) for one, other in combinations(boxes, 2) if overlap(boxes[one], boxes[other])]


@pytest.mark.parametrize("renderer", ["canvas", "vue"])
@pytest.mark.parametrize("name", NAMES)
def test_no_node_lies_over_another(name: str, renderer: str) -> None:
    assert overlaps(renderer, name, graph(name)) == []


@pytest.mark.parametrize("renderer", ["canvas", "vue"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_makes_no_node_grow(name: str, renderer: str) -> None:
    """Otherwise the graph would count as changed."""
    least = {node["id"]: SIZES[renderer].get(kind(name, node), {"least": 0})["least"] for node in graph(name)}
    assert {node["id"]: node["size"][1] for node in graph(name) if node["size"][1] < least[node["id"]]} == {}


def test_nodes_that_touch_overlap_only_with_their_titles() -> None:
    one = {"id": 1, "type": "VAEDecode", "pos": [0, 0], "size": [300, 200]}
    below = {"id": 2, "type": "VAEDecode", "pos": [0, 229], "size": [300, 200]}
    beside = {"id": 3, "type": "VAEDecode", "pos": [300, 0], "size": [300, 200]}
    assert overlaps("canvas", "any", [one, below, beside]) == [(1, 2)]


def test_nodes_of_the_blueprint_lie_apart() -> None:
    (inside,) = json.loads(BLUEPRINT.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    for renderer in SIZES:
        assert overlaps(renderer, "blueprint", inside["nodes"]) == []
