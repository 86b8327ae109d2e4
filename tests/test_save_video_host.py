"""Save AR Video in a real ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import pytest

from tests.host import NEEDS_HOST, Graph, Host, error_of, node, put, refused, small, without_cache

pytestmark = NEEDS_HOST


def saving(graph: Graph, name: str, **inputs: Any) -> Graph:
    """The graph with Save AR Video behind the sampler, in place of Save Video."""
    out = {key: one for key, one in without_cache(graph).items() if one["class_type"] not in ("SaveVideo", "CreateVideo")}
    film = {"samples": [node(graph, "SamplerCustomAdvanced"), 0], "vae": [node(graph, "FlowCacheLoadModel"), 2]}
    settings = {"filename_prefix": f"video/{name}", "fps": [node(graph, "FlowCacheLatent"), 2], "crf": 19, "images_out": False}
    return {**out, "stream": {"class_type": "FlowCacheSaveVideo", "inputs": {**settings, **film, **inputs}}}


def saved(host: Host, graph: Graph) -> tuple[list[Path], str]:
    """The films of a run that has to succeed, and what the node says."""
    done = host.run(graph)
    assert done["status"]["status_str"] == "success", error_of(done)
    shown = done["outputs"]["stream"]
    return [host.base / "output" / one["subfolder"] / one["filename"] for one in shown["images"]], "\n".join(shown["text"])


@pytest.mark.parametrize("length", [9, 21])
def test_the_stream_is_the_film_decoded_whole_bit_for_bit(host: Host, graph: Graph, length: int) -> None:
    """Compare Runs says so of the images before they are encoded."""
    both = saving(small(graph, 2, length), f"equal{length}", images_out=True)
    compare = {"film": ["stream", 1], "reference": [node(graph, "VAEDecode"), 0], "name": "stream", "difference": 4.0}
    done = host.run({**both, "compare": {"class_type": "FlowCacheCompare", "inputs": compare}})
    assert done["status"]["status_str"] == "success", error_of(done)
    assert f"stream is equal to the reference in every pixel of {length} frames of 128 x 128" in done["outputs"]["compare"]["text"][0]


def test_the_file_has_every_frame_the_rate_and_what_made_it(host: Host, graph: Graph) -> None:
    made = saving(small(graph, 2, 21), "meta", report=[node(graph, "FlowCacheReport"), 1])
    (path,), said = saved(host, made)
    with av.open(str(path)) as film:
        assert sum(1 for _ in film.decode(video=0)) == 21
        assert film.streams.video[0].average_rate == 24
        assert json.loads(film.metadata["prompt"]) == made
        assert json.loads(film.metadata["flowcache_report"])["chunk_steps"] == 4
    assert f"21 frames of 128 x 128 (0.88 s), {path.stat().st_size / 2**20:.2f} MiB: meta_00001_.mp4" in said
    assert "joints" not in said
    assert [one.name for one in path.parent.glob("meta*")] == [path.name]


def test_every_film_of_a_batch_is_a_file_and_goes_on_as_video(host: Host, graph: Graph) -> None:
    made = saving(put(small(graph, 2), "FlowCacheLatent", batch_size=2), "batch")
    again = {"video": ["stream", 0], "filename_prefix": "video/again", "format": "auto", "codec": "auto"}
    paths, _ = saved(host, {**made, "again": {"class_type": "SaveVideo", "inputs": again}})
    assert [path.name for path in paths] == ["batch_00001_.mp4", "batch_00002_.mp4"]
    assert len({path.read_bytes() for path in paths}) == 2
    assert len(list((host.base / "output" / "video").glob("again*.mp4"))) == 2


def test_images_are_saved_too(host: Host) -> None:
    picture = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 32, "batch_size": 20, "color": 0x204080}}
    settings = {"filename_prefix": "pictures", "fps": 12.0, "crf": 19, "images_out": False, "images": ["picture", 0]}
    graph = {"picture": picture, "stream": {"class_type": "FlowCacheSaveVideo", "inputs": settings}}
    (path,), said = saved(host, graph)
    assert "20 frames of 64 x 32 (1.67 s)" in said
    with av.open(str(path)) as film:
        assert sum(1 for _ in film.decode(video=0)) == 20
    refused(host, put(graph, "EmptyImage", width=63), "the film is 63 x 32 pixels and mp4 needs even numbers")


def test_what_is_connected_wrongly_is_refused_before_anything_runs(host: Host, graph: Graph) -> None:
    made = saving(small(graph, 2), "wrong")
    runs = host.log.read_text().count("HostModel")
    for inputs, sentence in (({"images": [node(graph, "VAEDecode"), 0]}, "both are connected"), ({"vae": None}, "connect vae, or images"),
                             ({"vae": None, "samples": None}, "connect samples and vae, or images")):  # fmt: skip
        wrong = put(made, "FlowCacheSaveVideo", **inputs)
        wrong["stream"]["inputs"] = {key: value for key, value in wrong["stream"]["inputs"].items() if value is not None}
        only = {key: one for key, one in wrong.items() if one["class_type"] not in ("FlowCacheReport", "SaveVideo")}
        refused(host, only, f"Save AR Video takes samples with vae, or images.*{sentence}")
    assert host.log.read_text().count("HostModel") == runs


def test_nodes_behind_images_that_are_off_are_left_out(host: Host, graph: Graph) -> None:
    made = {**saving(small(graph, 2), "off"), "look": {"class_type": "PreviewImage", "inputs": {"images": ["stream", 1]}}}
    done = host.run(made)
    assert "stream" in done["outputs"]
    assert "look" not in done["outputs"]
    assert "look" in host.run(put(made, "FlowCacheSaveVideo", images_out=True))["outputs"]
