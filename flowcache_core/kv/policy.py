"""What a KV policy may look at when a chunk becomes history, and what it says: a number per slot, higher is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from ..memory import RunMemory
from ..network import NetworkSizes, Rotary

if TYPE_CHECKING:
    from .cache import KVSizes

Unit = Literal["chunks", "seconds", "GiB"]
Granularity = Literal["token", "frame", "chunk"]
Stored = Literal["as computed", "fp8", "int8", "int4"]
Positions = Literal["within the window", "as they are"]
STORED: tuple[Stored, ...] = ("as computed", "fp8", "int8", "int4")


@dataclass(frozen=True, slots=True, eq=False)
class KVView:
    """One layer of the cache right after the clean pass of the chunk that becomes history. Its slots are the last `new` of N.

    B is the batch, films x branches, H heads, D channels of a head. All N slots are clean, in order of position.
    """

    layer: int
    keys: Tensor
    """[B, H, N, D], rotated, as attention sees them (read back from storage where that has fewer bits)."""
    values: Tensor
    """[B, H, N, D]."""
    queries: Tensor
    """[B, H, new, D]: of the finished chunk in its clean pass, rotated. H may be a multiple of that of the keys (grouped heads)."""
    hidden: Tensor
    """[B, new, C]: what the layer's self-attention was given in that pass."""
    tokens: Tensor
    """int64 [B, N], ascending: number of each slot's token in the film, frame x `frame_tokens` + place."""
    carried: Tensor
    """float32 [B, N]: what the policy's scores of the older slots were the last time, mean over heads; 0 for new slots."""
    new: int
    frame_tokens: int
    grid: tuple[int, int]
    """Height and width of a frame in tokens."""
    rotary: Rotary
    """How the network turns queries and keys by their position."""
    memory: RunMemory
    """What the policy remembers of this layer and these branches from chunk to chunk."""
    shared: RunMemory
    """What it keeps for the run as a whole."""


class KVPolicy(Protocol):
    """A frozen dataclass of settings and one method. It is asked once per layer and finished chunk."""

    name: ClassVar[str]

    def score(self, view: KVView) -> Tensor:
        """-> float32 [B, H or 1, N]. No host sync, no randomness but a seeded one: two runs give the same."""
        ...


@runtime_checkable
class SharedKVPolicy(KVPolicy, Protocol):
    """A policy whose scores are the same for all heads: it gives [B, 1, N], also where there is a head alone."""

    shared: ClassVar[bool]


@runtime_checkable
class LearntKVPolicy(KVPolicy, Protocol):
    """A policy with weights of its own, made for one network."""

    def for_network(self, network: NetworkSizes) -> KVPolicy:
        """Itself with the weights for a network. Raises ValueError, before a run, where they are for one of another size."""
        ...


@runtime_checkable
class SamplingKVPolicy(KVPolicy, Protocol):
    """A policy whose slots are a fair sample of all that are not protected, so that each stands for its share of those that went."""

    @property
    def stands_for(self) -> float:
        """For how many at most."""
        ...


@runtime_checkable
class RememberingKVPolicy(KVPolicy, Protocol):
    """A policy that needs memory worth counting beside the slots' scores."""

    def holds(self, sizes: KVSizes, branches: int) -> int:
        """Bytes, for a whole run."""
        ...


def fitted(policy: KVPolicy, network: NetworkSizes) -> KVPolicy:
    """The policy, with the weights for a network where it has any. Raises ValueError for those of another."""
    return policy.for_network(network) if isinstance(policy, LearntKVPolicy) else policy
