"""ComfyUI servers as workers, before servers that speak as much of its API as a fleet needs, and die."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flowcache_core.fleet import hosts
from flowcache_core.fleet.destination import Folder
from flowcache_core.fleet.dispatch import Dispatch, NoWorkers, Outcome
from flowcache_core.fleet.hosts import host_fleet, saved_of
from flowcache_core.fleet.manifest import MADE, NOT_MADE, Manifest
from flowcache_core.fleet.tasks import Failed, GraphTask, Made

GRAPH = {"1": {"class_type": "SaveVideo", "inputs": {}}}
SAVED = {"filename": "a_00001_.mp4", "subfolder": "video", "type": "output"}


class Served(BaseHTTPRequestHandler):
    """Every prompt is finished as soon as it is asked for; a server that `dies` is closed by its first prompt, one ends the connection while it
    sends a film, the first `tears` times."""

    server: Fake

    def do_GET(self) -> None:
        number = self.path.rsplit("/", 1)[-1]
        if self.path.startswith("/view"):
            self.server.tears, tears = self.server.tears - 1, self.server.tears > 0
            self.answer(b"a film", len(b"a film") // 2 if tears else None)
        elif self.path.startswith("/history") and number in self.server.prompts and not self.server.forgets:
            self.answer({number: {"status": {"status_str": "success"}, "outputs": {"1": {"images": [SAVED], "text": ["a report"]}}}})
        elif self.path.startswith("/object_info"):
            self.answer({number: {}})
        else:
            self.answer({"queue_running": [], "queue_pending": []} if self.path == "/queue" else {})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/prompt":
            number = f"{len(self.server.prompts)}"
            self.server.prompts.append(number)
            self.answer({"prompt_id": number, "node_errors": {}})
            if self.server.dies:
                self.server.socket.close()
        else:
            self.answer(b"")

    def answer(self, body: Any, sent: int | None = None) -> None:
        """`sent`: the connection ends after so many bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent])

    def log_message(self, *unused: Any) -> None: ...


class Fake(ThreadingHTTPServer):
    def __init__(self, dies: bool = False, forgets: bool = False, tears: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Served)
        self.dies, self.forgets, self.tears = dies, forgets, tears
        self.prompts: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fake]]:
    monkeypatch.setattr(hosts, "POLL_S", 0.01)
    monkeypatch.setattr(hosts, "SILENT_S", 0.1)
    monkeypatch.setattr(hosts, "ANSWER_S", 1.0)
    started: list[Fake] = []
    yield started
    for server in started:
        server.shutdown()
        server.server_close()


def start(servers: list[Fake], **how: int) -> str:
    servers.append(Fake(**how))
    threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
    return servers[-1].url


def tasks(count: int) -> list[GraphTask]:
    return [GraphTask(line, f"{line:016x}", "a", {}, GRAPH) for line in range(1, count + 1)]


def test_films_are_fetched_from_the_servers_that_made_them(servers: list[Fake]) -> None:
    urls = [start(servers), start(servers)]
    with host_fleet([*urls, f"{urls[0]}/"], tasks(5)) as fleet:
        assert len(fleet.workers) == 2, "one named twice is one"
        outcomes = list(Dispatch(tasks(5), fleet.workers, fleet.lost).outcomes())
    assert sorted(one.task.line for one in outcomes) == [1, 2, 3, 4, 5]
    assert sum(len(server.prompts) for server in servers) == 5
    for one in outcomes:
        assert isinstance(one.result, Made)
        assert (one.result.films, one.result.where in urls) == ({".mp4": b"a film"}, True)
        assert one.result.report["texts"] == {"1": ["a report"]}


@pytest.mark.parametrize("how", ["dies", "forgets"])
def test_a_server_that_dies_leaves_its_film_to_another(how: str, servers: list[Fake]) -> None:
    urls = [start(servers, **{how: True}), start(servers)]
    with host_fleet(urls, tasks(3)) as fleet:
        outcomes = list(Dispatch(tasks(3), fleet.workers, fleet.lost, tries=99).outcomes())
    assert sorted(one.task.line for one in outcomes) == [1, 2, 3]
    assert {one.result.where for one in outcomes} == {urls[1]}
    assert max(one.tries for one in outcomes) >= 2


