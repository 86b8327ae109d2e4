"""What a run tells: which chunk-steps were computed, how many tokens, where the seconds went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .chunk import Chunk
from .footprint import Footprint
from .schedule import Row

NOT_RUN, REUSED, COMPUTED = 0, 1, 2


class RunReport:
    """Filled while a run goes on. `map` is uint8 [chunks, steps] of NOT_RUN, REUSED, COMPUTED; `drift` float32, same shape."""

    def __init__(self, chunks: int, steps: int) -> None:
        self.map = np.zeros((chunks, steps), np.uint8)
        self.drift = np.zeros((chunks, steps), np.float32)
        self.tokens = self.tokens_computed = 0
        self.commits = self.host_syncs = self.kv_peak_bytes = self._idle = 0
        self.notes: tuple[str, ...] = ()
        self.expected: Footprint | None = None
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()
        self._events: list[tuple[str, Any, Any]] = []
        self._closed = False

    def decided(self, chunk: Chunk, computed: bool, tokens: int, drift: float) -> None:
        self.map[chunk.index, chunk.step] = COMPUTED if computed else REUSED
        self.drift[chunk.index, chunk.step] = drift
        self.tokens += tokens
        self.tokens_computed += tokens if computed else 0

    def ran(self, chunk: Chunk, tokens: int) -> None:
        """The network runs for this chunk-step; it had been decided otherwise when a branch has nothing to replay."""
        if self.map[chunk.index, chunk.step] == REUSED:
            self.map[chunk.index, chunk.step] = COMPUTED
            self.tokens_computed += tokens

    def committed(self, tokens: int) -> None:
        """A pass that rewrites a finished chunk's keys and values: every arm pays it."""
        self.commits += 1
        self.tokens += tokens
        self.tokens_computed += tokens

    def whole_row(self, row: Row, tokens: int) -> None:
        """The upstream way runs every chunk of the window, idle ones too: all of them are counted as computed."""
        for chunk in row.active:
            self.map[chunk.index, chunk.step] = COMPUTED
        self._idle += row.last - row.first - len(row.active)
        self.tokens += tokens
        self.tokens_computed += tokens

    def kv_bytes(self, now: int) -> None:
        self.kv_peak_bytes = max(self.kv_peak_bytes, now)

    @contextmanager
    def clock(self, part: str, device: torch.device) -> Iterator[None]:
        """Adds the time of a block to `seconds[part]`. On CUDA it records events and waits for none of them."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((part, begin, end))
            return
        begin_at = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begin_at

    def close(self) -> None:
        """The end of sampling: `wall_s` stands still from here on."""
        if self._closed:
            return
        self._closed = True
        if self._events:
            torch.cuda.synchronize()
        for part, begin, end in self._events:
            self.seconds[part] = self.seconds.get(part, 0.0) + begin.elapsed_time(end) / 1000
        self._events.clear()
        self.seconds["total"] = time.perf_counter() - self._started

    @property
    def chunk_steps(self) -> int:
        return int((self.map != NOT_RUN).sum()) + self._idle

    @property
    def chunk_steps_computed(self) -> int:
        return int((self.map == COMPUTED).sum()) + self._idle

    @property
    def share(self) -> float:
        """Computed tokens as a share of all tokens, 0..1."""
        return self.tokens_computed / self.tokens if self.tokens else 1.0

    @property
    def wall_s(self) -> float:
        return self.seconds.get("total", time.perf_counter() - self._started)

    def summary(self) -> str:
        """One line for a console."""
        n, m = self.chunk_steps_computed, self.chunk_steps
        return (f"computed {n} of {m} chunk-steps ({n / max(m, 1):.0%}), {self.wall_s:.1f} s, "
                f"KV peak {self.kv_peak_bytes / 2**20:.1f} MiB, {self.host_syncs} host syncs")  # fmt: skip

    def text(self) -> str:
        """What was expected, the summary, and what was known before the run and found in it: a sentence a line."""
        return "\n".join((*([self.expected.sentence()] if self.expected else []), self.summary(), *self.notes))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; `map` rows are chunks, one digit per step (0 not run, 1 reused, 2 computed)."""
        network = self.seconds.get("network", 0.0)
        return {
            "chunk_steps": self.chunk_steps,
            "chunk_steps_computed": self.chunk_steps_computed,
            "tokens": self.tokens,
            "tokens_computed": self.tokens_computed,
            "share": round(self.share, 4),
            "commits": self.commits,
            "kv_peak_bytes": self.kv_peak_bytes,
            "expected_bytes": self.expected.as_dict() if self.expected else {},
            "host_syncs": self.host_syncs,
            "wall_s": round(self.wall_s, 3),
            "seconds": {"network": round(network, 3), "rest": round(self.wall_s - network, 3)},
            "map": ["".join(map(str, row)) for row in self.map],
            "notes": list(self.notes),
        }
