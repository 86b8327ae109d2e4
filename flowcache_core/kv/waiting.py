"""Keys and values of tokens that wait: what a chunk's tokens said at their last two computed steps, drawn on to the present one.

A token that waits would otherwise be seen as it was at a higher noise level, by its own chunk and by later ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..sampling.histories import Histories


@dataclass(slots=True, eq=False)
class Waiting:
    """Of one chunk, all layers, for branches that run together. `begin` a step, then `write` every layer."""

    tokens: int
    histories: Histories = field(default_factory=Histories)
    _pairs: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """By layer: keys and values [branches x films, heads, tokens, head_dim] of the last two computed steps of every token."""
    _only: Tensor | None = None
    _ahead: float | Tensor = 0.0

    @property
    def drawn(self) -> bool:
        """Whether there are two points to draw a line through."""
        return len(self.histories.known[0]) == 2

    @property
    def bytes(self) -> int:
        return sum(k.nbytes + v.nbytes for pairs in self._pairs.values() for k, v in pairs)

    def begin(self, step: int, only: Tensor | None) -> None:
        """`only`, int64 [n]: the tokens that are computed at this step; None: all."""
        self._only, chosen = only, None
        if only is not None:
            ahead = [(step - past[-2]) / (past[-1] - past[-2]) for past in self.histories.known]
            along = self.histories.laid_out(ahead, torch.float32)
            self._ahead = along[:, None] if isinstance(along, Tensor) else along
            chosen = torch.zeros(self.tokens, dtype=torch.bool, device=only.device).index_fill_(0, only, True)
        self.histories.computed(step, chosen)

    def write(self, layer: int, fresh: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor]) -> None:
        """`fresh`: keys and values of the tokens of this step; `out`: the slots of all. Those that wait get their line."""
        kept, only = self._pairs.setdefault(layer, []), self._only
        if only is None:
            self._pairs[layer] = [*kept[-1:], fresh]
            for slots, new in zip(out, fresh, strict=True):
                slots.copy_(new)
            return
        for before, last, new, slots in zip(*kept, fresh, out, strict=True):
            torch.lerp(before, last, self._ahead.to(last.dtype) if isinstance(self._ahead, Tensor) else self._ahead, out=slots)
            slots.index_copy_(2, only, new)
            before.index_copy_(2, only, last.index_select(2, only))
            last.index_copy_(2, only, new)
