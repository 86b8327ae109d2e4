"""SnapKV (arXiv 2404.14469): the attention that the last tokens give another one, averaged over its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ...kernels.columns import column_sums
from ...settings import check, setting
from ..policy import KVView
from .importance import require_odd


@dataclass(frozen=True)
class SnapKV:
    """SnapKV. Raises ValueError for a setting outside its range."""

    name: ClassVar[str] = "snapkv"

    window: int = setting(64, "The attention of so many last tokens of the finished chunk counts.", low=1, high=100000, advanced=True)
    kernel: int = setting(5, "A token's attention is averaged over so many around it; an odd number.", low=1, high=63, advanced=True)

    def __post_init__(self) -> None:
        check(self)
        require_odd(self.kernel)

    def score(self, view: KVView) -> Tensor:
        queries = view.queries[:, :, -self.window :]
        mean = column_sums(queries, view.keys) / queries.shape[2]
        return F.avg_pool1d(mean, self.kernel, stride=1, padding=self.kernel // 2)
