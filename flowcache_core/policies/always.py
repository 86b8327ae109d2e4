"""The policy that never reuses: the uncached run that everything else is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..sampling.chunk import Chunk
from .protocol import Compute, Decision, Signals
from .state import ChunkState


@dataclass(frozen=True)
class Always:
    name: ClassVar[str] = "always"
    title: ClassVar[str] = "No Cache"
    keeps: ClassVar[None] = None

    @classmethod
    def uncached(cls) -> Always:
        return cls()

    def decide(self, chunk: Chunk, signals: Signals, state: ChunkState) -> Decision:
        return Compute()
