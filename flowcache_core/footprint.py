"""What a run will hold in memory at its peak, known before it begins: arithmetic on sizes, no tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from .rows import capacity
from .schedule import ChunkSchedule

if TYPE_CHECKING:
    from .decision import Replay
    from .models.adapter import ModelAdapter

KEPT = 2
"""Computed steps that a chunk remembers per branch at most."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes by what they are for. Not in it: what one evaluation of the network needs for a moment."""

    weights: int
    kv: int
    text: int
    predictions: int

    @property
    def held(self) -> int:
        """What lies beside the weights until the run ends."""
        return self.kv + self.text + self.predictions

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def sentence(self) -> str:
        parts = (("weights", self.weights), ("KV cache", self.kv), ("text", self.text), ("kept predictions", self.predictions))
        return "at its peak the run holds " + ", ".join(f"{name} {readable(size)}" for name, size in parts)


def footprint(adapter: ModelAdapter, schedule: ChunkSchedule, latent: tuple[int, int, int], rows: int, text_tokens: int, itemsize: int,
              keeps: Replay | None, weights: int = 0, budget: int | None = None, kv: int | None = None) -> Footprint:  # fmt: skip
    """Of a run over latents [batch, C, frames, h, w].

    `latent`: C, h, w; `rows`: branches x batch; `text_tokens`: of all rows together; `itemsize`: bytes of one number in the
    dtype of computation; `keeps`: what the policy wants remembered; `weights`: bytes of the network as it is stored.

    The KV cache holds two numbers per layer, channel and token, of the chunks that are seen or of `budget` rows of history
    and the chunks that are being denoised, unless `kv` says how many bytes it takes. A chunk keeps predictions only while it
    is being denoised, so the busiest row counts.
    """
    channels, height, width = latent
    frame_tokens, channels_inside = adapter.tokens_per_frame(height, width), adapter.heads * adapter.head_dim
    token = 2 * adapter.layers * channels_inside * itemsize
    kept = {None: 0, "velocity": channels * height * width, "residual": frame_tokens * channels_inside}[keeps]
    frames = max(sum(chunk.frames for chunk in row.active) for row in schedule.rows)
    kv = rows * capacity(schedule, frame_tokens, budget).total * token if kv is None else kv
    return Footprint(weights, kv, text_tokens * token, KEPT * rows * frames * kept * itemsize)


def readable(size: float) -> str:
    """Bytes in GiB, below 0.1 GiB in MiB: 26.61 GiB, 42.0 MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
