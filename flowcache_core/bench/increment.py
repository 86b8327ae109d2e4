"""The published replay of MAGI-1 (FlowCache, ICLR 2026, section 3): a reused step repeats the latent increment of the last computed one.

Only measured here, never offered: an increment is too short once the steps grow. The sampler knows velocities, so the increment
is handed to it as increment / step size, which an Euler step turns into the increment exactly. Under UniPC it would not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from torch import Tensor

from ..models.adapter import Call, ModelAdapter
from ..network import Attend
from .around import Around


class Incremental(Around):
    """Keeps velocity * step size where others keep the residual; `sigmas`: steps + 1 noise levels."""

    def __init__(self, inner: ModelAdapter, sigmas: Sequence[float]) -> None:
        super().__init__(inner)
        self._sizes = [after - before for before, after in pairwise(sigmas)]

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        velocity, residual = self.inner.forward(call, attend)
        if call.chunk.committing:
            return velocity, residual
        return velocity, velocity.float() * self._sizes[call.chunk.step]

    def replay(self, call: Call, increment: Tensor) -> Tensor:
        return increment / self._sizes[call.chunk.step]


def incremental(adapter: ModelAdapter, sigmas: Sequence[float]) -> ModelAdapter:
    return cast(ModelAdapter, Incremental(adapter, sigmas))
