"""Texts of a CONDITIONING: embeddings, padding, and the durations of MAGI-1 (how many chunks are still to come)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..flowcache_core.models.adapter import DurationTexts, ModelAdapter
from ..flowcache_core.models.family import Family
from ..flowcache_core.models.magi_text import without_padding

MASK = "attention_mask"
"""Key of a conditioning under which the host's text encoders say which rows are words."""
DURATIONS = "flowcache_durations"
"""Key of a conditioning: embeddings [n, channels] of 0, 1, ... chunks to come."""
PADDED = 512
"""Rows to which the host pads texts of umT5 with zeros."""


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
