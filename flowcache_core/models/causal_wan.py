"""Wan 2.1 trained to go on chunk by chunk (Self-Forcing, Causal-Forcing and kin), as far as a KV cache has to know it. The network is the host's."""

from __future__ import annotations

from typing import ClassVar

from ..network import Rotary
from .adapter import SquarePatches
from .skyreels import HEAD_DIM, Rope

NAME = "causal-wan"
"""Of the kind of network, here and in the host."""
HORIZON = 21
"""Latent frames of the films on which these models were trained (Self-Forcing, arXiv 2506.08009, section 4): 81 frames."""
FPS = 16


class CausalWan(SquarePatches):
    """Sizes and rotary positions, which are those of SkyReels-V2. Raises ValueError for heads of another size."""

    name: ClassVar[str] = NAME

    def __init__(self, layers: int, width: int, heads: int) -> None:
        if width != heads * HEAD_DIM:
            raise ValueError(f"{width} channels in {heads} heads: a Wan model has heads of {HEAD_DIM} channels, so this is another kind of network")
        self.layers, self.width, self.heads, self.query_heads, self.head_dim = layers, width, heads, heads, HEAD_DIM
        self.rotary: Rotary = Rope()
