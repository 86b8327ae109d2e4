"""What the tests of the published rules share: where the released code lies, and how a chunk's steps are written."""

from __future__ import annotations

from torch import Tensor

MAGI_FOLDER, SKYREELS_FOLDER = "FlowCache4MAGI-1", "FlowCache4SkyReels-V2"
Made = dict[tuple[int, int], Tensor]
"""Of every chunk and step: which tokens were computed, bool [tokens]."""


def letters(made: Made, index: int, steps: int) -> str:
    """Of a chunk: C whole, r not at all, f in part."""
    return "".join("C" if (now := made[index, step]).all() else "f" if now.any() else "r" for step in range(steps))
