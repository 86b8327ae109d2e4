"""Expected attention (arXiv 2510.00636): how much attention the queries of the next frames are likely to give a token.

Before they are turned by their position, the queries of a layer keep nearly the same distribution along a film (Future
Forcing, arXiv 2605.30083). With its mean mu and covariance Sigma, and R the mean of the rotations of the positions to come,

    score_j = softmax_j(mu^T R^T k_j / sqrt(D) + 1/2 k_j^T R Sigma R^T k_j / D) * |v_j|

is in closed form what a normal distribution of queries gives. No training, and nobody's attention has to be measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...network import Rotary
from ...settings import check, setting
from ..policy import KVView

if TYPE_CHECKING:
    from ..cache import KVSizes

FRAME_BITS = 16
"""Films of up to 2^16 latent frames."""
NUMBERS_AT_MOST = 2**25
"""Numbers of an intermediate result that are in memory at a time; at least those of one key."""


@dataclass(slots=True, eq=False)
class QueryMoments:
    """Mean [B, H, D] and covariance [B, H, D, D], both float32, of all unturned queries of a layer so far."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    covariance: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor) -> None:
        """float32 [B, H, Q, D]."""
        n, mean = x.shape[2], x.mean(2)
        apart = x - mean.unsqueeze(2)
        covariance = apart.mT @ apart / n
        if self.count:
            share, moved = n / (self.count + n), mean - self.mean
            between = moved.unsqueeze(-1) * moved.unsqueeze(-2)
            covariance = (1 - share) * self.covariance + share * covariance + share * (1 - share) * between
            mean = self.mean + share * moved
        self.count, self.mean, self.covariance = self.count + n, mean, covariance


@dataclass(frozen=True)
class ExpectedAttention:
    """Expected attention. Raises ValueError for a setting outside its range."""

    name: ClassVar[str] = "expected-attention"

    ahead: int = setting(10, "The attention of so many latent frames to come is estimated.", low=1, high=1000, advanced=True)

    def __post_init__(self) -> None:
        check(self)

    def holds(self, sizes: KVSizes, branches: int) -> int:
        moments = sizes.head_dim * (sizes.head_dim + 1)
        return branches * sizes.films * sizes.layers * sizes.heads * sizes.group * moments * torch.float32.itemsize

    def score(self, view: KVView) -> Tensor:
        frames, first = view.new // view.frame_tokens, view.tokens[:1, -view.new] // view.frame_tokens
        device, rotary = view.keys.device, view.rotary
        within = rotary.phases(0, 1, view.grid).to(device, non_blocking=True)
        along = torch.cat([rotary.shift(f) for f in range(frames + self.ahead)]).to(device, non_blocking=True)
        now = _time(rotary, first)

        own = ((now * along[:frames]).unsqueeze(1) * within).flatten(0, 1)
        moments = view.memory.of(QueryMoments, QueryMoments)
        moments.add(rotary.turn(view.queries.float(), own.conj()))

        # phases are a product of one for time and one for the place in the frame, hence so is their mean
        to_come = now * along[frames:].mean(0) * within.mean(0)
        mean = rotary.turn(moments.mean, to_come)
        covariance = rotary.turn(rotary.turn(moments.covariance, to_come).mT.contiguous(), to_come)
        weights = torch.linalg.vector_norm(view.values, dim=-1, dtype=torch.float32)
        return expected(view.keys, mean, covariance) * weights


def expected(k: Tensor, mean: Tensor, covariance: Tensor, at_most: int = NUMBERS_AT_MOST) -> Tensor:
    """softmax_j(mean . k_j / sqrt(D) + k_j^T covariance k_j / 2D), then the mean over the query heads that share a key head.

    [B, H, N, D], [B, G * H, D], [B, G * H, D, D] -> float32 [B, H, N].
    """
    batch, heads, _, d = k.shape
    mean, covariance = mean.unflatten(1, (heads, -1)), covariance.unflatten(1, (heads, -1))
    logits = []
    for part in k.split(max(1, at_most // (batch * mean.shape[1] * mean.shape[2] * d)), 2):
        x = part.float().unsqueeze(2) * d**-0.5
        along = (x @ mean.unsqueeze(-1)).squeeze(-1)
        logits.append(along + ((x @ covariance) * x).sum(-1) / 2)
    return torch.cat(logits, 3).softmax(-1).mean(2)


def _time(rotary: Rotary, frame: Tensor) -> Tensor:
    """Phases of latent frames whose numbers only the device knows: int64 [n] -> complex64 [n, D / 2].

    Put together from moves by powers of two, so that nobody waits for the number.
    """
    steps = torch.cat([rotary.shift(2**bit) for bit in range(FRAME_BITS)]).to(frame.device, non_blocking=True)
    wanted = frame.unsqueeze(-1) >> torch.arange(FRAME_BITS, device=frame.device) & 1
    return torch.where(wanted.bool().unsqueeze(-1), steps, 1).prod(1)
