"""KeyDiff (arXiv 2504.15364): keys that point away from the mean direction are kept; nobody has to look at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...kernels.similarity import cosine_to_mean
from ..policy import KVView


@dataclass(frozen=True)
class KeyDiff:
    """KeyDiff. It has no settings."""

    name: ClassVar[str] = "keydiff"

    def score(self, view: KVView) -> Tensor:
        return -cosine_to_mean(view.keys)
