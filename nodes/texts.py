"""Texts of a CONDITIONING: embeddings, padding, durations of MAGI-1 (how many chunks are still to come), and the chunks for which they count."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import comfy.conds
import torch

from ..flowcache_core.models.adapter import DurationTexts, ModelAdapter
from ..flowcache_core.models.family import Family
from ..flowcache_core.models.magi_text import without_padding
from .settings_on_model import PROMPTS_NODE

MASK = "attention_mask"
"""Key of a conditioning under which the host's text encoders say which rows are words."""
DURATIONS = "flowcache_durations"
"""Key of a conditioning: embeddings [n, channels] of 0, 1, ... chunks to come."""
FROM = "flowcache_from_chunk"
"""Key of a conditioning: the chunk from which on it counts, from 0. Those of a prompt schedule lie one behind the other, and the first has 0."""
RECACHE = "flowcache_recache"
"""Key of a conditioning that is set where history is evaluated anew when it begins to count."""
CHUNKS_ONLY = "flowcache_chunks_only"
"""Key among a conditioning's inputs of the network: there until a sampler that knows chunks takes it away."""
PADDED = 512
"""Rows to which the host pads texts of umT5 with zeros."""


Cond = dict[str, Any]
"""A conditioning as a guider has it."""


def read_rows(text: torch.Tensor, mask: torch.Tensor | None, family: Family) -> torch.Tensor:
    """The rows that the network reads, [films, words, channels]."""
    return text if mask is None or family.words is None else without_padding(text, mask)


def require_texts(conds: Iterable[dict[str, Any]], family: Family, adapter: ModelAdapter, channels: int) -> None:
    """Raises ValueError for texts that the network of a family cannot read. `channels`: of the text that it takes."""
    for one in conds:
        if (text := one.get("cross_attn")) is not None:
            _require_text(text, one, family, channels)
        if one.get(DURATIONS) is not None and not isinstance(adapter, DurationTexts):
            raise ValueError(f"MAGI Special Tokens says how many chunks are to come, which {family.title} does not read: bypass that node")


def _require_text(text: torch.Tensor, one: dict[str, Any], family: Family, channels: int) -> None:
    if text.shape[-1] != channels:
        raise ValueError(f"the text has {text.shape[-1]} channels, and this model takes {channels}: use the text encoder of {_way_out(family)}")
    if family.words is None:
        return
    if one.get("pooled_output") is not None:
        raise ValueError(
            "the text encoder was loaded as a type that pads prompts without saying where they end, and every row of a text is read here: use "
            f"that of {_way_out(family)}"
        )
    words = read_rows(text, one.get(MASK), family)
    rows = words.shape[1] + (one.get(DURATIONS) is not None)
    if rows > family.words:
        raise ValueError(f"the text has {rows} tokens, and {family.title} reads at most {family.words}: shorten the prompt by {rows - family.words}")
    if rows >= PADDED and not words[:, -1].any():
        raise ValueError(f"the text ends in rows of zeros, as umT5 pads it: use the text encoder of {_way_out(family)}")


def _way_out(family: Family) -> str:
    return f"{family.title}: {family.loaders.clip}"


def with_durations(adapter: ModelAdapter, conds: Iterable[dict[str, Any]]) -> ModelAdapter:
    """The adapter, with the durations of a text that has them."""
    durations = [one[DURATIONS] for one in conds if one.get(DURATIONS) is not None]
    return adapter.with_durations(durations[0]) if durations and isinstance(adapter, DurationTexts) else adapter


class ChunksOnly(comfy.conds.CONDRegular):  # type: ignore[misc]
    """Among the inputs of the network: refuses every evaluation that does not know chunks, in which the prompts of all of them would be mixed."""

    def process_cond(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"{PROMPTS_NODE} has a prompt for every chunk, and what samples here knows no chunks: use AR Chunk Sampler with the MODEL of Load AR "
            "Video Model, or put KV Compressor between a causal model of ComfyUI's own and the guider of Sampler AR Video (a budget of 1000 chunks "
            "keeps all of history)"
        )


def scheduled(text: torch.Tensor, extra: Cond, first: int, recache: bool) -> list[Any]:
    """One entry of a CONDITIONING: a text that counts from a chunk on."""
    guard = {**extra.get("model_conds", {}), CHUNKS_ONLY: ChunksOnly(torch.zeros(1))}
    return [text, {**extra, FROM: first, "model_conds": guard, **({RECACHE: True} if recache and first else {})}]


def by_branch(conds: Iterable[Cond]) -> list[list[Cond]]:
    """The texts of each branch: one, or those of a prompt schedule in order."""
    out: list[list[Cond]] = []
    for one in conds:
        if one.get(FROM) and out:
            out[-1].append(one)
        else:
            out.append([one])
    return out


def tokens_of(some: Iterable[Cond]) -> int:
    """Rows of the longest of these texts."""
    return max((one["cross_attn"].shape[1] for one in some if one.get("cross_attn") is not None), default=0)


def named_branches(conds: Mapping[str, Iterable[Cond]]) -> dict[str, list[Cond]]:
    """The texts of a guider by branch, each with a name of its own that is the same in every process."""
    return {f"{name} {k}" if k else name: some for name, many in conds.items() for k, some in enumerate(by_branch(many))}


class ChunkConds:
    """The texts of a run: which of them count for a chunk, and to which branch each belongs. `conds`: of the guider."""

    def __init__(self, conds: Mapping[str, Iterable[Cond]]) -> None:
        self.branches = named_branches(conds)
        self._known = {one.get("uuid") for some in self.branches.values() for one in some}

    @property
    def firsts(self) -> list[int]:
        """Chunks from which on a text counts."""
        return [one.get(FROM, 0) for some in self.branches.values() for one in some]

    @property
    def recached(self) -> set[int]:
        """Chunks before which history is evaluated anew."""
        return {one[FROM] for some in self.branches.values() for one in some if one.get(RECACHE)}

    def at(self, chunk: int) -> dict[Hashable, str]:
        """The texts that count for a chunk, by what the host calls them -> names of their branches."""
        counts = {name: [one for k, one in enumerate(some) if not k or one[FROM] <= chunk][-1] for name, some in self.branches.items()}
        return {one["uuid"]: name for name, one in counts.items() if "uuid" in one}

    def only(self, names: Mapping[Hashable, str], conds: Sequence[list[Cond] | None], start: int, frames: int) -> list[list[Cond] | None]:
        """Of the texts of an evaluation of `frames` latent frames from `start` on, those that count, as `at` has them, and those that are none of
        the guider's. Masks are those of these frames."""
        return [
            None if many is None else [_plain(one, start, frames) for one in many if one.get("uuid") in names or one.get("uuid") not in self._known]
            for many in conds
        ]


def _plain(one: Cond, start: int, frames: int) -> Cond:
    """Without what keeps other samplers from it. Masks [films, frames of the film or 1, h, w] are cut to the frames that are evaluated."""
    if (mask := one.get("mask")) is not None and mask.ndim == 4 and mask.shape[1] > 1:
        one = {**one, "mask": mask[:, start : start + frames]}
    inputs = one.get("model_conds", {})
    return one if CHUNKS_ONLY not in inputs else {**one, "model_conds": {key: value for key, value in inputs.items() if key != CHUNKS_ONLY}}
