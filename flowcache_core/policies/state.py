"""What one run remembers, keyed by chunk. It is born with the session and dies with it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..memory import RunMemory
from .protocol import Decision


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a computed step leaves behind for one branch: its noise level and the tensor that reuse replays.

    Where tokens were computed at different steps, `sigma` is a tensor that broadcasts with `value`.
    """

    sigma: float | Tensor
    value: Tensor

    def first(self, share: float) -> Prediction:
        """What is of the first `share` of the batch."""
        mine = round(len(self.value) * share)
        sigma = self.sigma[:mine] if isinstance(self.sigma, Tensor) and len(self.sigma) == len(self.value) else self.sigma
        return Prediction(sigma, self.value[:mine])

    def overlaid(self, fresh: Tensor, other: Prediction) -> Prediction:
        """This, but the other where `fresh` is True."""
        return Prediction(torch.where(fresh, other.sigma, self.sigma), torch.where(fresh, other.value, self.value))


@dataclass(slots=True)
class ChunkState:
    """The memory of one chunk that is being denoised."""

    drift: float = 0.0
    reused_in_a_row: int = 0
    computed: int = 0
    latent: Tensor | None = None
    clean: Tensor | None = None
    residual: Tensor | None = None
    token_drift: Tensor | None = None
    token_age: Tensor | None = None
    decided_at: int = -1
    decision: Decision | None = None
    predictions: dict[Hashable, tuple[Prediction, ...]] = field(default_factory=dict)
    run: RunMemory = field(default_factory=RunMemory)
    ran: dict[Hashable, int] = field(default_factory=dict)
    """By branch, how often it was evaluated at the step `ran_at`."""
    ran_at: int = -1

    def arrive(self, step: int, branches: Sequence[Hashable]) -> int:
        """One more evaluation of these branches -> how many there were before it at this step.

        Raises RuntimeError where some of them have run and others have not: the chunk would then see keys of two evaluations.
        """
        if self.ran_at != step:
            self.ran, self.ran_at = {}, step
        before = {self.ran.get(branch, 0) for branch in branches}
        if len(before) > 1 and 0 in before:
            raise RuntimeError(
                "a guidance node evaluated some branches of a step again together with others for the first time, which cannot be told apart from "
                "the step itself: bypass that node"
            )
        self.ran |= {branch: self.ran.get(branch, 0) + 1 for branch in branches}
        return max(before, default=0)

    def keep(self, branches: Hashable, sigma: float, value: Tensor, fresh: Tensor | None = None) -> None:
        """Remember a computed step, or its `fresh` part; the last two of every token are enough for a linear prediction."""
        kept, now = self.predictions.get(branches, ()), Prediction(sigma, value)
        if fresh is None:
            self.predictions[branches] = (*kept[-1:], now)
        else:
            self.predictions[branches] = (kept[0].overlaid(fresh, kept[-1]), kept[-1].overlaid(fresh, now))

    def narrow(self, known: Hashable, branches: Hashable, share: float) -> None:
        """Of what is remembered under `known`, the first `share` of the batch is from now on remembered under `branches`."""
        self.predictions[branches] = tuple(one.first(share) for one in self.predictions.pop(known))

    def predict(self, branches: Hashable, sigma: float, order: int) -> Tensor:
        """The last value (order 0), or the line through the last two, at noise level `sigma` (order 1)."""
        *earlier, last = self.predictions[branches]
        if order == 0 or not earlier:
            return last.value
        ahead, between = sigma - last.sigma, last.sigma - earlier[0].sigma
        if isinstance(between, Tensor):
            along = torch.where(between == 0, 0.0, ahead / between)
            return (along * (last.value - earlier[0].value)).to(last.value.dtype).add_(last.value)
        if between == 0:
            return last.value
        return (last.value - earlier[0].value).mul_(ahead / between).add_(last.value)

    @property
    def latest(self) -> tuple[Prediction, ...]:
        """The last one or two predictions of whichever branches were computed first; empty before that."""
        return next(iter(self.predictions.values()), ())


class RunState:
    """All chunks in flight: `of` makes or finds one, `drop` forgets it when the chunk has become history.

    `edges`: by chunk, the last frame of what motion was measured on, for the next chunk to compare its first frame with; a copy,
    so that the other frames can go.
    """

    remembers: ClassVar[tuple[str, ...]] = ("memory", "_chunks", "edges")
    _chunks: dict[int, ChunkState]
    edges: dict[int, Tensor]

    def __init__(self) -> None:
        self._chunks = {}
        self.memory = RunMemory()
        self.edges = {}

    def of(self, index: int) -> ChunkState:
        return self._chunks.setdefault(index, ChunkState(run=self.memory))

    def keep_edge(self, index: int, picture: Tensor) -> None:
        """picture: [batch, channels, frames, h, w]."""
        self.edges[index] = picture[:, :, -1].clone()

    def drop(self, index: int) -> None:
        self._chunks.pop(index, None)
        self.edges.pop(index - 1, None)

    def clear(self) -> None:
        self._chunks.clear()
        self.memory.clear()
        self.edges.clear()

    def __len__(self) -> int:
        return len(self._chunks)
