"""The report of a run: which chunk-steps were computed, how many tokens, where the seconds went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..kernels import choice
from ..kernels.attention import in_force
from ..sampling.chunk import Chunk
from ..sampling.frames import FOUR_N_PLUS_1
from ..sampling.plan import Plan
from ..sampling.schedule import Row
from .clock import TICK, Clock
from .footprint import Footprint, readable
from .history import HistoryLog

NOT_RUN, REUSED, COMPUTED, REFRESHED = 0, 1, 2, 3
CLOSENESS = "how close the film is, workflow prove_it or Compare Runs measures"
"""Said wherever a speed is: it is nothing without closeness, which one run cannot know."""


@dataclass(slots=True)
class Saves:
    """How often the state of a run was written, how long that took in all, and the size of the last one."""

    count: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def add(self, seconds: float, size: int) -> None:
        self.count, self.seconds, self.bytes = self.count + 1, self.seconds + seconds, size

    def line(self) -> str:
        """In one sentence; "" where nothing was written."""
        times = "once" if self.count == 1 else f"{self.count} times"
        return f"the state of the run was saved {times}, {self.seconds:.2f} s in all, the last {readable(self.bytes)}" if self.count else ""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; {} where nothing was written."""
        return {"count": self.count, "seconds": round(self.seconds, 3), "bytes": self.bytes} if self.count else {}


@dataclass(slots=True)
class Shown:
    """Frames of the film that were decoded and shown while the run went on, and how long that took in all."""

    frames: int = 0
    seconds: float = 0.0

    def add(self, frames: int, seconds: float) -> None:
        self.frames, self.seconds = self.frames + frames, self.seconds + max(seconds, 0.0)

    def line(self) -> str:
        """In one sentence; "" where nothing was shown."""
        return f"{self.frames} frames were decoded and shown on the way: {self.seconds:.2f} s of the whole, not of a row" if self.frames else ""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; {} where nothing was shown."""
        return {"frames": self.frames, "seconds": round(self.seconds, 3)} if self.frames else {}


@dataclass(slots=True)
class Kernels:
    """By what the network attended, in the order in which it came, and by which path the kernels of this package were computed: "" before a step."""

    attention: tuple[str, ...] = ()
    path: str = ""

    def line(self) -> str:
        """In one sentence; "" where nothing was evaluated."""
        return f"attention by {', then '.join(self.attention)}; other kernels by {self.path}" if self.attention else ""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; {} where nothing was evaluated."""
        return {"attention": list(self.attention), "path": self.path} if self.attention else {}


