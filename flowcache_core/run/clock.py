"""Where the seconds of a run go. A clock that jumps backwards counts as one that stood still."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch

Place = tuple[int, int]
"""A chunk and a step of it."""
TICK = 1e-9
"""No total is shorter: ratios of totals have a value."""


class Clock:
    """Starts when it is made; `stop` ends the total. `seconds`: by part, and "total". `steps`: float32 [chunks, steps], measured there."""

    remembers: ClassVar[tuple[str, ...]] = ("spent", "steps")

    def __init__(self, chunks: int = 0, steps: int = 0) -> None:
        self.seconds: dict[str, float] = {}
        self.steps = np.zeros((chunks, steps), np.float32)
        self._started = time.perf_counter()
        self._events: list[tuple[str, Sequence[Place], torch.device, Any, Any]] = []

    @contextmanager
    def measure(self, part: str, device: torch.device, at: Sequence[Place] = ()) -> Iterator[None]:
        """Adds the time of a block to `seconds[part]`, and in equal parts to `steps` at these places. On CUDA it records events and never waits."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(torch.cuda.current_stream(device))
            yield
            end.record(torch.cuda.current_stream(device))
            self._events.append((part, at, device, begin, end))
            return
        begin_at = time.perf_counter()
        yield
        self._add(part, at, time.perf_counter() - begin_at)

    def stop(self) -> None:
        """Reads the events of the device, which is the one wait."""
        self.seconds = self.spent

    @property
    def spent(self) -> dict[str, float]:
        """So far, by part, once the device has done what it was given. Set, it counts on from there."""
        self._read()
        return {**self.seconds, "total": self.total}

    @spent.setter
    def spent(self, seconds: dict[str, float]) -> None:
        self.seconds = {part: float(spent) for part, spent in seconds.items()}
        self._started = time.perf_counter() - self.seconds.pop("total")

    def _read(self) -> None:
        for device in {device for _, _, device, _, _ in self._events}:
            torch.cuda.synchronize(device)
        for part, at, _, begin, end in self._events:
            self._add(part, at, begin.elapsed_time(end) / 1000)
        self._events.clear()

    @property
    def total(self) -> float:
        """So far, or at the end."""
        return self.seconds["total"] if "total" in self.seconds else self._since()

    def _since(self) -> float:
        return max(time.perf_counter() - self._started, TICK)

    def _add(self, part: str, at: Sequence[Place], seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + max(seconds, 0.0)
        for place in at:
            self.steps[place] += max(seconds, 0.0) / len(at)
