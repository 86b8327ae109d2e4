"""What a run will hold in memory at its peak, known before it begins: arithmetic on sizes, no tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..kv.layout import capacity
from ..models.adapter import ModelAdapter, reach_of
from ..policies.protocol import CachePolicy, SignaturePolicy, TokenPolicy
from ..sampling.plan import Plan
from ..sampling.schedule import ChunkSchedule

KEPT = 2
"""Computed steps that a chunk remembers per branch at most, and a token that may wait."""
FILMS = 2
"""The film as it was handed over, and as it grows."""
SOLVED = 3
"""Latents of a chunk that a solver remembers: its last two clean ones, and those from which its step set out."""
MOVED = 2
"""The same of the one chunk that was moved last: those that went in and the clean ones that came out."""
NUMBER = 4
"""Bytes of a number of the film, which is float32 whatever the network computes in, and of a count."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes by what they are for. Not in it: what one evaluation of the network needs for a moment."""

    weights: int
    kv: int
    text: int
    predictions: int
    """All that the policy remembers of the chunks in flight."""
    kv_unbounded: int = 0
    """What the KV cache would take without the budget that is set; 0 where none is."""
    latents: int = 0
    """The film and how often its tokens ran, which alone grow with its length; what the solver remembers of the chunks in flight."""

    @property
    def held(self) -> int:
        """What the run holds beside the weights until it ends."""
        return self.kv + self.text + self.predictions + self.latents

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def sentence(self) -> str:
        without = f" ({readable(self.kv_unbounded)} without the budget)" if self.kv_unbounded else ""
        return (
            f"at its peak the run holds weights {readable(self.weights)}, KV cache {readable(self.kv)}{without}, "
            f"text {readable(self.text)}, kept predictions {readable(self.predictions)}, latents {readable(self.latents)}"
        )


def footprint(adapter: ModelAdapter, schedule: ChunkSchedule, latent: tuple[int, int, int], batch: int, text_tokens: int, itemsize: int,
              policy: CachePolicy | None, weights: int = 0, bounded: int | None = None, plan: Plan | None = None,
              films: int = 1, film_frames: int | None = None, cached: int | None = None) -> Footprint:  # fmt: skip
    """Of a run over latents [films, C, frames, h, w].

    `latent`: C, h, w; `batch`: branches x films; `text_tokens`: of all of these together; `itemsize`: bytes of one number in the
    dtype of computation; `policy`: what it wants remembered; `weights`: bytes of the network as it is stored; `films`: side by side;
    `cached`: branches that have a KV cache, None all;
    `plan`: where it computes steps in part, what tokens that wait need (`kv/waiting.py`) counts as the KV cache's.

    The KV cache holds two numbers per layer, channel of the key heads and token of all chunks that are seen at once, or `bounded` bytes under a
    budget. A chunk keeps predictions only while it is being denoised, so the busiest row counts.
    """
    channels, height, width = latent
    cells, frame_tokens = height * width, adapter.tokens_per_frame(height, width)
    token = 2 * adapter.layers * adapter.heads * adapter.head_dim * itemsize
    frames = max(sum(chunk.frames for chunk in row.active) for row in schedule.rows)
    edges = max(len(row.active) for row in schedule.rows) + 1
    frame = Frame(films * channels * cells, films * frame_tokens * adapter.width, cells, frame_tokens, itemsize)
    waiting = batch * waiting_frames(schedule, plan) * frame_tokens * token if plan else 0
    kv = (batch if cached is None else cached * films) * capacity(schedule, frame_tokens, reach=reach_of(adapter)).total * token + waiting
    predictions = frames * (batch // films * frame.replayed(policy) + frame.watched(policy)) + edges * frame.edge(policy)
    latents = (FILMS * (film_frames or schedule.frames) + SOLVED * frames + MOVED * schedule.chunk_frames) * frame.latent * NUMBER
    visits = (film_frames or schedule.frames) * frame_tokens * NUMBER
    here, otherwise = (kv, 0) if bounded is None else (bounded + waiting, kv)
    return Footprint(weights, here, text_tokens * adapter.text_channels * itemsize, predictions, otherwise, latents + visits)


@dataclass(frozen=True, slots=True)
class Frame:
    """What a policy remembers of one latent frame in flight, in bytes. `latent`, `inside`: numbers of its latents and of its tokens
    in the blocks, all films together; `cells`, `tokens`: places in it; `itemsize`: bytes of a number as computed."""

    latent: int
    inside: int
    cells: int
    tokens: int
    itemsize: int

    def replayed(self, policy: CachePolicy | None) -> int:
        """Per branch."""
        return KEPT * self.itemsize * {None: 0, "velocity": self.latent, "residual": self.inside}[policy.keeps if policy else None]

    def watched(self, policy: CachePolicy | None) -> int:
        """The latents before, for the change of the signature; what motion is measured on; every token's drift, age and noise levels."""
        signature = self.latent * self.itemsize if isinstance(policy, SignaturePolicy) and policy.signature == "latent" else 0
        if not isinstance(policy, TokenPolicy):
            return signature
        seen = {"clean": self.latent * NUMBER, "output": self.inside * self.itemsize * (policy.keeps != "residual")}.get(policy.watches, 0)
        levels = KEPT * (self.cells if policy.keeps == "velocity" else self.tokens)
        return signature + seen + (levels + 2 * self.tokens) * NUMBER

    def edge(self, policy: CachePolicy | None) -> int:
        """The last frame of a chunk, which the next compares its first with."""
        if not isinstance(policy, TokenPolicy):
            return 0
        return {"clean": self.latent * NUMBER, "noisy": self.latent * self.itemsize, "output": self.inside * self.itemsize}.get(policy.watches, 0)


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