class RunReport:
    """Filled while a run goes on. `map` is uint8 [chunks, steps] of NOT_RUN, REUSED, COMPUTED, REFRESHED (some tokens of it).

    `drift` and `shares` are float32 of that shape: accumulated drift, and the share of the chunk's tokens that ran. After
    `close`, `visits` is int32 [frames, height, width] of tokens: at how many steps each token was computed, commits left out.

    `history`: what a budget left of it. `grid`: latent frames of the film, height and width of one in tokens. `rows`: of the sampling
    loop, once all have run; `row_of` is int32 [chunks, steps], in which of them, from 1, a chunk came to a step, `sigmas` the noise level of
    every step and 0.

    `plans`: what was settled before the run, of every bidirectional section one; () where steps are decided as they come.
    `planned` is uint8 [chunks, steps] of 0 and 1. `saves`: of the run's state, for a later run to go
    on from; a run that went on has counts of the whole film, and saves of its own. `shown`: of the film on the way. `kernels`: of this
    run alone, by what it attended. `devices`: of a film that several share, the mesh, and what this one has sent.
    """

    remembers: ClassVar[tuple[str, ...]] = (
        "map", "drift", "shares", "_visits", "_parts", "tokens", "tokens_computed", "commits", "host_syncs", "kv_peak_bytes", "_idle",
        "_idle_skipped", "plans", "planned", "history", "notes", "clock",
    )  # fmt: skip
    plans: tuple[Plan, ...]
    notes: tuple[str, ...]

    def __init__(self, chunks: int, steps: int, grid: tuple[int, int, int] | None = None) -> None:
        self.grid = grid
        self.map = np.zeros((chunks, steps), np.uint8)
        self.drift, self.shares = (np.zeros((chunks, steps), np.float32) for _ in range(2))
        self.visits: np.ndarray | None = None
        self._visits = None if grid is None else torch.zeros(grid, dtype=torch.int32)
        self._parts: Tensor | None = None
        """The visits of steps that ran in part, on the device of their tokens."""
        self.tokens = self.tokens_computed = self.rows = 0
        self.row_of = np.zeros((chunks, steps), np.int32)
        self.sigmas: tuple[float, ...] = ()
        self.commits = self.host_syncs = self.kv_peak_bytes = self._idle = self._idle_skipped = 0
        self.plans = ()
        self.planned = np.zeros((chunks, steps), np.uint8)
        self.history = HistoryLog()
        self.notes = ()
        self.expected: Footprint | None = None
        self.pixels = FOUR_N_PLUS_1
        self.saves, self.shown, self.kernels = Saves(), Shown(), Kernels()
        self.devices: dict[str, Any] = {}
        self.clock = Clock(chunks, steps)
        self._closed = False

    def follows(self, plan: Plan, first: int = 0) -> None:
        """What is computed is settled: by `plan`, whose chunks are numbered from `first` on in the film."""
        self.plans = (*self.plans, plan)
        for k, steps in enumerate(plan.computed):
            self.planned[first + k, list(steps)] = 1

    def decided(self, chunk: Chunk, computed: bool, tokens: int, drift: float, refreshed: Tensor | None = None) -> None:
        """`refreshed`: int64 [n], the tokens of the chunk that run where not all of its `tokens` do."""
        self.drift[chunk.index, chunk.step] = drift
        self.tokens += tokens
        if computed:
            self._count(chunk, COMPUTED, tokens, tokens)
        elif refreshed is None:
            self._count(chunk, REUSED, 0, tokens)
        else:
            self._count(chunk, REFRESHED, len(refreshed), tokens)
        if computed or refreshed is not None:
            self._visit(chunk, refreshed)

    def skipped(self, chunk: Chunk, tokens: int) -> None:
        """A step that the plan leaves out."""
        self.tokens += tokens
        self._count(chunk, REUSED, 0, tokens)

    def ran(self, chunk: Chunk, tokens: int, refreshed: Tensor | None = None) -> None:
        """The whole chunk runs at this step; it had been decided otherwise when a branch has nothing to replay. `refreshed`: as was decided."""
        if self.map[chunk.index, chunk.step] != COMPUTED:
            self.tokens_computed -= round(float(self.shares[chunk.index, chunk.step]) * tokens)
            self._count(chunk, COMPUTED, tokens, tokens)
            self._visit(chunk, None)
            if refreshed is not None:
                self._visit(chunk, refreshed, -1)

    def _count(self, chunk: Chunk, kind: int, run: int, tokens: int) -> None:
        self.map[chunk.index, chunk.step] = kind
        self.shares[chunk.index, chunk.step] = run / tokens
        self.tokens_computed += run

    def _visit(self, chunk: Chunk, only: Tensor | None, count: int = 1) -> None:
        """So many more computed steps for `only` these tokens of the chunk, or for all; counted on their device, read after the run."""
        if self._visits is None:
            return
        frames = slice(chunk.start, chunk.start + chunk.frames)
        if only is None:
            self._visits[frames] += count
            return
        if self._parts is None:
            self._parts = torch.zeros(self._visits.shape, dtype=torch.int32, device=only.device)
        self._parts[frames].view(-1).index_add_(0, only, torch.full_like(only, count, dtype=torch.int32))

    def committed(self, tokens: int) -> None:
        """A pass that rewrites a finished chunk's keys and values: every arm pays it."""
        self.commits += 1
        self.tokens += tokens
        self.tokens_computed += tokens

    def whole_row(self, row: Row, tokens: int, computed: bool = True) -> None:
        """The upstream way runs every chunk of the section, idle ones too: all of them are counted. `computed` False: a plan skips the row."""
        for chunk in row.active:
            self.map[chunk.index, chunk.step] = COMPUTED if computed else REUSED
            self.shares[chunk.index, chunk.step] = float(computed)
        idle = row.last - row.first - len(row.active)
        self._idle += idle
        self._idle_skipped += 0 if computed else idle
        self.tokens += tokens
        self.tokens_computed += tokens if computed else 0

    def went(self, rows: Sequence[Sequence[Chunk]], sigmas: tuple[float, ...]) -> None:
        """All rows have run, with these chunks, at these noise levels."""
        self.rows, self.sigmas = len(rows), sigmas
        for number, chunks in enumerate(rows, 1):
            for chunk in chunks:
                self.row_of[chunk.index, chunk.step] = number

    def evaluates(self, device: torch.device) -> None:
        """The network is evaluated on a device, by the attention that is in force."""
        if (name := in_force().name) not in self.kernels.attention:
            self.kernels.attention = (*self.kernels.attention, name)
        self.kernels.path = choice.sentence(device)

    def kv_bytes(self, now: int) -> None:
        self.kv_peak_bytes = max(self.kv_peak_bytes, now)

    def close(self) -> None:
        """The end of sampling: `wall_s` stands still from here on."""
        if self._closed:
            return
        self._closed = True
        whole, parts, self._visits, self._parts = self._visits, self._parts, None, None
        if whole is not None:
            self.visits = (whole + (0 if parts is None else parts.cpu())).numpy()
        self.clock.stop()

    @property
    def chunk_steps(self) -> int:
        return self.steps_reported + self._idle

    @property
    def steps_reported(self) -> int:
        """Steps of chunks of which it is known what became of them; idle chunks of a bidirectional row are not among them."""
        return int((self.map != NOT_RUN).sum())

    @property
    def chunk_steps_computed(self) -> int:
        return int((self.map == COMPUTED).sum()) + self._idle - self._idle_skipped

    @property
    def chunk_steps_refreshed(self) -> int:
        """Chunk-steps at which some tokens ran and the others were replayed."""
        return int((self.map == REFRESHED).sum())

    @property
    def share(self) -> float:
        """Computed tokens as a share of all tokens, 0..1."""
        return self.tokens_computed / self.tokens if self.tokens else 1.0

    @property
    def skipped_nothing(self) -> bool:
        """Whether steps were decided and all of their tokens ran."""
        return self.steps_reported > 0 and self.tokens_computed == self.tokens

    @property
    def wall_s(self) -> float:
        return self.clock.total

    def summary(self) -> str:
        """One line for a console."""
        n, m = self.chunk_steps_computed, self.chunk_steps
        part = f" and {self.chunk_steps_refreshed} in part" if self.chunk_steps_refreshed else ""
        return (f"computed {n} of {m} chunk-steps{part}, {self.share:.0%} of all tokens, {self.wall_s:.1f} s, "
                f"KV peak {self.kv_peak_bytes / 2**20:.1f} MiB")  # fmt: skip

    def row_seconds(self, rows: int) -> tuple[float, float] | None:
        """Of one of the first `rows` rows: as it was, and with all of it computed, at the seconds that a computed token has taken in this run.

        The seconds are those of the network, and of everything while a device has not reported them. Those of `shown` are left out.
        None where nothing was skipped.
        """
        skipped, took = self.tokens - self.tokens_computed, max(self.wall_s - self.shown.seconds, TICK)
        if not (rows and skipped and self.tokens_computed):
            return None
        return took / rows, (took + self.clock.seconds.get("network", took) / self.tokens_computed * skipped) / rows

    def pace(self, rows: int) -> str:
        """What skipping saved in the first `rows` rows; "" where it saved nothing."""
        if (seconds := self.row_seconds(rows)) is None:
            return ""
        row, full = seconds
        fast = f"{row:.2g} s per row, {full:.2g} s with all of it computed: {full / row:.2f}x as fast, {(full - row) * rows:.1f} s saved"
        return f"{fast}; {CLOSENESS}"

    def text(self) -> str:
        """What was expected, the summary, and what was known before the run and found in it: a sentence a line."""
        expected = self.expected.sentence() if self.expected else ""
        lines = expected, self.summary(), self.pace(self.rows), self.history.line(), self.saves.line(), self.shown.line(), *map(_past, self.notes)
        return "\n".join(filter(None, (*lines, self.kernels.line())))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; `map` has a string per chunk, one digit per step (0 not run, 1 reused or skipped, 2 computed, 3 refreshed in part).

        `plan` is what `Plan.from_dict` reads, of bidirectional sections a list; None where nothing was settled before the run.
        `shares` has the share of the chunk's tokens that ran, per chunk and step; so has `drift` what a chunk had drifted, [] where no drift was
        measured. `seconds` has `per_row` and `per_full_row` where something was skipped. `history` has, per finished chunk, tokens per
        layer and bytes of history, and in `frames` how many tokens of each latent frame are kept at the end; {} without a budget. `devices` has
        the devices along branches and along heads, the expected ratio of seconds, and what this device sent; {} on one device.
        """
        return {
            "chunk_steps": self.chunk_steps,
            "chunk_steps_computed": self.chunk_steps_computed,
            "chunk_steps_refreshed": self.chunk_steps_refreshed,
            "tokens": self.tokens,
            "tokens_computed": self.tokens_computed,
            "share": round(self.share, 4),
            "commits": self.commits,
            "kv_peak_bytes": self.kv_peak_bytes,
            "expected_bytes": self.expected.as_dict() if self.expected else {},
            "host_syncs": self.host_syncs,
            "wall_s": round(self.wall_s, 3),
            "rows": self.rows,
            "seconds": self._seconds_as_dict(),
            "map": ["".join(map(str, row)) for row in self.map],
            "shares": [[round(float(s), 3) for s in row] for row in self.shares],
            "drift": [[round(float(d), 4) for d in row] for row in self.drift] if self.drift.any() else [],
            "plan": self._plan_as_dict(),
            "notes": list(self.notes),
            "history": self.history.as_dict(),
            "saves": self.saves.as_dict(),
            "shown": self.shown.as_dict(),
            "kernels": self.kernels.as_dict(),
            "devices": self.devices,
        }

    def _seconds_as_dict(self) -> dict[str, float]:
        network = self.clock.seconds.get("network", 0.0)
        row, full = self.row_seconds(self.rows) or (None, None)
        seconds = {"network": network, "rest": self.wall_s - network, "per_row": row, "per_full_row": full}
        return {name: round(value, 3) for name, value in seconds.items() if value is not None}

    def _plan_as_dict(self) -> dict[str, Any] | list[dict[str, Any]] | None:
        each = [plan.as_dict() for plan in self.plans]
        return (each if self.plans[0].together else each[0]) if each else None


def _past(note: str) -> str:
    """A note of before the run, as it is said after it."""
    return note.replace(" will be ", " were to be ", 1)
