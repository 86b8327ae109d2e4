"""Where the sampler leaves the reports of its runs, for the nodes that show them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from ..flowcache_core.run.report import RunReport

KEPT = 64
"""Runs of one sampler whose reports are kept: the host keeps films of earlier prompts, and their nodes may be run again."""
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


@dataclass(frozen=True)
class Kept:
    """What is kept of a run. `number`: which of this sampler's runs it was, from 1; `panel`: the last message of the live panel."""

    number: int
    report: RunReport
    panel: dict[str, Any]


class Mailbox:
    """Where the runs of one sampler leave their reports: numbers, never tensors of a run. Each is known by the film that it is of."""

    def __init__(self) -> None:
        self.report: RunReport | None = None
        """Of the latest run."""
        self.runs = 0
        self._kept: deque[tuple[Mark, Kept]] = deque(maxlen=KEPT)
        self._fresh: Kept | None = None

    def put(self, report: RunReport, panel: dict[str, Any]) -> None:
        self.report, self.runs = report, self.runs + 1
        self._fresh = Kept(self.runs, report, panel)

    def sent(self, film: torch.Tensor) -> None:
        """The film of the run that has just ended, as the sampler hands it on. Raises RuntimeError where the sampler was not asked to make it."""
        if self._fresh is None:
            raise RuntimeError("the sampler was not asked for this film: a node that patches the model has made it; bypass that node")
        self._kept.appendleft((Mark.of(film), self._fresh))
        self._fresh = None

    def of(self, latents: Any) -> Kept:
        """The run that a film is of. Raises ValueError for a film of no run."""
        mark = None if getattr(latents, "is_nested", False) else Mark.of(latents)
        apart, kept = min(((mark.apart(one), run) for one, run in self._kept if mark), key=lambda one: one[0], default=(1.0, None))
        if kept is None or not apart <= NEAR:
            if self.runs > KEPT:
                raise ValueError(
                    f"this latent is of none of the latest {KEPT} runs of its sampler ({self.runs} in all), and older reports are not kept: empty "
                    "ComfyUI's execution cache, or restart it, and queue the workflow again, so that the film is made once more"
                )
            raise ValueError(
                "no run of this sampler made this latent, so it has no report. Connect latent to the output of the SamplerCustomAdvanced that "
                "uses the sampler, and give that one at least one step: with empty sigmas nothing runs"
            )
        return kept
