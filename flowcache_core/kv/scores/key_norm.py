"""Short keys are kept (arXiv 2406.11430): in language models a short key goes with much attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..policy import KVView


@dataclass(frozen=True)
class KeyNorm:
    """Minus the length of the key. It has no settings."""

    name: ClassVar[str] = "key-norm"

    def score(self, view: KVView) -> Tensor:
        return -torch.linalg.vector_norm(view.keys, dim=-1, dtype=torch.float32)
