"""FlowCache's chunkwise reuse (ICLR 2026, section 3): every chunk accumulates its own drift and decides for itself.

drift += change of the signature since the previous step; below the threshold the last output is replayed, otherwise the
network runs and the drift starts again from zero. What is replayed is the velocity, integrated with the current step
size, or the residual of the block stack; never the old latent increment, which is too short once the steps grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..memory import RunMemory
from ..sampling.chunk import Chunk
from ..settings import check, setting
from .forecast import expected_steps, headroom, on_rescaling
from .protocol import Compute, Decision, Deferred, Outlook, Replay, Rescale, Reuse, Signals, Signature
from .state import ChunkState
from .thresholds import rescaled


@dataclass(frozen=True)
class Chunkwise:
    """Settings of Chunkwise Cache. Raises ValueError for a value outside its range."""

    name: ClassVar[str] = "threshold"
    title: ClassVar[str] = "Chunkwise Cache by a threshold"

    threshold: float = setting(0.1, "How far a chunk may drift before it is computed again. 0 computes every step.", low=0.0, high=10.0, step=0.005)
    warmup_steps: int = setting(5, "The first steps of every chunk that are always computed.", low=1, high=1000)
    max_reuse: int = setting(8, "At most this many reused steps in a row.", low=1, high=1000, advanced=True)
    signature: Signature = setting(
        "time",
        "What drift is measured on: the chunk's noisy latent (follows the content) or the time modulation (known before sampling).",
        options=("latent", "time"), advanced=True,
    )  # fmt: skip
    replay: Replay = setting(
        "velocity", "What a reused step replays: the velocity or the residual of the block stack.", options=("velocity", "residual"), advanced=True
    )
    order: int = setting(1, "0 holds the last output; 1 extrapolates along the line through the last two.", low=0, high=1, advanced=True)
    start_percent: float = setting(0.0, "Before this share of a chunk's steps nothing is reused.", low=0.0, high=1.0, step=0.01, advanced=True)
    end_percent: float = setting(1.0, "After this share of a chunk's steps nothing is reused.", low=0.0, high=1.0, step=0.01, advanced=True)
    rescale: Rescale = setting(
        "none",
        "Whether changes of the time signature go through the polynomial published for the model: clamped at 0, or unclamped as published.",
        options=("none", "clamped", "unclamped"), advanced=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        if self.start_percent > self.end_percent:
            raise ValueError(f"start_percent {self.start_percent} lies after end_percent {self.end_percent}: swap them")
        if self.rescale != "none" and self.signature != "time":
            raise ValueError(
                f"rescale {self.rescale} was published for the time modulation, but signature is {self.signature}: "
                "set signature to time, or rescale to none"
            )

    @classmethod
    def uncached(cls) -> Chunkwise:
        return cls(threshold=0)

    @property
    def keeps(self) -> Replay:
        return self.replay

    @property
    def follows_time(self) -> bool:
        return self.signature == "time" and self.threshold > 0

    def decide(self, chunk: Chunk, signals: Signals, state: ChunkState) -> Decision | Deferred:
        if self.threshold == 0:
            return self._compute(state)
        change = self.change(signals)
        if self._must_compute(chunk, state):
            return self._compute(state)
        return Deferred((change,), lambda change: self.decide_at(self.threshold, change, chunk, state))

    def decide_at(self, threshold: float, change: float, chunk: Chunk, state: ChunkState) -> Decision:
        """The rule itself, for a change that is already measured and rescaled."""
        state.drift += change
        if self._must_compute(chunk, state) or state.drift >= threshold:
            return self._compute(state)
        state.reused_in_a_row += 1
        return Reuse(self.replay, self.order)

    def forced(self, step: int, steps: int, computed: int) -> bool:
        """Whether a step is computed whatever the drift: warm-up, last step, outside start_percent..end_percent."""
        return computed < self.warmup_steps or step == steps - 1 or not self.start_percent <= step / steps <= self.end_percent

    def change(self, signals: Signals) -> Tensor | float:
        change = signals.change(self.signature)
        if self.rescale == "none" or isinstance(change, Tensor):
            return change
        return rescaled(change, signals.outlook.polynomial, self.rescale)

    def known_changes(self, outlook: Outlook) -> list[float]:
        """The changes of every step of a chunk, as `decide` will add them up. Only for signature time."""
        return [rescaled(change, outlook.polynomial, self.rescale) for change in outlook.time_changes()]

    def check_run(self, steps: int) -> None:
        """Any number of steps will do."""

    def forecast(self, outlook: Outlook) -> tuple[str, ...]:
        return (*expected_steps(self, outlook), *on_rescaling(self, outlook.polynomial), *headroom(self, outlook.steps))

    def findings(self, memory: RunMemory) -> tuple[str, ...]:
        return ()

    def _must_compute(self, chunk: Chunk, state: ChunkState) -> bool:
        return self.forced(chunk.step, chunk.steps, state.computed) or state.reused_in_a_row >= self.max_reuse

    def _compute(self, state: ChunkState) -> Decision:
        state.drift, state.reused_in_a_row = 0.0, 0
        state.computed += 1
        return Compute()
