"""What the session needs of a network, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..network import Attend, NetworkSizes
from ..sampling.chunk import Chunk


@dataclass(frozen=True, slots=True)
class Call:
    """One evaluation of one chunk. x: [B, C, F, h, w]; sigma: its noise level; text: as `ModelAdapter.text` made it.

    The last `chunk.held` frames stand at noise level 0, whatever `sigma` is.
    """

    x: Tensor
    sigma: float
    chunk: Chunk
    text: Any
    fps: int


class ModelAdapter(NetworkSizes, Protocol):
    """The only code that knows one network. Latents are [B, C, F, h, w], velocities (noise - clean) have the same shape."""

    name: ClassVar[str]

    def text(self, context: Tensor) -> Any:
        """What is computed once per prompt: the text's keys and values of every layer."""
        ...

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        """-> velocity, and the residual of the block stack [B, T, d]."""
        ...

    def replay(self, call: Call, residual: Tensor) -> Tensor:
        """Velocity from an old residual: embedding and head run at the current noise level, the blocks do not."""
        ...

    def whole(self, x: Tensor, sigmas: Sequence[float], text: Any, fps: int) -> Tensor:
        """Velocity of a whole window at one noise level per latent frame; every frame sees every other."""
        ...

    def time_changes(self, sigmas: Sequence[float], fps: int, device: torch.device) -> list[float]:
        """Relative L1 change of the time modulation at every step against the step before it (0 for the first)."""
        ...


@runtime_checkable
class TokenAdapter(ModelAdapter, Protocol):
    """An adapter that can run single tokens. A token is a square patch of latent cells of one frame."""

    def refresh(self, call: Call, tokens: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """`forward` for the listed tokens [n] of the chunk alone: velocity in the same shape, zero at all other tokens; residual [B, n, d].

        `attend` writes the keys and values of these tokens and sees those of the whole chunk.
        """
        ...

    def output(self, call: Call, residual: Tensor) -> Tensor:
        """[B, T, d]: the last block's output, from the embedding of the call's latents and a residual."""
        ...


def require_tokens(adapter: ModelAdapter, chunk_frames: int | None = None) -> TokenAdapter:
    """Raises ValueError where a model cannot refresh single tokens, or where chunks of `chunk_frames` have no neighbouring frames to compare."""
    if not isinstance(adapter, TokenAdapter):
        raise ValueError(f"Motion Cache refreshes single tokens, which {adapter.name} cannot do here: use Chunkwise Cache with this model")
    if chunk_frames is not None and chunk_frames < 2:
        raise ValueError(
            f"Motion Cache compares neighbouring frames of a chunk, and chunks of {chunk_frames} latent frame have none: "
            "use chunk_frames 2 or more, or Chunkwise Cache"
        )
    return adapter
