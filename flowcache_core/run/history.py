"""What a budget left of history, chunk by chunk."""

from __future__ import annotations

from itertools import groupby
from typing import Any, ClassVar

import numpy as np

from ..sampling.chunk import Chunk
from .footprint import readable

STAGES_SHOWN = 6
"""Of a history that grew in more stages than this only the first and the last are listed."""


class HistoryLog:
    """`frames` has an array per finished chunk: kept tokens of every latent frame so far, mean over layers, branches and films; `bytes`
    what they took. `places`: at the end, the share of these that keep each token of the film, float64 [tokens so far].
    """

    remembers: ClassVar[tuple[str, ...]] = ("frames", "bytes", "places")
    frames: list[np.ndarray]
    bytes: list[int]
    places: np.ndarray | None

    def __init__(self) -> None:
        self.frames, self.bytes, self.places = [], [], None

    def kept(self, chunk: Chunk, tokens: np.ndarray, frame_tokens: int, size: int = 0) -> None:
        """What was left when `chunk` joined, `size` bytes. tokens: int [branches, layers, films, slots], numbers in the film."""
        lists = tokens.size // max(tokens.shape[-1], 1)
        counts = np.bincount(tokens.ravel(), minlength=(chunk.start + chunk.frames) * frame_tokens) / lists
        self.frames.append(counts.reshape(-1, frame_tokens).sum(1))
        self.bytes.append(size)
        self.places = counts

    @property
    def tokens(self) -> list[int]:
        """Per layer, after every finished chunk."""
        return [round(float(frames.sum())) for frames in self.frames]

    def line(self) -> str:
        """How history grew, in one sentence; "" where no budget was set or no chunk was finished."""
        if self.places is None:
            return ""
        stages = [list(same) for _, same in groupby(enumerate(self.tokens, 1), key=lambda stage: stage[1])]
        when = [f"after chunk {same[0][0]}" if len(same) == 1 else f"after chunks {same[0][0]} to {same[-1][0]}" for same in stages]
        parts = [f"{same[0][1]} {where} ({readable(self.bytes[same[0][0] - 1])})" for where, same in zip(when, stages, strict=True)]
        parts = parts if len(parts) <= STAGES_SHOWN else [parts[0], "...", parts[-1]]
        return f"history in tokens per layer: {', '.join(parts)}, of {len(self.places)} finished ones"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; {} without a budget."""
        if not self.frames:
            return {}
        return {"tokens": self.tokens, "bytes": list(self.bytes), "frames": [round(float(kept), 2) for kept in self.frames[-1]]}
