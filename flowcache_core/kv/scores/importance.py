"""FlowCache's score (ICLR 2026, KV compression): what is looked at and does not repeat others is kept.

score = lam * importance - (1 - lam) * redundancy. Importance is the attention that a chunk's queries give a token, softmaxed
over the slots that are clean, then the largest among its neighbours. Redundancy is the mean cosine to the other keys,
softmaxed over the slots. Both are about 1 / N: in fewer bits than float32 most scores would be equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from ...kernels.columns import column_sums
from ...kernels.similarity import mean_similarity
from ...settings import check, setting
from ..policy import KVView

LAST = 50
"""Queries that ask where `queries` is token, as published."""


@dataclass(frozen=True)
class ImportanceRedundancy:
    """FlowCache KV. Raises ValueError for a setting outside its range."""

    name: ClassVar[str] = "importance-redundancy"

    lam: float = setting(0.07, "Weight of importance; the rest is the weight of redundancy.", low=0.0, high=1.0, step=0.01, advanced=True)
    kernel: int = setting(7, "A token is as important as the most important of so many around it; an odd number.", low=1, high=63, advanced=True)
    queries: Literal["token", "frame", "chunk"] = setting(
        "frame",
        f"Whose attention counts: that of the finished chunk's last {LAST} tokens, of its last frame, or of the whole chunk.",
        options=("token", "frame", "chunk"), advanced=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        require_odd(self.kernel)

    def score(self, view: KVView) -> Tensor:
        last = {"token": LAST, "frame": view.frame_tokens, "chunk": view.new}[self.queries]
        redundancy = mean_similarity(view.keys).softmax(-1)
        return self.lam * importance(view, last, self.kernel) - (1 - self.lam) * redundancy


def importance(view: KVView, last: int, kernel: int) -> Tensor:
    """float32 [B, H, N]: the mean attention of the last queries, then the largest of `kernel` slots around each.

    Neighbours are neighbours in order, also across the edges of frames and across gaps. Of the query heads that
    share a key head the largest logit counts.
    """
    queries = view.queries[:, :, -last:]
    mean = column_sums(queries, view.keys, "max") / queries.shape[2]
    return F.max_pool1d(mean, kernel, stride=1, padding=kernel // 2)


def require_odd(kernel: int) -> None:
    """Raises ValueError where a slot would not lie in the middle of those around it."""
    if kernel % 2 == 0:
        raise ValueError(f"kernel is {kernel}: a token is in the middle of an odd number only, use {kernel - 1} or {kernel + 1}")
