"""Messages to the page, at most ten a second: which chunk-steps were computed and which were reused or, by a plan, skipped."""

from __future__ import annotations

import logging
import time
from typing import Any

from server import PromptServer

from ..flowcache_core.run.footprint import readable
from ..flowcache_core.run.report import COMPUTED, RunReport

EVENT = "flowcache.steps"
PAUSE_S = 0.1


class LiveMap:
    """One run's messages to the tab that queued it: {"node", "map", "plan", "share", "done", "total", "eta_s", "note", "history"}.

    `map` and `plan` have a string per chunk and a digit per step, of `RunReport.map` and of 1 where the plan computes; `plan` is empty
    where nothing was settled before the run. `share` is of all tokens so far.
    """

    def __init__(self, node: str | None, total: int) -> None:
        self.node, self.total = node, total
        self._sent = time.perf_counter()

    def show(self, report: RunReport, done: int) -> None:
        server, now = getattr(PromptServer, "instance", None), time.perf_counter()
        if server is None or self.node is None or (0 <= now - self._sent < PAUSE_S and 1 < done < self.total):
            return
        self._sent = now
        run, all_run = (int((report.map == COMPUTED).sum()), int(report.planned.sum())) if report.plans else (done, self.total)
        left = report.wall_s / max(run, 1) * (all_run - run)
        rows, planned = (["".join(map(str, row)) for row in some] for some in (report.map, report.planned if report.plans else ()))
        note = report.notes[0] if report.notes else ""
        size = f"{report.history.tokens[-1]} tokens per layer, {readable(report.history.bytes[-1])}" if report.history.frames else ""
        message: dict[str, Any] = {
            "node": self.node, "map": rows, "share": report.share, "done": done, "total": self.total, "eta_s": left, "note": note,
            "history": size, "plan": planned,
        }  # fmt: skip
        try:
            server.send_sync(EVENT, message, server.client_id)
        except Exception as gone:  # a page that cannot be reached ends no run
            logging.debug(f"FlowCache: the live map was not sent: {gone}")
