"""Where the sampler leaves the reports of its runs, for the nodes that show them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from ..flowcache_core.run.report import RunReport

KEPT = 8
"""Runs of one sampler whose reports are kept: several may be shown in one workflow, or later."""
MARKED = 256
"""Elements of a film by which it is known again."""
NEAR = 0.02
"""How far the predicted clean latents that the host puts out beside the film may be from it."""


@dataclass(frozen=True)
class Mark:
    """By what a film of latents is known again, wherever it is copied to."""

    shape: tuple[int, ...]
    values: torch.Tensor

    @classmethod
    def of(cls, latents: torch.Tensor) -> Mark:
        flat = latents.flatten()
        return cls(tuple(latents.shape), flat[:: max(1, len(flat) // MARKED)].float().cpu())

    def apart(self, other: Mark) -> float:
        """The largest difference; infinite for another shape."""
        return float((self.values - other.values).abs().max()) if self.shape == other.shape else float("inf")


class Mailbox:
    """Where the runs of one sampler leave their reports: numbers, never tensors of a run. Each is known by the film that it is of."""

    def __init__(self) -> None:
        self.report: RunReport | None = None
        """Of the latest run."""
        self.runs = 0
        self._kept: deque[tuple[Mark, str, RunReport]] = deque(maxlen=KEPT)
        self._fresh: RunReport | None = None

    def put(self, report: RunReport) -> None:
        self.report, self._fresh, self.runs = report, report, self.runs + 1

    def sent(self, film: torch.Tensor) -> None:
        """The film of the run that has just ended, as the sampler hands it on. Raises RuntimeError where the sampler was not asked to make it."""
        if self._fresh is None:
            raise RuntimeError("the sampler was not asked for this film: a node that patches the model has made it; bypass that node")
        name = f"run {self.runs} of this sampler: " if self.runs > 1 else ""
        self._kept.appendleft((Mark.of(film), name, self._fresh))
        self._fresh = None

    def of(self, latents: Any) -> tuple[str, RunReport]:
        """Which run a film is of, where the sampler has made several, and its report. Raises ValueError for a film of no run."""
        mark = None if getattr(latents, "is_nested", False) else Mark.of(latents)
        apart, name, report = min(((mark.apart(one), *rest) for one, *rest in self._kept if mark), key=lambda one: one[0], default=(1.0, "", None))
        if report is None or not apart <= NEAR:
            raise ValueError(
                "there is no report of this latent: no run of this sampler made it. Connect latent to the output of the SamplerCustomAdvanced that "
                "uses the sampler, and give that one at least one step: with empty sigmas nothing runs"
            )
        return name, report
