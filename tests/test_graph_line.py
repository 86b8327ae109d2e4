"""Lines of a jobs file for ComfyUI servers: what goes into which input of a workflow, and what is refused by its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowcache_core.fleet.graph_line import WORKFLOWS, GraphLines
from flowcache_core.fleet.hosts import host_fleet
from flowcache_core.fleet.jobs_file import read_tasks
from flowcache_core.fleet.tasks import GraphTask


def tasks(folder: Path, *lines: dict[str, Any]) -> list[GraphTask]:
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return read_tasks(path, GraphLines(folder).task)


SEVERAL = {"extend_video", "magi_extend_video"}
"""They make two films, each with a seed of its own."""


@pytest.mark.parametrize("path", sorted(path for path in WORKFLOWS.glob("*.json") if path.stem not in SEVERAL), ids=lambda path: path.stem)
def test_every_workflow_of_one_film_takes_a_prompt_and_a_seed(path: Path, tmp_path: Path) -> None:
    saved, (task,) = json.loads(path.read_text()), tasks(tmp_path, {"workflow": path.stem, "prompt": "a green star", "seed": 7})
    changed = {(node, name) for node, one in task.graph.items() for name, value in one["inputs"].items() if value != saved[node]["inputs"][name]}
    text = ("FlowCachePromptSchedule", "schedule") if path.stem == "causal_prompt_switch" else ("CLIPTextEncode", "text")
    assert {(saved[node]["class_type"], name) for node, name in changed} == {text, ("RandomNoise", "noise_seed")}
    assert task.stem.startswith("a-green-star-")


def test_inputs_are_set_by_id_title_or_class_and_make_another_film(tmp_path: Path) -> None:
    values = {"8.steps": 4, "Empty AR Video Latent.length": 9, "CFGGuider.cfg": 2.0}
    plain, changed = tasks(tmp_path, {"workflow": "text_to_video"}, {"workflow": "text_to_video", "set": values})
    assert (changed.graph["8"]["inputs"]["steps"], changed.graph["4"]["inputs"]["length"], changed.graph["6"]["inputs"]["cfg"]) == (4, 9, 2.0)
    assert plain.graph == json.loads((WORKFLOWS / "text_to_video.json").read_text())
    assert plain.key != changed.key


def test_a_workflow_of_ones_own_is_found_beside_the_jobs_file(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text((WORKFLOWS / "text_to_video.json").read_text())
    (mine,) = tasks(tmp_path, {"workflow": "mine.json", "seed": 3})
    (theirs,) = tasks(tmp_path, {"workflow": "text_to_video", "seed": 3})
    assert mine.key == theirs.key, "the same graph is the same film"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"prompt": "a"}, "line 1: it names no workflow"),
        ({"workflow": "text"}, "line 1: there is no workflow text: name a .json file in the API format, or one of .*text_to_video"),
        ({"workflow": "page.json"}, "line 1: page.json is no workflow in the API format"),
        ({"workflow": "text_to_video", "steps": 3}, "line 1: a film of a workflow has no setting steps"),
        ({"workflow": "text_to_video", "seed": -1}, "line 1: seed is -1"),
        ({"workflow": "text_to_video", "set": {"99.steps": 3}}, "line 1: set names 99.steps, and 0 nodes"),
        ({"workflow": "text_to_video", "set": {"CLIPTextEncode.text": "a"}}, "line 1: set names CLIPTextEncode.text, and 2 nodes"),
        ({"workflow": "text_to_video", "set": {"8.step": 3}}, "line 1: set names 8.step, and that node has no such input: it has .*steps"),
        ({"workflow": "text_to_video", "set": 3}, "line 1: set is 3: it must be an object"),
        ({"workflow": "extend_video", "seed": 3}, "line 1: its workflow does not say where the seed goes, 2 inputs could take it"),
    ],
)
def test_what_a_workflow_has_not_is_refused(line: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "page.json").write_text(json.dumps({"nodes": [], "links": []}))
    with pytest.raises(ValueError, match=sentence):
        tasks(tmp_path, line)


def test_a_server_that_does_not_answer_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    for url, sentence in (("http://127.0.0.1:1", "no ComfyUI answers at http://127.0.0.1:1"), ("127.0.0.1", "is no address: write http://")):
        with pytest.raises(ValueError, match=sentence), host_fleet([url], tasks(tmp_path, {"workflow": "text_to_video"})):
            pass
