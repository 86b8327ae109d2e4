"""H2O (arXiv 2306.14048): heavy hitters, the tokens that all queries so far have given the most attention.

A running sum: what a token was given in earlier chunks stays with its slot and grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...kernels.columns import column_sums
from ..policy import KVView


@dataclass(frozen=True)
class H2O:
    """H2O. It has no settings."""

    name: ClassVar[str] = "h2o"

    def score(self, view: KVView) -> Tensor:
        return view.carried[:, None] + column_sums(view.queries, view.keys)
