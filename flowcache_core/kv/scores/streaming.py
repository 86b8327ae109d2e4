"""StreamingLLM (arXiv 2309.17453): the newest tokens are kept, beside the first ones, which the budget protects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..policy import KVView


@dataclass(frozen=True)
class StreamingLLM:
    """Sink and recent: a token's score is minus its age in tokens. It has no settings."""

    name: ClassVar[str] = "sink-recent"
    shared: ClassVar[bool] = True

    def score(self, view: KVView) -> Tensor:
        return (view.tokens - view.tokens.amax(1, keepdim=True)).float()[:, None]
