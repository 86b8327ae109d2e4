"""Motion Cache by a plan: a finer plan than the budget allows for whole chunks, of which every other step computes only what changes fastest.

Multirate integration: every token has steps of its own, and its own history in the solver (`walk.py`). A token that waits is not
replayed; it is moved over its own gap when it is next computed, and until then its keys and values go on along a line
(`kv/waiting.py`). Who waits is decided by what the token itself did: the change of its predicted clean latent between its last
two computed steps, carried on over the time it has waited. MotionCache's rule (`motion.py`) weighs by motion between frames, and
replays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..memory import RunMemory
from ..sampling.chunk import Chunk
from ..sampling.plan import Plan
from ..sampling.planner import plan_in_part
from ..sampling.schedule import ChunkSchedule
from ..settings import check, setting
from .protocol import Compute, Decision, Outlook, Signals
from .state import ChunkState

COMPARISON = "on the bundled model, at a fifth of the tokens and less, the plan of Chunkwise Cache did better with the same budget"
"""At 21 and 13 %, in float32, over 16 films (docs/measurements.md)."""


@dataclass(frozen=True)
class Multirate:
    """Raises ValueError for a value outside its range.

    `seconds`: what the network may take in all, instead of a share; one evaluation is timed when the run begins.
    """

    name: ClassVar[str] = "motion-plan"
    title: ClassVar[str] = "Motion Cache by a plan"
    keeps: ClassVar[None] = None

    share: float = setting(0.13, "The share of all network tokens that is computed.", low=0.01, high=1.0, step=0.01)
    partial: float = setting(
        0.25, "The share of a chunk's tokens that every other of its steps computes. 1 is Chunkwise Cache by a plan.", low=0.05, high=1.0, step=0.01
    )
    seconds: float = setting(0.0, "Instead of a share: what the network may take in all. 0: the share counts.", low=0.0, high=1e6, step=1.0)

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def uncached(cls) -> Multirate:
        return cls(share=1.0)

    def decide(self, chunk: Chunk, signals: Signals, state: ChunkState) -> Decision:
        return Compute()

    def choose(self, rate: Tensor, count: int) -> Tensor:
        return rate.flatten().topk(count, sorted=False).indices.sort().values

    def plan(self, schedule: ChunkSchedule, together: bool = False) -> Plan:
        """Raises ValueError for bidirectional attention."""
        if together:
            raise ValueError(
                "Motion Cache computes part of a chunk, which bidirectional attention cannot: set attention to block-causal, or use Chunkwise Cache"
            )
        return plan_in_part(schedule, self.share, self.partial)

    def timed(self, schedule: ChunkSchedule, frame_s: float, together: bool = False) -> Plan:
        """The plan for the budget in seconds, where one latent frame takes `frame_s` of them."""
        share = self.seconds / frame_s / Plan.full(schedule).frames_computed(schedule)
        return plan_in_part(schedule, min(share, 1.0), self.partial)

    def check_run(self, steps: int) -> None:
        """Any number of steps will do."""

    def forecast(self, outlook: Outlook) -> tuple[str, ...]:
        return (COMPARISON,)

    def findings(self, memory: RunMemory) -> tuple[str, ...]:
        return ()
