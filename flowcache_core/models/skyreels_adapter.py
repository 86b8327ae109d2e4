"""SkyReels-V2 behind the adapter seam, and what it shares with other models of its network: timesteps, rotary positions of a chunk, replay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from ..network import Attend, Rotary
from ..sampling.noise import ROUNDING, timestep
from .adapter import Call, SquarePatches
from .attention import bidirectional
from .skyreels import HEAD_DIM, PATCH, Rope, SkyReelsV2, TextKV, rope_table
from .skyreels_polynomials import POLYNOMIALS


class WanAdapter(SquarePatches):
    """`network` in whatever place the caller keeps it, computing in `dtype` (default: that of the weights)."""

    name: ClassVar[str]

    def __init__(self, network: SkyReelsV2, dtype: torch.dtype | None = None) -> None:
        self.network, self.dtype = network, dtype or network.dtype
        self.layers, self.heads, self.head_dim = network.config.layers, network.config.heads, HEAD_DIM
        self.width, self.query_heads = network.config.dim, network.config.heads
        self.text_channels = 2 * self.layers * self.width
        self.rotary: Rotary = Rope()

    @property
    def polynomial(self) -> tuple[float, ...]:
        return ()

    def timestep(self, sigma: float) -> float:
        """What the network is given for a noise level."""
        return timestep(sigma)

    def text(self, context: Tensor) -> TextKV:
        return self.network.text_kv(context)

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        e, e0 = self._modulation(call)
        tokens = self.network.embed(call.x)
        out = self.network.stack(tokens, e0, call.text, self._rope(call), attend)
        return self.network.velocity(out, e, self._grid(call)), out - tokens

    def forward_row(self, calls: Sequence[Call], attend: Attend) -> Tensor:
        first, x = calls[0], torch.cat([call.x for call in calls], 2)
        levels = [(call.sigma, 1) for call in calls]
        if any(call.chunk.held or call.chunk.frames != first.chunk.frames for call in calls):
            levels = [level for call in calls for level in ((call.sigma, call.chunk.frames - call.chunk.held), (0.0, call.chunk.held))]
        e, e0 = self.network.modulation(self._timesteps(levels, x.device)[None], first.fps, x.dtype)
        out = self.network.stack(self.network.embed(x), e0, first.text, torch.cat([self._rope(call) for call in calls]), attend)
        return self.network.velocity(out, e, (x.shape[2], *self._grid(first)[1:]))

    def refresh(self, call: Call, tokens: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        e, e0 = self._modulation(call)
        grid = self._grid(call)
        frame = None if e.shape[1] == 1 else tokens // (grid[1] * grid[2])
        short = self.network.embed_some(call.x, tokens)
        out = self.network.stack(short, _per_token(e0, frame), call.text, self._rope(call)[tokens], attend)
        patches: Tensor = self.network.head(out, _per_token(e, frame))
        velocity = patches.new_zeros(len(patches), math.prod(grid), patches.shape[2]).index_copy_(1, tokens, patches)
        return self.network.unfold(velocity, grid), out - short

    def replay(self, call: Call, residual: Tensor) -> Tensor:
        e, _ = self._modulation(call)
        return self.network.velocity(self.output(call, residual), e, self._grid(call))

    def output(self, call: Call, residual: Tensor) -> Tensor:
        return self.network.embed(call.x) + residual

    def time_changes(self, sigmas: Sequence[float], fps: int, device: torch.device) -> list[float]:
        """Mean absolute change of e0 from step to step over its mean magnitude, all on one small matrix."""
        t = self._timesteps(((sigma, 1) for sigma in sigmas), device)
        e0 = self.network.modulation(t[:, None], fps, self.dtype)[1].float().flatten(1)
        change = (e0[1:] - e0[:-1]).abs().mean(1) / e0[:-1].abs().mean(1)
        return [0.0, *change.tolist()]

    def _modulation(self, call: Call) -> tuple[Tensor, Tensor]:
        chunk = call.chunk
        levels = [(call.sigma, chunk.frames - chunk.held), (0.0, chunk.held)] if chunk.held else [(call.sigma, 1)]
        return self.network.modulation(self._timesteps(levels, call.x.device)[None], call.fps, call.x.dtype)

    def _grid(self, call: Call) -> tuple[int, int, int]:
        return call.chunk.frames, call.x.shape[3] // PATCH, call.x.shape[4] // PATCH

    def _rope(self, call: Call) -> Tensor:
        """Made for every evaluation: that is cheap beside the blocks, and kept tables would grow with the film."""
        return rope_table(call.chunk.start, *self._grid(call), call.x.device)

    def _timesteps(self, levels: Iterable[tuple[float, int]], device: torch.device) -> Tensor:
        """Noise levels, and how many latent frames in a row have each -> [frames]. Made on the device: what is sent there is waited for."""
        return torch.cat([torch.full((frames,), self.timestep(sigma), device=device) for sigma, frames in levels])


class SkyReelsAdapter(WanAdapter):
    name: ClassVar[str] = "skyreels-v2-df"

    @property
    def polynomial(self) -> tuple[float, ...]:
        return POLYNOMIALS.get((self.width, self.layers), ())

    def whole(self, x: Tensor, sigmas: Sequence[float], text: TextKV, fps: int) -> Tensor:
        levels = ((sigma, len(list(same))) for sigma, same in groupby(sigmas))
        e, e0 = self.network.modulation(self._timesteps(levels, x.device)[None], fps, x.dtype)
        grid = (x.shape[2], x.shape[3] // PATCH, x.shape[4] // PATCH)
        return self.network.velocity(self.network.stack(self.network.embed(x), e0, text, rope_table(0, *grid, x.device), bidirectional), e, grid)

    def film(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return SkyReelsV2.forward(self.network, x, (timestep + ROUNDING).floor().view(-1, 1), self.text(context), bidirectional)


def _per_token(modulation: Tensor, frame: Tensor | None) -> Tensor:
    """[B, F, ...] -> the row of every token's own `frame` [B, n, ...]; one level for all frames (None) stays one row."""
    return modulation if frame is None else modulation[:, frame]
