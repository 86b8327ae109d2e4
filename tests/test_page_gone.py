"""The live panel and the console, without a host: whoever looks at a run may go away, and a clock may jump."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
PACK = "flowcache_as_the_host_has_it"
RUN = SimpleNamespace(steps=4, chunks=1, budget=None, rows=tuple((SimpleNamespace(index=0, step=step),) for step in range(4)))
"""One chunk of four steps, as far as those who look at a run know it."""


class Server:
    """Of the host, as far as the live panel knows it."""

    client_id = "page"

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone: Exception | None = None

    def send_sync(self, event: str, data: dict[str, Any], sid: str | None) -> None:
        if self.gone:
            raise self.gone
        self.sent.append(data)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    module, one = ModuleType("server"), Server()
    module.PromptServer = SimpleNamespace(instance=one)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server", module)
    return one


@pytest.fixture
def nodes(server: Server) -> Iterator[Callable[[str], Any]]:
    """Modules of nodes/ that need nothing of the host but its server."""
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec
    assert spec.loader
    sys.modules[PACK] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[PACK])
    yield lambda name: importlib.import_module(f"{PACK}.nodes.{name}")
    for name in [name for name in sys.modules if name.startswith(PACK)]:
        del sys.modules[name]


def report(nodes: Callable[[str], Any], steps: int = 4) -> Any:
    return importlib.import_module(f"{PACK}.flowcache_core.run.report").RunReport(1, steps)


@pytest.mark.parametrize("gone", [RuntimeError("Event loop is closed"), ConnectionResetError(), AttributeError("loop")])
def test_a_page_that_cannot_be_reached_ends_no_run(gone: Exception, nodes: Callable[[str], Any], server: Server) -> None:
    server.gone = gone
    live = nodes("live").LivePanel("7", RUN)
    for done in range(5):
        live.show(report(nodes), done)
    server.gone = None
    live.show(report(nodes), 4)
    assert len(server.sent) == 1, "and one that comes back is told again"


def test_without_a_page_or_a_server_nothing_is_sent(nodes: Callable[[str], Any], server: Server) -> None:
    live = nodes("live")
    live.LivePanel(None, RUN).show(report(nodes), 0)
    sys.modules["server"].PromptServer.instance = None  # type: ignore[attr-defined]
    live.LivePanel("7", RUN).show(report(nodes), 0)
    assert not server.sent


@pytest.mark.parametrize(
    "times", [[100.0], [1e6, 1e6 - 5, 0.0, 3.0, -1e9, 0.0], [0.0, 1e12, 2e12, 3e12, 4e12, 5e12]], ids=["stands", "backwards", "leaps"]
)
def test_the_time_left_is_never_negative_and_the_map_goes_on(
    times: list[float], nodes: Callable[[str], Any], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([*times, *[times[-1]] * 50])
    module = nodes("live")
    monkeypatch.setattr("time.perf_counter", lambda: next(calls))
    live, one = module.LivePanel("7", RUN), report(nodes)
    for done in range(5):
        live.show(one, done)
    assert all(re.fullmatch(r"|\d+ s left|\d+ min \d+ s left", sent["left"]) for sent in server.sent)
    assert server.sent[-1]["left"] == "0 s left"
    assert len(server.sent) >= 3, "the first two and the last are always sent"


def test_a_page_that_was_loaded_during_a_run_is_told_all_of_it(nodes: Callable[[str], Any], server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    latest, chunks = nodes("latest_runs"), 3
    monkeypatch.setattr(nodes("live"), "PAUSE_S", 0)
    item = (0, "prompt", {}, {"extra_pnginfo": {"workflow": {"id": "mine"}}}, [], {})
    server.prompt_queue = SimpleNamespace(get_current_queue=lambda: ([item], []))  # type: ignore[attr-defined]
    rows = tuple((SimpleNamespace(index=k, step=step),) for k in range(chunks) for step in range(4))
    run = SimpleNamespace(steps=12, chunks=chunks, budget=None, rows=rows)
    live, one = nodes("live").LivePanel("7", run), importlib.import_module(f"{PACK}.flowcache_core.run.report").RunReport(chunks, 4)
    live.show(one, 0)
    for done, (chunk,) in enumerate(rows, 1):
        one.map[chunk.index, chunk.step] = 2
        live.show(one, done, chunk)
    assert len(server.sent[-1]["map"]) == 1, "what is sent has what has changed"
    (known,) = latest.LATEST.of("mine")
    assert known["map"] == {"0": "2222", "1": "2222", "2": "2222"}
    assert (known["whole"], known["number"], known["ended"]) == (True, server.sent[-1]["number"], False)
    assert not latest.LATEST.of("another")
    live.stop()
    assert latest.LATEST.of("mine")[0]["stopped"]
    live.end(one)
    live.stop()
    assert "stopped" not in latest.LATEST.of("mine")[0], "what has ended was not stopped"


def test_of_few_runs_the_latest_is_kept(nodes: Callable[[str], Any], server: Server) -> None:
    latest = nodes("latest_runs")
    runs = latest.LatestRuns()
    for n in range(2 * latest.KEPT):
        runs.put({"workflow": "w", "node": str(n), "run": "r", "map": {}, "plan": None})
    assert [message["node"] for message in runs.of("w")] == [str(n) for n in range(latest.KEPT, 2 * latest.KEPT)]


class Closed:
    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise ValueError("I/O operation on closed file.")

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_console_that_is_closed_ends_no_run(nodes: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    progress = nodes("progress")
    monkeypatch.setattr(sys, "stderr", Closed())
    progress.say(["computed 4 of 4 chunk-steps"])


def test_what_a_callback_raises_ends_the_run(nodes: Callable[[str], Any]) -> None:
    """The host interrupts by raising there: it must not be swallowed."""

    def callback(*args: Any) -> None:
        raise KeyboardInterrupt

    progress = nodes("progress").Progress(torch.zeros(1, 2, 3, 4, 4), RUN, None, callback, True)
    chunk = SimpleNamespace(index=0, step=0, start=0, frames=3)
    with pytest.raises(KeyboardInterrupt):
        progress.step(report(nodes), chunk, torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 3, 4, 4))
