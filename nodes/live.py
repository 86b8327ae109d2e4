"""Tells the page, at most ten times a second, which chunk-steps were computed and which were reused."""

from __future__ import annotations

import time
from typing import Any

from server import PromptServer

from ..flowcache_core.footprint import readable
from ..flowcache_core.report import RunReport

EVENT = "flowcache.steps"
PAUSE_S = 0.1


class LiveMap:
    """One run's messages to the tab that queued it: {"node", "map", "share", "done", "total", "eta_s", "note", "history"}."""

    def __init__(self, node: str | None, total: int) -> None:
        self.node, self.total = node, total
        self._began = self._sent = time.perf_counter()

    def show(self, report: RunReport, done: int) -> None:
        server, now = getattr(PromptServer, "instance", None), time.perf_counter()
        if server is None or self.node is None or (now - self._sent < PAUSE_S and 1 < done < self.total):
            return
        self._sent = now
        left = (now - self._began) / max(done, 1) * (self.total - done)
        rows = ["".join(map(str, row)) for row in report.map]
        note = report.notes[0] if report.notes else ""
        size = f"{report.history_tokens[-1]} tokens per layer, {readable(report.history_bytes[-1])}" if report.history else ""
        message: dict[str, Any] = {
            "node": self.node, "map": rows, "share": report.share, "done": done, "total": self.total, "eta_s": left, "note": note,
            "history": size,
        }  # fmt: skip
        server.send_sync(EVENT, message, server.client_id)
