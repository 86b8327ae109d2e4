"""Compare Runs in a real ComfyUI."""

from __future__ import annotations

import json
from typing import Any

from tests.host import NEEDS_HOST, Graph, Host, error_of, node, put, refused, small, without_cache

pytestmark = NEEDS_HOST


def compared(graph: Graph, other: Graph, **inputs: Any) -> Graph:
    """Both graphs in one, with Compare Runs between their films: `graph` is judged, `other` its reference."""
    merged = {**graph, **{f"r{key}": renamed(one) for key, one in other.items()}}
    film, report = node(graph, "VAEDecode"), node(graph, "FlowCacheReport")
    merged["compare"] = {
        "class_type": "FlowCacheCompare",
        "inputs": {"film": [film, 0], "reference": [f"r{film}", 0], "name": "cached", "difference": 4.0, "film_report": [report, 1],
                   "reference_report": [f"r{report}", 1], **inputs},
    }  # fmt: skip
    merged["json"] = {"class_type": "PreviewAny", "inputs": {"source": ["compare", 3]}}
    return merged


def renamed(one: dict[str, Any]) -> dict[str, Any]:
    return {**one, "inputs": {k: [f"r{v[0]}", v[1]] if isinstance(v, list) else v for k, v in one["inputs"].items()}}


def test_it_says_how_close_and_how_fast(host: Host, planned: Graph) -> None:
    done = host.run(compared(planned, without_cache(planned)))
    assert done["status"]["status_str"] == "success", error_of(done)
    shown, said = done["outputs"]["compare"], json.loads(done["outputs"]["json"]["text"][0])
    assert f"PSNR {said['psnr']:.1f} dB" in shown["text"][0]
    assert "times as fast" in shown["text"][0]
    assert shown["images"]
    assert said["frames"] == len(said["psnr_of_frames"]) == 33
    assert 5 < said["psnr"] < 100
    assert 0 < said["token_share"] < 1
    assert said["speedup"] == said["reference"]["seconds"] / said["film"]["seconds"]


def test_a_film_is_equal_to_itself(host: Host, graph: Graph) -> None:
    plain = without_cache(small(graph))
    done = host.run(compared(plain, plain))
    assert done["status"]["status_str"] == "success", error_of(done)
    assert "cached is equal to the reference in every pixel of 9 frames of 128 x 128" in done["outputs"]["compare"]["text"][0]


def test_films_of_another_length_and_texts_that_are_no_report_are_refused(host: Host, graph: Graph) -> None:
    plain = without_cache(small(graph))
    longer = put(plain, "FlowCacheLatent", length=21)
    refused(host, compared(longer, plain), "the film is 21 frames of 128 x 128 and the reference 9 frames of 128 x 128")
    no_report = compared(plain, plain, film_report=[node(plain, "FlowCacheReport"), 0])
    refused(host, no_report, "film_report is not the json of Cache Report")
