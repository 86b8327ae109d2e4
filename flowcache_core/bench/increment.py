"""The published replay of MAGI-1 (FlowCache, ICLR 2026, section 3): a reused step repeats the latent increment of the last computed one.

Only measured here, never offered: an increment is too short once the steps grow. The sampler knows velocities, so the increment
is handed to it as increment / step size, which an Euler step turns into the increment exactly. Under UniPC it would not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from torch import Tensor

from ..models.adapter import Call, ModelAdapter, TokenAdapter
from ..network import Attend
from .around import Around


class Incremental(Around):
    """Keeps velocity * step size where others keep the residual, as tokens [B, T, cells of a token]; `sigmas`: steps + 1 noise levels."""

    def __init__(self, inner: ModelAdapter, sigmas: Sequence[float]) -> None:
        super().__init__(inner)
        self._sizes = [after - before for before, after in pairwise(sigmas)]

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        velocity, residual = self.inner.forward(call, attend)
        return velocity, residual if call.chunk.committing else self._kept(call, velocity)

    def refresh(self, call: Call, tokens: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        velocity, _ = cast(TokenAdapter, self.inner).refresh(call, tokens, attend)
        return velocity, self._kept(call, velocity)[:, tokens]

    def replay(self, call: Call, increment: Tensor) -> Tensor:
        frames, (height, width), h, w = call.chunk.frames, self.inner.token_grid(*call.x.shape[3:]), *call.x.shape[3:]
        cells = increment.unflatten(2, (-1, h // height, w // width)).unflatten(1, (frames, height, width))
        return cells.permute(0, 4, 1, 2, 5, 3, 6).reshape(len(increment), -1, frames, h, w) / self._sizes[call.chunk.step]

    def _kept(self, call: Call, velocity: Tensor) -> Tensor:
        height, width = self.inner.token_grid(*velocity.shape[3:])
        cells = (velocity.float() * self._sizes[call.chunk.step]).unflatten(4, (width, -1)).unflatten(3, (height, -1))
        return cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def incremental(adapter: ModelAdapter, sigmas: Sequence[float]) -> ModelAdapter:
    return cast(ModelAdapter, Incremental(adapter, sigmas))
