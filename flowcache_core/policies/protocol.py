"""What a cache policy can decide for one chunk at one step, and what it may look at to decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from ..memory import RunMemory
from ..sampling.chunk import Chunk
from ..sampling.plan import Plan
from ..sampling.schedule import ChunkSchedule

if TYPE_CHECKING:
    from .state import ChunkState

Signature = Literal["latent", "time"]
Replay = Literal["velocity", "residual"]
Rescale = Literal["none", "clamped", "unclamped"]
Measure = Literal["clean", "noisy", "output", "change"]


@dataclass(frozen=True, slots=True)
class Compute:
    """Run the network."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """Replay an earlier output. `what`: velocity, or the residual of the block stack; `order`: 0 holds, 1 extrapolates."""

    what: Replay = "velocity"
    order: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Refresh:
    """Run the network for some tokens of the chunk; the others replay, as in `Reuse`.

    `tokens`: int64 [n], ascending, counted from the chunk's first token, on the device of the latents.
    """

    tokens: Tensor
    what: Replay = "velocity"
    order: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Run the network for some tokens of the chunk; the others wait at their own noise level (`walk.py`). `tokens`: as in `Refresh`."""

    tokens: Tensor


Decision = Compute | Reuse | Refresh | Part


@dataclass(frozen=True, slots=True, eq=False)
class Deferred:
    """A decision that depends on numbers which are on the device. `numbers`: scalars there, and numbers that are known already;
    `decide`: their values, in this order -> the decision. It is called when the chunk's turn comes, in the order of the chunks.
    """

    numbers: tuple[Tensor | float, ...]
    decide: Callable[..., Decision]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known of a run before it begins."""

    chunks: int
    """Chunks to be denoised; each takes all steps."""
    sigmas: tuple[float, ...]
    """Noise levels, one more than there are steps."""
    time_changes: Callable[[], Sequence[float]]
    """Relative change of the time modulation at every step; asks the network once."""
    polynomial: tuple[float, ...] = ()
    """Published rescaling of these changes for this network, highest power first; () when none was published."""

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


class Signals(Protocol):
    """What is known before a step is decided."""

    @property
    def outlook(self) -> Outlook: ...

    def change(self, signature: Signature) -> Tensor | float:
        """Relative L1 change since the chunk's previous step, mean|now - before| / mean|before|.

        "latent": of the chunk's noisy latent, a scalar that stays on the device; infinite at the first step. "time": of the network's
        time modulation, known before sampling. To be asked for at every step, whether it counts or not. No host sync.
        """
        ...

    def motion(self, measure: Measure) -> Tensor:
        """How much every token moves, [frames, height, width], not scaled; ones where nothing is known yet. No host sync.

        "noisy", "clean", "output": difference to the frame before, of the noisy latent, of the clean latent as last
        predicted, or of the last block's output (relative). "change": how fast the kept prediction changed with the noise
        level between the last two times the token was computed.
        """
        ...


class CachePolicy(Protocol):
    """Frozen settings plus a rule. All memory is in `state`; the session calls `decide` once per chunk and step."""

    name: ClassVar[str]
    """By which it is chosen, in the Cache Policy node and in demo and bench; saved workflows have it."""
    title: ClassVar[str]
    """What messages call it."""

    @classmethod
    def uncached(cls) -> CachePolicy:
        """The settings at which nothing is ever reused: their film is that of the uncached run, bit for bit."""
        ...

    @property
    def keeps(self) -> Replay | None:
        """Which output of computed steps the session has to remember; None when nothing is ever reused."""
        ...

    def decide(self, chunk: Chunk, signals: Signals, state: ChunkState) -> Decision | Deferred:
        """What becomes of the chunk at this step. Asked of all active chunks of a row, in order, before the first of them moves; what it
        has to know of the device it asks for by a `Deferred`, so that the host waits for all of them once."""
        ...


@runtime_checkable
class PlanPolicy(CachePolicy, Protocol):
    """A policy that settles before the run which chunk is computed in which row; what it leaves out is not replayed but integrated over."""

    @property
    def seconds(self) -> float:
        """Above 0, what the network may take in all: then the plan is made by `timed`."""
        ...

    def plan(self, schedule: ChunkSchedule, together: bool = False) -> Plan:
        """Raises ValueError where there is none for this schedule. `together`: for bidirectional attention."""
        ...

    def timed(self, schedule: ChunkSchedule, frame_s: float, together: bool = False) -> Plan:
        """Once it is known how many seconds a latent frame takes."""
        ...


@runtime_checkable
class SectionPolicy(PlanPolicy, Protocol):
    """A policy that can serve attention over bidirectional sections too, where every row computes all of its chunks or none."""

    def plans(self, schedules: Sequence[ChunkSchedule], frame_s: float | None = None) -> tuple[Plan, ...]:
        """One plan for each section of a film. `frame_s`: seconds that a latent frame takes, for a budget in seconds. Raises ValueError."""
        ...


@runtime_checkable
class PartPolicy(PlanPolicy, Protocol):
    """A plan policy that at some steps of its plan computes only part of a chunk's tokens."""

    def choose(self, rate: Tensor, count: int) -> Tensor:
        """The `count` tokens that are computed, int64 ascending, flat. No host sync.

        rate: [frames, height, width], how much the clean latent of every token is likely to have changed since the token was computed,
        squared.
        """
        ...


@runtime_checkable
class TokenPolicy(CachePolicy, Protocol):
    """A policy that may decide `Refresh`."""

    @property
    def watches(self) -> Measure:
        """The measure of motion it asks for: what the session has to remember."""
        ...


@runtime_checkable
class SignaturePolicy(CachePolicy, Protocol):
    """A policy that goes by the change of a signature. `follows_time`: it needs the network's time modulation."""

    @property
    def signature(self) -> Signature: ...

    @property
    def follows_time(self) -> bool: ...


@runtime_checkable
class Forecasts(Protocol):
    """A policy that can say before a run what the run will do. Optional: the session asks a policy that has these methods."""

    def check_run(self, steps: int) -> None:
        """Raises ValueError, before weights load, for a number of steps per chunk that these settings cannot serve."""
        ...

    def forecast(self, outlook: Outlook) -> tuple[str, ...]:
        """Before the run: sentences for the log, the report and the page."""
        ...

    def findings(self, memory: RunMemory) -> tuple[str, ...]:
        """After the run: sentences for the report."""
        ...