def test_a_film_whose_transfer_is_torn_is_fetched_again_and_not_made_again(servers: list[Fake]) -> None:
    with host_fleet([start(servers, tears=2)], tasks(1)) as fleet:
        (outcome,) = Dispatch(tasks(1), fleet.workers, fleet.lost, tries=1).outcomes()
    assert isinstance(outcome.result, Made)
    assert outcome.result.films == {".mp4": b"a film"}
    assert len(servers[0].prompts) == 1


def test_a_server_that_tears_every_film_costs_the_others_nothing(servers: list[Fake]) -> None:
    urls = [start(servers, tears=99), start(servers)]
    with host_fleet(urls, tasks(6)) as fleet:
        outcomes = list(Dispatch(tasks(6), fleet.workers, fleet.lost, tries=1).outcomes())
    assert sorted(one.task.line for one in outcomes) == [1, 2, 3, 4, 5, 6]
    assert {(one.result.where, one.tries) for one in outcomes} == {(urls[1], 1)}
    assert 1 <= len(servers[0].prompts) <= hosts.FILMS_TORN


def test_a_server_that_tears_one_film_after_the_other_is_set_aside_with_a_sentence(servers: list[Fake]) -> None:
    url, told = start(servers, tears=99), []
    why = f"{url} made 2 films one after the other and sent none of them whole in 3 tries (IncompleteRead(3 bytes read, 3 more expected))"
    with host_fleet([url], tasks(3)) as fleet, pytest.raises(NoWorkers, match=re.escape(f"no worker is left ({why}): ")):
        list(Dispatch(tasks(3), fleet.workers, fleet.lost, tell=told.append).outcomes())
    assert told == [f"{why}, so it is given no more films"]
    assert len(servers[0].prompts) == hosts.FILMS_TORN


def test_a_server_that_tears_one_film_and_sends_the_next_stays(servers: list[Fake]) -> None:
    with host_fleet([start(servers, tears=hosts.TRANSFERS)], tasks(3)) as fleet:
        outcomes = {one.task.line: one.result for one in Dispatch(tasks(3), fleet.workers, fleet.lost).outcomes()}
    assert [isinstance(outcomes[line], Made) for line in (1, 2, 3)] == [False, True, True]
    assert isinstance(torn := outcomes[1], Failed)
    assert torn.why.startswith("it arrived whole from no worker: ")


def test_without_a_server_a_sentence_says_which_does_not_answer(servers: list[Fake]) -> None:
    url = start(servers, dies=True)
    with host_fleet([url], tasks(2)) as fleet, pytest.raises(NoWorkers, match=f"no worker is left \\({url}: "):
        list(Dispatch(tasks(2), fleet.workers, fleet.lost).outcomes())


def test_previews_are_not_taken_for_films_and_files_are_taken_once() -> None:
    shown = {"1": {"images": [SAVED, {**SAVED, "type": "temp"}], "animated": [True]}, "2": {"video": [SAVED], "text": ["a"]}}
    assert saved_of({"outputs": shown}) == [{"filename": "a_00001_.mp4", "subfolder": "video"}]


@pytest.mark.parametrize("saved", [["a.json"], ["a.mp4", "b.json", "c.png"]])
def test_what_a_workflow_saves_as_json_is_not_taken_for_the_report(
    saved: list[str], servers: list[Fake], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hosts, "saved_of", lambda done: [{"filename": name, "subfolder": ""} for name in saved])
    (task,), folder = tasks(1), Folder(tmp_path)
    with host_fleet([start(servers)], [task]) as fleet:
        (outcome,) = Dispatch([task], fleet.workers, fleet.lost).outcomes()
    assert isinstance(outcome.result, Made)
    for end, content in outcome.result.films.items():
        folder.write(f"{task.stem}{end}", content)
        assert Manifest(folder, [task], {}).entries[task.key]["state"] == NOT_MADE, "its report is written last"
    Manifest(folder, [task], {}).add(Outcome(task, outcome.result, 1))
    entry = Manifest(folder, [task], {}).entries[task.key]
    assert (entry["state"], len(entry["films"]), entry["report"]) == (MADE, len(saved), f"{task.stem}.json")
    assert {folder.read(name) for name in entry["films"]} == {b"a film"}
