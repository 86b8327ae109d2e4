"""Workers that are running ComfyUI servers, by their own HTTP API: POST /prompt, GET /history, GET /view."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException, IncompleteRead
from pathlib import PurePosixPath
from threading import Event
from typing import Any
from urllib.parse import quote, urlencode

from ..untrusted import parsed, short
from .dispatch import Torn, first_line
from .manifest import REPORT
from .tasks import Failed, GraphTask, Made, Result

ANSWER_S = 30.0
"""Within which a server has to answer."""
POLL_S = 1.0
SILENT_S = 60.0
"""A server that does not answer for so long is lost, and one that was lost is given up."""
TRANSFERS = 3
"""Of one file, before it has not arrived."""
FILMS_TORN = 2
"""One after the other, before a server is set aside."""
ANSWER_BYTES = 64 << 20
FILM_BYTES = 4 << 30
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class HostLost(Exception):
    """It does not answer, or knows nothing of a film that it was given."""


@dataclass(frozen=True)
class Server:
    """One ComfyUI, by its address."""

    url: str

    def ask(self, path: str, body: object = None) -> Any:
        """JSON -> JSON; {} where nothing is answered. A refusal of a workflow is an answer. Raises OSError and HTTPException, and ValueError for
        what is no JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} if data else {})
        try:
            with OPENER.open(request, timeout=ANSWER_S) as answer:
                text = answer.read(ANSWER_BYTES + 1)
        except urllib.error.HTTPError as refusal:
            text = refusal.read(ANSWER_BYTES + 1) if refusal.code == 400 else b""
            if not text:
                raise
        return parsed(text.decode(), ANSWER_BYTES) if text.strip() else {}

    def file(self, saved: dict[str, str]) -> bytes:
        """Of the output folder, whole. Raises OSError and HTTPException, also where the connection ends before the file does."""
        with OPENER.open(f"{self.url}/view?{urlencode({**saved, 'type': 'output'})}", timeout=ANSWER_S) as answer:
            content = bytes(answer.read(FILM_BYTES))
            if answer.length:
                raise IncompleteRead(content, answer.length)
            return content

    def missing(self, kinds: Sequence[str]) -> list[str]:
        """Of these kinds of nodes, those that it has not."""
        return [kind for kind in kinds if kind not in self.ask(f"/object_info/{quote(kind, safe='')}")]

    def drop(self, number: str) -> None:
        """A film that nobody waits for."""
        with suppress(OSError, HTTPException, ValueError):
            self.ask("/queue", {"delete": [number]})
            self.ask("/interrupt", {"prompt_id": number})


@dataclass
class HostWorker:
    server: Server
    threads: ThreadPoolExecutor
    stopped: Event
    given: str = ""
    """The number by which the server knows what it was given; "" while it has nothing."""
    torn: int = 0
    """Films that did not arrive whole, one after the other."""

    def start(self) -> Future[str]:
        return self.threads.submit(self._start)

    def render(self, task: GraphTask) -> Future[Result]:
        return self.threads.submit(self._render, task)

    def renewed(self) -> HostWorker:
        """The same, once it answers again."""
        return self

    def drop(self) -> None:
        if self.given:
            self.server.drop(self.given)
            self.given = ""

    def _start(self) -> str:
        self._patiently("/queue")
        self.drop()
        return self.server.url

    def _render(self, task: GraphTask) -> Result:
        began = time.perf_counter()
        try:
            answer = self.server.ask("/prompt", {"prompt": task.graph})
        except (OSError, HTTPException, ValueError) as error:
            raise HostLost(f"{self.server.url}: {error}") from error
        self.given = str(answer.get("prompt_id", ""))
        if refusal := _refusal(answer):
            self.drop()
            return Failed(refusal, self.server.url)
        done = self._wait()
        self.given = ""
        return self._made(done, began)

    def _wait(self) -> dict[str, Any]:
        """-> what the history has of the film. Raises HostLost."""
        unknown = 0
        while unknown < 3:
            if self.stopped.wait(POLL_S):
                raise HostLost("the command was stopped")
            if done := self._patiently(f"/history/{self.given}").get(self.given):
                return dict(done)
            queue = self._patiently("/queue")
            known = [one[1] for name in ("queue_running", "queue_pending") for one in queue.get(name, [])]
            unknown = 0 if self.given in known else unknown + 1
        raise HostLost(f"{self.server.url} was started anew and knows nothing of the film")

    def _patiently(self, path: str) -> Any:
        """Raises HostLost where the server is silent for too long."""
        began = time.monotonic()
        while True:
            try:
                return self.server.ask(path)
            except (OSError, HTTPException, ValueError) as error:
                if time.monotonic() - began > SILENT_S or self.stopped.wait(POLL_S):
                    raise HostLost(f"{self.server.url}: {error}") from error

    def _made(self, done: dict[str, Any], began: float) -> Result:
        if why := _error_of(done):
            return Failed(why, self.server.url)
        saved = saved_of(done)
        if not saved:
            return Failed("the workflow saved nothing in the output folder: end it with a node such as Save Video", self.server.url)
        contents = [self._fetched(one) for one in saved]
        self.torn = 0
        ends = [PurePosixPath(one["filename"]).suffix or ".bin" for one in saved]
        numbered = ends if len(ends) == 1 and ends != [REPORT] else [f"-{number}{end}" for number, end in enumerate(ends, 1)]
        films = dict(zip(numbered, contents, strict=True))
        return Made(films, {"host": self.server.url, "saved": saved, "texts": _texts(done)}, time.perf_counter() - began, self.server.url)

    def _fetched(self, saved: dict[str, str]) -> bytes:
        """A file of a film. It lies on the server, so a connection that ends is made again. Raises HostLost where the server refuses the file or is
        silent, and Torn where it answers and the file does not arrive."""
        for _ in range(TRANSFERS):
            try:
                return self.server.file(saved)
            except urllib.error.HTTPError as error:
                raise HostLost(f"{self.server.url}: {error}") from error
            except (OSError, HTTPException) as error:
                why = first_line(error)
                if self.stopped.wait(POLL_S):
                    raise HostLost("the command was stopped") from error
        self._patiently("/queue")
        self.torn += 1
        films = f"{self.torn} films one after the other and sent none of them" if self.torn > 1 else "a film and did not send it"
        raise Torn(f"{self.server.url} made {films} whole in {TRANSFERS} tries ({why})", self.torn >= FILMS_TORN)


