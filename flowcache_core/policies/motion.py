"""MotionCache's reuse by token (arXiv 2605.01725, sections 4.1 to 4.3): what moves is refreshed more often than what stands still.

After the warm-up a chunk goes through two phases. In the coarse one Chunkwise decides for the whole chunk. In the fine one
every token adds up drift of its own, A += w * change of the chunk, and is due when A reaches the threshold; its weight is
w = alpha + (1 - alpha) * motion, with motion scaled to 0..1. Due tokens run through the network, the others replay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..kernels.tokens import normalised
from ..memory import RunMemory
from ..sampling.chunk import Chunk
from ..settings import check, setting
from .chunkwise import Chunkwise
from .forecast import headroom
from .protocol import Compute, Decision, Deferred, Measure, Outlook, Refresh, Replay, Reuse, Signals, Signature
from .state import ChunkState

BUCKETS = 16
"""A chunk runs in one of this many lengths, so that shapes repeat."""


@dataclass(frozen=True, slots=True, eq=False)
class Due:
    """Of every token of a chunk, [frames, height, width]: whether it is due, its drift, and for how many steps it has been replayed."""

    due: Tensor
    drift: Tensor
    age: Tensor


@dataclass(frozen=True)
class Motion:
    """Settings of Motion Cache. Raises ValueError for a value outside its range.

    `base` has warm-up, signature, what is replayed and how, for both phases, and the threshold of the coarse one; without it
    Chunkwise's defaults are taken, at this threshold.
    """

    name: ClassVar[str] = "motion-threshold"
    title: ClassVar[str] = "Motion Cache by a threshold"

    threshold: float = setting(
        0.1, "How far a token may drift, weighed by its motion, before it is computed again. 0 computes every step.", low=0.0, high=10.0, step=0.005
    )
    alpha: float = setting(
        0.6, "Weight of a token that stands still, where 1 is that of one that moves. 1 is Chunkwise Cache.", low=0.0, high=1.0, step=0.05
    )
    coarse: float = setting(0.4, "Share of a chunk's steps, from its first, that are decided for the chunk as a whole.", low=0.0, high=1.0, step=0.05)
    measure: Measure = setting(
        "clean",
        "Where motion is seen: in the clean latent as predicted so far, in the noisy latent, in the last block's output, or as the speed at which "
        "a token's prediction changes from step to step.",
        options=("clean", "noisy", "output", "change"), advanced=True,
    )  # fmt: skip
    scale: Literal["frame", "chunk"] = setting(
        "frame", "Whether motion is scaled to 0..1 in every frame on its own or over the chunk.", options=("frame", "chunk"), advanced=True
    )
    quantile: float = setting(1.0, "Motion above this quantile counts as the most. Below 1 a few fast tokens do not set the scale.",
                              low=0.5, high=1.0, step=0.01, advanced=True)  # fmt: skip
    vote: Literal["off", "widen", "agree"] = setting(
        "off",
        "What the frames of a chunk have to say together at one place. widen: where most are due, all are. agree: otherwise none are.",
        options=("off", "widen", "agree"), advanced=True,
    )  # fmt: skip
    min_refresh: float = setting(0.1, "While a smaller share of the tokens is due, they wait.", low=0.0, high=1.0, step=0.05, advanced=True)
    full_share: float = setting(0.85, "When a larger share of the tokens is due, all are computed.", low=0.0, high=1.0, step=0.05, advanced=True)
    max_age: int = setting(8, "At most this many steps in a row a token is replayed.", low=1, high=1000, advanced=True)
    base: Chunkwise | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.min_refresh > self.full_share:
            raise ValueError(f"min_refresh {self.min_refresh} is larger than full_share {self.full_share}: swap them")

    @classmethod
    def uncached(cls) -> Motion:
        return cls(threshold=0)

    @property
    def chunkwise(self) -> Chunkwise:
        return self.base or Chunkwise(threshold=self.threshold)

    @property
    def signature(self) -> Signature:
        return self.chunkwise.signature

    @property
    def follows_time(self) -> bool:
        return self.threshold > 0 and self.chunkwise.follows_time

    @property
    def keeps(self) -> Replay:
        return self.chunkwise.replay

    @property
    def watches(self) -> Measure:
        return self.measure

    def decide(self, chunk: Chunk, signals: Signals, state: ChunkState) -> Decision | Deferred:
        if self.threshold == 0:
            return Compute()
        if self.alpha == 1 or self._coarse(chunk, state):
            return self.chunkwise.decide(chunk, signals, state)
        change = self.chunkwise.change(signals)
        return self._whole(state) if self._must_compute(chunk, state) else self._fine(change, chunk, signals, state)

    def check_run(self, steps: int) -> None:
        """Any number of steps will do."""

    def forecast(self, outlook: Outlook) -> tuple[str, ...]:
        return headroom(self.chunkwise, outlook.steps) if self.threshold else ()

    def findings(self, memory: RunMemory) -> tuple[str, ...]:
        return ()

    def _coarse(self, chunk: Chunk, state: ChunkState) -> bool:
        return chunk.step < round(self.coarse * chunk.steps)

    def _must_compute(self, chunk: Chunk, state: ChunkState) -> bool:
        base, progress = self.chunkwise, chunk.step / chunk.steps
        return (
            state.computed < base.warmup_steps
            or chunk.step == chunk.steps - 1
            or not base.start_percent <= progress <= base.end_percent
            or base.threshold == 0
        )

    def _weights(self, chunk: Chunk, signals: Signals) -> Tensor:
        """alpha to 1, [frames, height, width]."""
        return self.alpha + (1 - self.alpha) * normalised(signals.motion(self.measure), self.quantile, self.scale == "chunk")

    def _carried(self, state: ChunkState) -> tuple[float, int]:
        """With which drift and age all tokens enter the fine phase."""
        return state.drift, state.reused_in_a_row

    def _length(self, count: int, size: int) -> int:
        """How many tokens run where `count` are due. `size`: of a bucket."""
        return -(-count // size) * size

    def _fine(self, change: Tensor | float, chunk: Chunk, signals: Signals, state: ChunkState) -> Deferred:
        """Which tokens are due. What is asked of the device is how many."""
        weight = self._weights(chunk, signals)
        if state.token_drift is None or state.token_age is None:
            drifted, replayed = self._carried(state)
            state.token_drift = torch.full_like(weight, drifted)
            state.token_age = torch.full_like(weight, replayed, dtype=torch.int32)
        drift, age = state.token_drift + weight * change, state.token_age
        old = age >= self.max_age
        due = self._voted(drift >= self.threshold) | old
        return Deferred(
            (due.sum(), old.sum(), drift.mean()), lambda count, forced, mean: self._among(Due(due, drift, age), int(count), int(forced), mean, state)
        )

    def _among(self, found: Due, count: int, forced: int, mean: float, state: ChunkState) -> Decision:
        """`count` tokens are due, `forced` of them by their age; `mean`: of all drifts."""
        due, drift, age = found.due, found.drift, found.age
        total, state.drift = due.numel(), mean
        run = self._length(count, math.ceil(total / BUCKETS))
        if count > self.full_share * total or run >= total:
            return self._whole(state)
        state.token_drift, state.token_age = drift, age + 1
        if count == 0 or (count < self.min_refresh * total and not forced):
            state.reused_in_a_row += 1
            return Reuse(self.chunkwise.replay, self.chunkwise.order)
        urgency = torch.where(due, drift + _FIRST, drift).flatten()
        tokens = urgency.topk(run, sorted=False).indices.sort().values
        state.token_drift.view(-1).index_fill_(0, tokens, 0.0)
        state.token_age.view(-1).index_fill_(0, tokens, 0)
        state.reused_in_a_row = 0
        return Refresh(tokens, self.chunkwise.replay, self.chunkwise.order)

    def _voted(self, due: Tensor) -> Tensor:
        """[frames, height, width]: the majority of the frames at one place."""
        if self.vote == "off":
            return due
        most = (due.float().mean(0) > 0.5).expand_as(due)
        return due | most if self.vote == "widen" else most

    def _whole(self, state: ChunkState) -> Decision:
        state.drift, state.reused_in_a_row = 0.0, 0
        state.token_drift = state.token_age = None
        state.computed += 1
        return Compute()


_FIRST = 1e6
"""Puts what is due before everything that only comes near."""


@dataclass(frozen=True)
class Released(Motion):
    """Where the released code decides otherwise than `Motion` does at the same constants. The tokens that are due run and no others, whatever the
    shapes; drift begins anew with the fine phase.

    `coarse_computed`: the coarse phase ends with so many computed steps behind the warm-up (0: as `coarse` says); `opening`: the film's first frame,
    which has none before it, has the weight of what moves most, instead of the second frame's weights.
    """

    coarse_computed: int = 0
    opening: bool = False

    def _coarse(self, chunk: Chunk, state: ChunkState) -> bool:
        if self.coarse_computed:
            return state.computed < self.chunkwise.warmup_steps + self.coarse_computed
        return super()._coarse(chunk, state)

    def _weights(self, chunk: Chunk, signals: Signals) -> Tensor:
        weights = super()._weights(chunk, signals)
        if self.opening and chunk.start == 0:
            weights[0] = 1.0
        return weights

    def _carried(self, state: ChunkState) -> tuple[float, int]:
        return 0.0, 0

    def _length(self, count: int, size: int) -> int:
        return count


PRESETS: Mapping[str, Motion] = {
    "skyreels-v2": Released(
        threshold=0.1, alpha=0.6, measure="output", vote="agree", min_refresh=0.4, full_share=1.0, max_age=1000, coarse_computed=6,
        base=Chunkwise(threshold=0.1, warmup_steps=5, max_reuse=1000, signature="time", replay="residual", order=0, rescale="clamped"),
    ),
    "magi-1": Released(
        threshold=0.0065, alpha=0.6, coarse=25 / 64, measure="noisy", min_refresh=0.0, full_share=1.0, max_age=1000, opening=True,
        base=Chunkwise(threshold=0.0065, warmup_steps=5, max_reuse=1000, signature="latent", order=0),
    ),
}  # fmt: skip
"""The constants of the released configurations, and what the released code decides with them, but for these: the polynomial of SkyReels-V2 is clamped
at 0, one mask serves all branches, a chunk's last step is computed, and motion in the output is seen on the last residual over present latents,
there over those of the step before; for MAGI-1 drift is measured on the latents, there behind the patch embedding, and the velocity is replayed,
there the latent increment."""
