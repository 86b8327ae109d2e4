"""Messages to the page, at most ten a second: which chunk-steps were computed, reused or, by a plan, skipped, and what that saves."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

import numpy as np

from ..flowcache_core.run.footprint import readable
from ..flowcache_core.run.report import COMPUTED, NOT_RUN, REFRESHED, RunReport
from ..flowcache_core.run.run import Run
from ..flowcache_core.sampling.chunk import Chunk
from .latest_runs import LATEST
from .page import Page

EVENT = "flowcache.steps"
PAUSE_S = 0.1
WHOLE_EVERY = 20
"""Of so many messages one has all chunks, for a tab that was loaded anew; the others have those that changed."""


class LivePanel:
    """One run's messages to the tab that queued it.

    `run` and `number` say in which order they belong. `map` has, by the number of a chunk, a letter per step: 0 has not run, 1 reused or skipped,
    2 computed, a to j computed in part, by tenths of its tokens. `plan` has a string per chunk and a 1 where the plan computes; None where it is
    as it was. `kept` is the share of the budget that history takes, `drift` that of the chunks under way. `workflow` is the id of the one that was
    queued. Sentences are ready to be shown: the page rounds nothing.
    """

    def __init__(self, page: Page, run: Run) -> None:
        self.page, self.name, self.number = page, uuid4().hex, 0
        self.total, self.budget = run.steps, run.budget.slots if run.budget else 0
        self._chunks = run.rows
        self._rows = {(chunk.index, chunk.step): n for n, row in enumerate(run.rows, 1) for chunk in row}
        self._row = 0
        self._sent = time.perf_counter()
        self._shown: list[str] = []
        self._last: dict[str, Any] = {}

    def show(self, report: RunReport, done: int, chunk: Chunk | None = None) -> None:
        """`chunk`: the one whose step is done; None before the first."""
        self._row = self._rows[chunk.index, chunk.step] if chunk else 0
        now = time.perf_counter()
        if 0 <= now - self._sent < PAUSE_S and 1 < done < self.total:
            return
        self._sent = now
        self._send(self.message(report, done))

    def end(self, report: RunReport) -> dict[str, Any]:
        """The last message, with all chunks; Cache Report sends it again where the host keeps the result."""
        self._shown = []
        message = {**self.message(report, self.total), "ended": True, "left": "", "drift": ""}
        self._send(message)
        return message

    def stop(self) -> None:
        """An error or an interrupt has ended the run; the page that watched it has been told so by the host."""
        if self._last and not self._last["ended"]:
            LATEST.put({**self._last, "stopped": True, "left": ""})

    def message(self, report: RunReport, done: int) -> dict[str, Any]:
        letters = letters_of(report)
        whole = not done or self.number % WHOLE_EVERY == 0 or not self._shown
        changed = {str(k): row for k, row in enumerate(letters) if whole or row != self._shown[k]}
        self._shown, self.number = letters, self.number + 1
        chunks, steps = report.map.shape
        return {
            "node": self.page.node, "workflow": self.page.workflow, "run": self.name, "number": self.number, "whole": whole,
            "chunks": chunks, "steps": steps, "map": changed,
            "plan": ["".join(map(str, row)) for row in report.planned] if whole and report.plans else None, "done": done, "total": self.total,
            "headline": self._headline(report, done), "pace": report.pace(self._row), "left": self._left(report, done),
            "drift": self._drift(report), "note": report.notes[0] if report.notes else "", **self._memory(report), "ended": False,
        }  # fmt: skip

    def _headline(self, report: RunReport, done: int) -> str:
        if not done:
            return report.notes[0] if report.notes else "begins"
        return f"step {done} of {self.total}: {report.share:.0%} of tokens computed"

    def _left(self, report: RunReport, done: int) -> str:
        run, all_run = (int((report.map == COMPUTED).sum()), int(report.planned.sum())) if report.plans else (done, self.total)
        seconds = round(report.wall_s / max(run, 1) * (all_run - run))
        return f"{seconds // 60} min {seconds % 60} s left" if seconds >= 60 else f"{seconds} s left" if run else ""

    def _drift(self, report: RunReport) -> str:
        """Of the chunks under way, "" where a policy goes by no drift."""
        row = self._chunks[self._row - 1] if self._row and report.drift.any() else ()
        under_way = [chunk for chunk in row if report.map[chunk.index, chunk.step] != NOT_RUN]
        if not under_way:
            return ""
        first, last = under_way[0].index + 1, under_way[-1].index + 1
        values = " ".join(f"{report.drift[chunk.index, chunk.step]:.2f}" for chunk in under_way)
        return f"drift of chunk {first}: {values}" if first == last else f"drift of chunks {first} to {last}: {values}"

    def _memory(self, report: RunReport) -> dict[str, Any]:
        if not report.history.frames:
            return {"memory": f"KV cache: {readable(report.kv_peak_bytes)}" if report.kv_peak_bytes else "", "kept": None}
        tokens, size = report.history.tokens[-1], readable(report.history.bytes[-1])
        return {"memory": f"history: {tokens} of {self.budget} tokens per layer, {size}", "kept": tokens / max(self.budget, 1)}

    def _send(self, message: dict[str, Any]) -> None:
        if self.page.server is None:
            return
        self._last = message
        LATEST.put(message)
        self.page.send(EVENT, message)


def letters_of(report: RunReport) -> list[str]:
    """A string per chunk, as `LivePanel` describes."""
    letters = np.array(list("012a"))[report.map]
    part = report.map == REFRESHED
    letters[part] = np.array(list("abcdefghij"))[(report.shares[part] * 10).astype(int).clip(0, 9)]
    return ["".join(row) for row in letters]
