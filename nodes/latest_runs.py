"""The latest message of every sampler's run, for a page that was loaded after it was sent.

GET /flowcache/runs?workflow=ID answers with those of a workflow, GET /flowcache/film?run=NAME with the messages of a run's partial film.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

from .latest_films import FILMS

KEPT = 32
"""Runs, of all workflows. One of 500 chunks x 64 steps takes some 40 kB."""
RUNS, FILM = "/flowcache/runs", "/flowcache/film"

Message = dict[str, Any]


class LatestRuns:
    """By workflow and sampler, those that were told of last at the end."""

    def __init__(self) -> None:
        self._of: dict[tuple[str | None, str], Message] = {}
        self._lock = Lock()

    def put(self, message: Message) -> None:
        """A message of `LivePanel`. One that has not all chunks adds to what is known of its run."""
        key = message["workflow"], message["node"]
        with self._lock:
            before = self._of.pop(key, None)
            self._of[key] = message if before is None or before["run"] != message["run"] else _joined(before, message)
            while len(self._of) > KEPT:
                del self._of[next(iter(self._of))]

    def of(self, workflow: str | None) -> list[Message]:
        with self._lock:
            return [message for (where, _), message in self._of.items() if where == workflow]


def _joined(before: Message, message: Message) -> Message:
    return {**message, "whole": True, "map": {**before["map"], **message["map"]}, "plan": message["plan"] or before["plan"]}


LATEST = LatestRuns()


def open_routes(server: Any) -> None:
    """Where a page asks. `server`: the host's."""
    from aiohttp import web

    @server.routes.get(RUNS)
    async def runs(request: Any) -> Any:
        return web.json_response(LATEST.of(request.rel_url.query.get("workflow")))

    @server.routes.get(FILM)
    async def film(request: Any) -> Any:
        return web.json_response(FILMS.of(request.rel_url.query.get("run")))