@dataclass
class HostFleet:
    workers: tuple[HostWorker, ...]
    lost: tuple[type[BaseException], ...] = field(default=(HostLost,))

    def __str__(self) -> str:
        return f"{len(self.workers)} ComfyUI server{'s' * (len(self.workers) > 1)}"


@contextmanager
def host_fleet(urls: Sequence[str], tasks: Sequence[GraphTask]) -> Iterator[HostFleet]:
    """Raises ValueError, with the way out, for a server that does not answer or lacks a node that the films need."""
    servers = [_server(url) for url in dict.fromkeys(url.rstrip("/") for url in urls)]
    for server in servers:
        _require_nodes(server, tasks)
    stopped = Event()
    with ThreadPoolExecutor(len(servers)) as threads:
        fleet = HostFleet(tuple(HostWorker(server, threads, stopped) for server in servers))
        try:
            yield fleet
        finally:
            stopped.set()
            for worker in fleet.workers:
                worker.drop()


def _server(url: str) -> Server:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--host {short(url)} is no address: write http://HOST:PORT")
    return Server(url)


def _require_nodes(server: Server, tasks: Sequence[GraphTask]) -> None:
    lines: dict[str, int] = {}
    for task in tasks:
        for one in task.graph.values():
            lines.setdefault(one["class_type"], task.line)
    try:
        missing = server.missing(list(lines))
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"no ComfyUI answers at {server.url} ({error}): start one there, or leave it out") from None
    if missing:
        raise ValueError(f"line {lines[missing[0]]} needs the node {short(missing[0])}, which {server.url} does not have: install its pack there")


def _refusal(answer: dict[str, Any]) -> str:
    """Why a workflow was not taken as a whole; "" where it was."""
    errors = answer.get("node_errors") or {}
    if "prompt_id" in answer and not errors:
        return ""
    found = [(one.get("class_type", "node"), error) for one in errors.values() for error in one.get("errors", [])]
    each = [f"{kind}: {error.get('message')} ({error.get('details')})" for kind, error in found]
    message = (answer.get("error") or {}).get("message", "its outputs cannot be made")
    return short(f"ComfyUI refused the workflow: {'; '.join(each) or message}", 500)


def _error_of(done: dict[str, Any]) -> str:
    status = done.get("status") or {}
    if status.get("status_str") == "success":
        return ""
    for kind, data in status.get("messages", []):
        if kind == "execution_error":
            return short(f"{data.get('node_type')}: {str(data.get('exception_message')).strip()}", 500)
    return "it was interrupted on the server"


def saved_of(done: dict[str, Any]) -> list[dict[str, str]]:
    """What output nodes have written to the output folder, in their order and each once: name and subfolder."""
    found = []
    for shown in (done.get("outputs") or {}).values():
        for one in (one for values in shown.values() if isinstance(values, list) for one in values):
            if isinstance(one, dict) and one.get("type") == "output" and isinstance(one.get("filename"), str):
                file = {"filename": one["filename"], "subfolder": str(one.get("subfolder", ""))}
                found += [file] if file not in found else []
    return found


def _texts(done: dict[str, Any]) -> dict[str, list[str]]:
    """What nodes have shown, such as the report of a run."""
    shown = {node: values.get("text") for node, values in (done.get("outputs") or {}).items()}
    return {node: [str(one) for one in texts] for node, texts in shown.items() if isinstance(texts, list)}
