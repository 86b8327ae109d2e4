"""The real front end in Chromium, in both renderers, before a backend that replays a recorded run: it needs no ComfyUI.

`tests/web/recorded.json` is written from a running host by `node tests/web/record.mjs URL workflows/text_to_video.json tests/web/recorded.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.host import PACK
from tests.test_palette import contrast

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
RECORDED = PACK / "tests" / "web" / "recorded.json"
NEEDED = "aiohttp, comfyui_frontend_package"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("PLAYWRIGHT_CORE"), reason="set PLAYWRIGHT_CORE to the folder of playwright-core to test the page"),
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"there is no Chromium at {CHROMIUM}: set CHROMIUM to test the page"),
]
Found = dict[str, Any]
WAITING = "While it runs, the steps that are computed and those that are skipped appear here."


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of the backend, run by the first Python that has what it needs."""
    pythons = [os.environ.get("PAGE_PYTHON"), os.environ.get("COMFYUI_PYTHON"), sys.executable]
    able = [python for python in pythons if python and not subprocess.run([python, "-c", f"import {NEEDED}"], capture_output=True).returncode]
    if not able:
        pytest.skip(f"set PAGE_PYTHON to a Python that has {NEEDED} to test the page without a host")
    command = [able[0], str(PACK / "tests" / "web" / "backend.py"), str(RECORDED)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as backend:
        assert backend.stdin is not None
        assert backend.stdout is not None
        yield backend.stdout.readline().strip()
        backend.stdin.close()
        backend.wait(10)


@pytest.fixture(scope="module", params=["canvas", "vue"])
def found(request: pytest.FixtureRequest, url: str) -> Found:
    command = ["node", str(PACK / "tests" / "web" / "replay.mjs"), url, str(RECORDED), request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def recorded_end() -> str:
    """The headline of the recorded run's last message."""
    *_, last = (data for kind, data in json.loads(RECORDED.read_text())["events"] if kind == "flowcache.steps")
    return str(last["headline"])


def test_nothing_breaks(found: Found) -> None:
    assert found["faults"] == []
    assert found["end"]["end"] == "success"


def test_node_and_sidebar_show_the_same_run(found: Found) -> None:
    (before,), (node,), (entry,) = found["before"]["nodes"], found["after"]["nodes"], found["after"]["list"]
    assert before.startswith(WAITING)
    assert node.startswith(recorded_end())
    assert entry.split("\n", 3)[0] == "✓"
    assert "AR Chunk Sampler #" in entry
    assert "finished" in entry
    assert entry.endswith(node)
    assert "has not run" in found["before"]["list"][0]


def test_the_film_plays_in_both(found: Found) -> None:
    assert "film so far: 0.9 s" in found["after"]["nodes"][0]
    films = [one["colours"] for one in found["painted"] if one["film"]]
    assert len(films) == 2
    assert min(films) > 100, "a picture, and no empty canvas"


def test_computed_and_skipped_differ_in_more_than_hue(found: Found) -> None:
    maps = [one["colours"] for one in found["painted"] if not one["film"]]
    assert len(maps) == 2
    assert min(maps) >= 3, "computed, skipped, and nothing"


def test_texts_stand_out_in_both_themes(found: Found) -> None:
    """The canvas renderer is tested in the dark theme, Nodes 2.0 in the light one; 4.5 is what WCAG 2 asks for."""
    assert contrast(*found["colours"]) > 4.5


def test_what_people_turn_of_a_node_takes_less_than_five_rows(found: Found) -> None:
    schemas = json.loads(RECORDED.read_text())["object_info"]
    assert set(found["rows"]) == {name for name in schemas if name.startswith("FlowCache")}
    beside = {"node_text", "live_panel", "more settings"}
    assert {node: names for node, rows in found["rows"].items() if len(names := set(rows) - beside) > 4} == {}


def test_what_ran_is_there_again_after_a_reload(found: Found) -> None:
    (node,), (entry,) = found["reloaded"]["nodes"], found["reloaded"]["list"]
    assert node.startswith(recorded_end())
    assert node.endswith("film so far: 0.9 s")
    assert "finished" in entry
    assert entry.endswith(node)


def test_what_ran_is_there_again_where_the_host_kept_every_result(found: Found) -> None:
    """In a copy of the workflow, of which neither page nor server knows a run."""
    (node,) = found["kept"]["nodes"]
    assert found["kept"]["end"]["end"] == "success"
    assert node.startswith(recorded_end())
    assert node.endswith("film so far: 0.9 s")


def test_a_click_brings_the_sampler_into_view_and_changes_no_graph(found: Found) -> None:
    assert (found["inView"], found["insideView"]) == (True, True)
    assert (found["changes"], found["changesInView"]) == ([], [])


def test_messages_in_no_order_of_no_node_or_of_another_workflow_change_nothing(found: Found) -> None:
    assert found["order"]["nodes"][0].startswith("message 5 of one, 5 s left")
    assert "running" in found["order"]["list"][0]
    assert found["order"]["list"][0].endswith("film so far: 0.4-0.7 s"), "from the strip after the gap on"
    assert found["healed"]["list"][0].endswith("film so far: 0.7 s"), "what was missing came late"


@pytest.mark.parametrize("end", ["interrupted", "error"])
def test_a_run_that_ends_early_is_told_as_stopped(found: Found, end: str) -> None:
    shown = found[end]
    assert shown["end"]["end"] == end
    assert ", stopped" in shown["nodes"][0].split("\n")[0]
    assert shown["list"][0].startswith("■")


def test_the_map_is_drawn_at_every_zoom(found: Found) -> None:
    assert all(min(colours) > 1 for colours in found["zoom"].values())


def test_drawing_is_bounded_work(found: Found) -> None:
    """A hundred messages of 500 chunks x 64 steps in one frame are drawn once on every panel, as one picture, not cell by cell."""
    panels, counts = found["large"]["panels"], found["large"]["once"]
    assert panels == 2
    assert set(counts) <= {"putImageData", "drawImage"}
    assert counts["putImageData"] <= 2 * panels
    assert counts["drawImage"] <= 4 * panels
    assert found["largeText"]["nodes"][0].startswith(f"message {found['large']['number']},")


def test_two_samplers_have_a_run_each(found: Found) -> None:
    assert [text.split(",")[0] for text in found["two"]["nodes"]] == ["message 1 of first", "message 2 of second"]
    assert [("first" in text, "second" in text) for text in found["two"]["list"]] == [(True, False), (False, True)]
    assert "Another sampler #" in found["two"]["list"][1]


def test_a_subgraph_that_is_used_twice_has_two_runs(found: Found) -> None:
    one, other = found["inside"]["list"]
    assert all(f" AR Chunk Sampler #{path}" in text for path, text in zip(found["paths"], (one, other), strict=True))
    assert "message 1 of first use" in one
    assert "message 2 of second use" in other
    assert all(text.startswith("message 2 of second use") for text in found["inside"]["nodes"]), "one node: what was told last"


def test_without_a_sampler_the_sidebar_says_so(found: Found) -> None:
    assert found["removed"] == {"nodes": [], "list": [], "sidebar": "There is no AR Chunk Sampler in this workflow."}
