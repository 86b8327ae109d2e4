"""R-KV (arXiv 2505.24133): importance against redundancy, where of keys that repeat each other the newest is spared.

For every key the newest other key that resembles it (cosine above 0.5) is not held against that one. A key that nothing
resembles spares none. The published code takes the logits of all queries of a window of 8 and compares keys pair by pair;
so does this, in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...kernels.similarity import mean_similarity_but_to_newest
from ...settings import check, setting
from ..policy import KVView
from .importance import importance, require_odd


@dataclass(frozen=True)
class RKV:
    """R-KV. Raises ValueError for a setting outside its range."""

    name: ClassVar[str] = "r-kv"

    lam: float = setting(0.07, "Weight of importance; the rest is the weight of redundancy.", low=0.0, high=1.0, step=0.01, advanced=True)
    kernel: int = setting(7, "A token is as important as the most important of so many around it; an odd number.", low=1, high=63, advanced=True)
    window: int = setting(8, "The attention of so many last tokens of the finished chunk counts.", low=1, high=100000, advanced=True)
    alike: float = setting(0.5, "Keys whose cosine lies above this repeat each other.", low=-1.0, high=1.0, step=0.05, advanced=True)

    def __post_init__(self) -> None:
        check(self)
        require_odd(self.kernel)

    def score(self, view: KVView) -> Tensor:
        redundancy = mean_similarity_but_to_newest(view.keys, self.alike).softmax(-1)
        return self.lam * importance(view, self.window, self.kernel) - (1 - self.lam) * redundancy
