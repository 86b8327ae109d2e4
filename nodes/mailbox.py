"""Where the sampler leaves the report of a run, for the nodes that show it."""

from __future__ import annotations

from ..flowcache_core.run.report import RunReport


class Mailbox:
    """Where the runs of one sampler leave their report for Cache Report; it holds numbers, never tensors of a run."""

    def __init__(self) -> None:
        self.report: RunReport | None = None
        self.runs = 0

    def put(self, report: RunReport) -> None:
        self.report, self.runs = report, self.runs + 1

    @property
    def name(self) -> str:
        """Which run the report is of, where the sampler has made several."""
        return f"run {self.runs} of this sampler: " if self.runs > 1 else ""
