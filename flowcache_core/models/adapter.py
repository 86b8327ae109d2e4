"""What the session needs of a network, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..network import Attend, NetworkSizes
from ..sampling.chunk import Chunk


@dataclass(frozen=True, slots=True)
class Call:
    """One evaluation of one chunk. x: [B, C, F, h, w]; sigma: its noise level; text: as `ModelAdapter.text` made it.

    The last `chunk.held` frames stand at noise level 0, whatever `sigma` is. `branches`: of guidance, which lie one after the other in x;
    text is theirs, or, where an adapter has `OwnTexts`, that of all branches of the run.
    """

    x: Tensor
    sigma: float
    chunk: Chunk
    text: Any
    fps: int
    branches: tuple[Hashable, ...] = ()


class ModelAdapter(NetworkSizes, Protocol):
    """The only code that knows one network. Latents are [B, C, F, h, w], velocities (noise - clean) have the same shape."""

    text_channels: int
    """Numbers that `text` makes of one token of the text, all layers together."""

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in tokens of one latent frame of h x w. Raises ValueError for a frame that does not divide."""
        ...

    def text(self, context: Any) -> Any:
        """What is computed once per prompt: the text's keys and values of every layer.

        context: the branches' text embeddings [B, words, channels], or what `OwnTexts.branch_texts` made of the prompt's.
        """
        ...

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        """-> velocity, and the residual of the block stack [B, T, d]."""
        ...

    def replay(self, call: Call, residual: Tensor) -> Tensor:
        """Velocity from an old residual: embedding and head run at the current noise level, the blocks do not."""
        ...


@runtime_checkable
class TimeSignature(ModelAdapter, Protocol):
    """An adapter that can say before a run how fast the time modulation changes."""

    @property
    def polynomial(self) -> tuple[float, ...]:
        """Published rescaling of these changes, highest power first; () when none was published for this network."""
        ...

    def time_changes(self, sigmas: Sequence[float], fps: int, device: torch.device) -> list[float]:
        """Relative L1 change of the time modulation at every step against the step before it (0 for the first)."""
        ...


@runtime_checkable
class Bidirectional(ModelAdapter, Protocol):
    """An adapter of a network that can attend bidirectionally: every frame sees every other."""

    def whole(self, x: Tensor, sigmas: Sequence[float], text: Any, fps: int) -> Tensor:
        """Velocity of a section [B, C, F, h, w] at one noise level per latent frame."""
        ...

    def film(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """Velocity of a whole film at one timestep per film [B]: how samplers that know no chunks call a network."""
        ...


@runtime_checkable
class ChunkTexts(ModelAdapter, Protocol):
    """An adapter whose text depends on the chunk."""

    def text_of(self, text: Any, chunk: Chunk, chunks: int) -> Any:
        """`text`: as `ModelAdapter.text` made it; `chunks`: of the film."""
        ...


@runtime_checkable
class DurationTexts(ModelAdapter, Protocol):
    """An adapter of a network that reads a duration token: how many chunks are still to come."""

    def with_durations(self, durations: Tensor) -> ModelAdapter:
        """The same adapter, with the embeddings [n, channels] of 0, 1, ... chunks to come."""
        ...


@runtime_checkable
class OwnTexts(ModelAdapter, Protocol):
    """An adapter of a family that is guided inside the run: it knows the texts of the branches that the prompt has no part in."""

    def branch_texts(self, context: Tensor, branches: Sequence[str]) -> Any:
        """The prompt's context [B, words, channels] -> the texts of all branches, in whatever form `text` takes them."""
        ...

    def words(self, prompt: int, branches: Sequence[str]) -> int:
        """Tokens of text that a film has keys and values of, all branches together, for a prompt of so many."""
        ...


@runtime_checkable
class Ranged(ModelAdapter, Protocol):
    """An adapter of a network that looks back less far at some steps, or in some branches."""

    def seen(self, chunk: Chunk, branch: Hashable) -> int | None:
        """Chunks that the chunk sees at its step, itself included; None: all within the window."""
        ...

    def reach(self, chunk: Chunk) -> int | None:
        """The same, of the branch that sees the most. What lies beyond it in all later steps is not kept."""
        ...


def reach_of(adapter: ModelAdapter) -> Callable[[Chunk], int | None] | None:
    """None for a network that always looks back as far as the schedule allows."""
    return adapter.reach if isinstance(adapter, Ranged) else None


@runtime_checkable
class RowAdapter(ModelAdapter, Protocol):
    """An adapter that can take several chunks through the network side by side, each at its own noise level."""

    def forward_row(self, calls: Sequence[Call], attend: Attend) -> Tensor:
        """-> the velocities of all, one behind the other along the frames, as their tokens lie in the sequence. All calls have the same text;
        `attend` has every chunk see what it would see by itself."""
        ...


@runtime_checkable
class TokenAdapter(ModelAdapter, Protocol):
    """An adapter that can run single tokens. A token is a patch of latent cells of one frame."""

    def refresh(self, call: Call, tokens: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """`forward` for the listed tokens [n] of the chunk alone: velocity in the same shape, zero at all other tokens; residual [B, n, d].

        `attend` writes the keys and values of these tokens and sees those of the whole chunk.
        """
        ...

    def output(self, call: Call, residual: Tensor) -> Tensor:
        """[B, T, d]: the last block's output, from the embedding of the call's latents and a residual."""
        ...


def require_tokens(adapter: ModelAdapter, policy: str, chunk_frames: int | None = None) -> TokenAdapter:
    """Raises ValueError, naming the policy, where a model cannot run single tokens, or where chunks of `chunk_frames` have no neighbouring frames."""
    if not isinstance(adapter, TokenAdapter):
        raise ValueError(f"{policy} runs single tokens, which {adapter.name} cannot do here: use Chunkwise Cache with this model")
    if chunk_frames is not None and chunk_frames < 2:
        raise ValueError(
            f"{policy} compares neighbouring frames of a chunk, and chunks of {chunk_frames} latent frame have none: "
            "use chunk_frames 2 or more, or Chunkwise Cache"
        )
    return adapter


def require_time(adapter: ModelAdapter) -> TimeSignature:
    """Raises ValueError where a network has no time modulation that is known before a run."""
    if not isinstance(adapter, TimeSignature):
        raise ValueError(f"signature time follows the time modulation, which {adapter.name} does not have: set signature to latent")
    return adapter


def require_bidirectional(adapter: ModelAdapter) -> Bidirectional:
    """Raises ValueError where a network cannot attend bidirectionally."""
    if not isinstance(adapter, Bidirectional):
        raise ValueError(f"{adapter.name} looks back only, bidirectional attention is not for it: use block-causal attention")
    return adapter


class SquarePatches:
    """A base of adapters whose tokens are squares of `patch` x `patch` latent cells of one frame, each cell eight pixels wide."""

    patch: ClassVar[int] = 2

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        patch = self.patch
        if height % patch or width % patch:
            raise ValueError(
                f"latents of {width}x{height} do not divide into patches of {patch}: use a picture whose sides are multiples of {8 * patch} pixels"
            )
        return height // patch, width // patch

    def tokens_per_frame(self, height: int, width: int) -> int:
        return math.prod(self.token_grid(height, width))
