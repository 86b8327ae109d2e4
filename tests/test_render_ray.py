"""`render` on a local Ray cluster of two workers: one of them is killed in mid-film."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flowcache_core import __main__ as command_line
from flowcache_core.fleet import ray_fleet
from flowcache_core.models.bundle import NETWORK, VAE, Bundle
from flowcache_core.run.generate import Job, generate
from flowcache_core.run.identity import digest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed: pip install -c constraints.txt -e '.[fleet]'"),
    pytest.mark.skipif(not (NETWORK.exists() and VAE.exists()), reason="the bundled weights are not in flowcache_core/models/weights"),
]
SMALL = {"frames": 33, "steps": 4, "size": 32, "ar_step": 4}
FILMS = [{"prompt": "red circle moves right", "seed": seed, **SMALL} for seed in range(8)]
POISON = {"prompt": "more than any memory", **SMALL, "size": 16, "width": 1 << 40}
WORKERS = ("--workers", "2", "--cores", "1", "--dtype", "float32")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """The command joins what this process has joined already."""
    import ray

    with ray_fleet.cluster(ray, ""):
        yield


def render(monkeypatch: pytest.MonkeyPatch, folder: Path, lines: list[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    """-> exit status, and the films of the manifest in the order of their lines."""
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("render", f"{folder / 'jobs.jsonl'}", "--out", f"{folder / 'out'}", *WORKERS)
    monkeypatch.setattr(sys, "argv", ["flowcache_core", *arguments])
    status = command_line.main()
    return status, json.loads((folder / "out" / "manifest.json").read_text())["films"]


def renderers() -> set[int]:
    """Processes of workers that are making a film: Ray writes the method into their titles."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::Renderer.render") and os.getpid() in ancestors(int(path.parent.name)):
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def ancestors(process: int) -> Iterator[int]:
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
        yield process


class Killer(threading.Thread):
    """Kills a worker as soon as a film under way has left a state."""

    def __init__(self, states: Path) -> None:
        super().__init__(daemon=True)
        self.states, self.killed, self.over = states, 0, threading.Event()

    def run(self) -> None:
        while not self.over.is_set() and not self.killed:
            if list(self.states.glob("*/*.safetensors")) and (found := renderers()):
                self.killed = min(found)
                os.kill(self.killed, signal.SIGKILL)
            time.sleep(0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux") or (os.cpu_count() or 1) < 2, reason="reads /proc, and needs two cores")
def test_a_worker_killed_in_mid_film_costs_no_film_and_doubles_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    killer = Killer(tmp_path / "out" / "states")
    killer.start()
    status, films = render(monkeypatch, tmp_path, FILMS)
    killer.over.set()
    killer.join()
    assert killer.killed
    assert (status, [film["state"] for film in films]) == (0, ["made"] * 8)
    assert sorted(film["tries"] for film in films) == [1] * 7 + [2]
    assert len({film["key"] for film in films}) == len(list((tmp_path / "out").glob("*.mp4"))) == 8
    assert not (tmp_path / "out" / "states").exists()

    lost = next(film for film in films if film["tries"] == 2)
    for film in (lost, next(film for film in films if film["tries"] == 1)):
        latents, _ = generate(bundle, Job.usual(bundle.family, **film["asked"]))
        assert json.loads((tmp_path / "out" / film["report"]).read_text())["latents"] == digest(latents)

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("red*")}
    status, films = render(monkeypatch, tmp_path, [*FILMS, POISON])
    assert (status, [film["state"] for film in films]) == (1, ["made"] * 8 + ["failed"])
    assert "memory" in films[8]["why"]
    assert {path: path.stat().st_mtime_ns for path in written} == written, "what was made is left alone"
