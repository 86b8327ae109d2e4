"""`render --host`: films of workflows by a running ComfyUI, with the same manifest."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flowcache_core import __main__ as command_line
from flowcache_core.fleet.graph_line import GraphLines
from flowcache_core.fleet.hosts import host_fleet
from flowcache_core.fleet.jobs_file import read_tasks
from tests.films import read_film
from tests.host import NEEDS_HOST, Host

pytestmark = NEEDS_HOST
SHORT = {"FlowCacheLatent.length": 9, "FlowCacheLatent.width": 64, "FlowCacheLatent.height": 64, "BasicScheduler.steps": 2}
FILM = {"workflow": "text_to_video", "prompt": "green star moves left", "set": SHORT}
REFUSED = {**FILM, "set": {**SHORT, "FlowCacheSampler.solver": "magic"}}
FAILS = {**FILM, "set": {**SHORT, "FlowCacheSampler.ar_step": 0, "FlowCacheLatent.length": 401}}


def render(monkeypatch: pytest.MonkeyPatch, folder: Path, url: str, lines: list[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    """-> exit status, and the films of the manifest in the order of their lines."""
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(sys, "argv", ["flowcache_core", "render", f"{folder / 'jobs.jsonl'}", "--out", f"{folder / 'out'}", "--host", url])
    status = command_line.main()
    return status, json.loads((folder / "out" / "manifest.json").read_text())["films"]


def test_films_of_workflows_are_made_once_and_what_fails_is_named(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{**FILM, "seed": 1}, REFUSED, FAILS, {**FILM, "seed": 2}]
    status, films = render(monkeypatch, tmp_path, host.url, lines)
    assert (status, [film["state"] for film in films]) == (1, ["made", "failed", "failed", "made"])
    assert "ComfyUI refused the workflow: FlowCacheSampler: " in films[1]["why"]
    assert "use ar_step" in films[2]["why"], films[2]["why"]
    for film in (films[0], films[3]):
        assert read_film(tmp_path / "out" / film["films"][0]).shape == (9, 64, 64, 3)
        assert film["where"] == host.url
        assert "tokens" in str(json.loads((tmp_path / "out" / film["report"]).read_text())["texts"])

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("green*")}
    status, films = render(monkeypatch, tmp_path, host.url, [lines[0], lines[3]])
    assert (status, [film["state"] for film in films[:2]]) == (0, ["made"] * 2)
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_server_without_a_node_is_refused_before_anything_is_sent(host: Host, tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"workflow": "other.json"}))
    (tmp_path / "other.json").write_text(json.dumps({"1": {"class_type": "NoSuchNode", "inputs": {}}}))
    tasks = read_tasks(tmp_path / "jobs.jsonl", GraphLines(tmp_path).task)
    with pytest.raises(ValueError, match=r"line 1 needs the node NoSuchNode, which .* does not have"), host_fleet([host.url], tasks):
        pass
