"""At which steps every token, or every latent cell, of a chunk was computed last.

Where only part of a chunk is computed, its places have pasts of their own, but few distinct ones: between two steps at which all
of it is computed they differ in nothing but who came along. So what depends on the past, the weights of a solver or the reach of
an extrapolation, is worked out once per distinct past, as plain numbers, and laid out over the places. Nothing is read back from
the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REACH = 2
"""Computed steps that are remembered of every place."""


@dataclass(slots=True, eq=False)
class Histories:
    """`known`: the distinct pasts, each the last two computed steps at most, the latest last. Of which kind every place is, is
    `which`, int16 in the shape of the places; None while all are alike."""

    known: tuple[tuple[int, ...], ...] = ((),)
    which: Tensor | None = None

    def computed(self, step: int, chosen: Tensor | None = None) -> None:
        """All places were computed at this step, or those where `chosen`, bool, is True."""
        after = [(*past, step)[-REACH:] for past in self.known]
        if chosen is None:
            self.known = tuple(dict.fromkeys(after))
            self.which = self._moved(after, self.which)
            return
        which = torch.zeros_like(chosen, dtype=torch.int16) if self.which is None else self.which
        self.known = tuple(dict.fromkeys((*self.known, *after)))
        moved = self._moved(after, which)
        self.which = None if moved is None else torch.where(chosen, moved, which)

    def laid_out(self, values: Sequence[float], dtype: torch.dtype) -> float | Tensor:
        """One number per known past -> that of every place; a plain number while all are alike."""
        if self.which is None:
            return values[0]
        out = torch.full(self.which.shape, values[0], dtype=dtype, device=self.which.device)
        for kind, value in enumerate(values[1:], 1):
            out.masked_fill_(self.which == kind, value)
        return out

    def _moved(self, pasts: Iterable[tuple[int, ...]], which: Tensor | None) -> Tensor | None:
        """`which` after the past of kind i has become `pasts[i]`; None where only one is left."""
        if which is None or len(self.known) == 1:
            return None
        out = torch.zeros_like(which)
        for kind, past in enumerate(pasts):
            out.masked_fill_(which == kind, self.known.index(past))
        return out
