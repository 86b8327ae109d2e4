"""What a run will hold in memory at its peak, known before it begins: arithmetic on sizes, no tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..kv.layout import capacity
from ..models.adapter import ModelAdapter
from ..policies.protocol import Replay
from ..sampling.plan import Plan
from ..sampling.schedule import ChunkSchedule

KEPT = 2
"""Computed steps that a chunk remembers per branch at most, and a token that may wait."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes by what they are for. Not in it: what one evaluation of the network needs for a moment."""

    weights: int
    kv: int
    text: int
    predictions: int
    kv_unbounded: int = 0
    """What the KV cache would take without the budget that is set; 0 where none is."""

    @property
    def held(self) -> int:
        """What lies beside the weights until the run ends."""
        return self.kv + self.text + self.predictions

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def sentence(self) -> str:
        without = f" ({readable(self.kv_unbounded)} without the budget)" if self.kv_unbounded else ""
        return (
            f"at its peak the run holds weights {readable(self.weights)}, KV cache {readable(self.kv)}{without}, "
            f"text {readable(self.text)}, kept predictions {readable(self.predictions)}"
        )


def footprint(adapter: ModelAdapter, schedule: ChunkSchedule, latent: tuple[int, int, int], rows: int, text_tokens: int, itemsize: int,
              keeps: Replay | None, weights: int = 0, bounded: int | None = None, plan: Plan | None = None) -> Footprint:  # fmt: skip
    """Of a run over latents [batch, C, frames, h, w].

    `latent`: C, h, w; `rows`: branches x batch; `text_tokens`: of all rows together; `itemsize`: bytes of one number in the
    dtype of computation; `keeps`: what the policy wants remembered; `weights`: bytes of the network as it is stored;
    `plan`: where it computes steps in part, what tokens that wait need (`kv/waiting.py`) lies beside the KV cache and counts as its.

    The KV cache holds two numbers per layer, channel and token of all chunks that are seen at once, or `bounded` bytes under a
    budget. A chunk keeps predictions only while it is being denoised, so the busiest row counts.
    """
    channels, height, width = latent
    frame_tokens, channels_inside = adapter.tokens_per_frame(height, width), adapter.heads * adapter.head_dim
    token = 2 * adapter.layers * channels_inside * itemsize
    kept = {None: 0, "velocity": channels * height * width, "residual": frame_tokens * channels_inside}[keeps]
    frames = max(sum(chunk.frames for chunk in row.active) for row in schedule.rows)
    waiting = rows * waiting_frames(schedule, plan) * frame_tokens * token if plan else 0
    kv = rows * capacity(schedule, frame_tokens).total * token + waiting
    predictions = KEPT * rows * frames * kept * itemsize
    if bounded is None:
        return Footprint(weights, kv, text_tokens * token, predictions)
    return Footprint(weights, bounded + waiting, text_tokens * token, predictions, kv)


def waiting_frames(schedule: ChunkSchedule, plan: Plan) -> int:
    """Latent frames of which keys and values are kept for tokens that wait, once per computed step up to two, in the busiest row."""
    most, computed = 0, [0] * schedule.chunks
    for row in schedule.rows:
        for chunk in row.active:
            computed[chunk.index] += plan.computes(chunk)
        most = max(most, sum(chunk.frames * min(computed[chunk.index], KEPT) for chunk in row.active if plan.is_partial(chunk.index)))
    return most


def readable(size: float) -> str:
    """Bytes in GiB, below 0.1 GiB in MiB: 26.61 GiB, 42.0 MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
