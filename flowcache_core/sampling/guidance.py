"""Which branches of a network are run side by side, and how their velocities become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Guidance(Protocol):
    """How a family is guided. `scale` is what people call CFG; 1 is none."""

    @property
    def inside(self) -> bool:
        """Whether the run makes the branches itself from one text (`models.adapter.OwnTexts`); otherwise the host has a text for each."""
        ...

    def branches(self, scale: float) -> tuple[str, ...]:
        """The prompt's branch first."""
        ...

    def needed(self, scale: float, sigma: float) -> tuple[str, ...]:
        """Those that are run at noise level `sigma`, the first so many of `branches`. Asked only where guidance is inside.

        Left out are branches whose velocity has no weight there and whose keys and values no later chunk looks back on.
        """
        ...

    def remembered(self, scale: float) -> tuple[str, ...]:
        """Those that look back on finished chunks, the first so many of `branches`: they alone are run in a commit pass."""
        ...

    def combine(self, velocities: Sequence[Tensor], scale: float, sigma: float) -> Tensor:
        """Velocities in the order of `branches`, or of `needed`, at noise level `sigma` -> one of the same shape."""
        ...


@dataclass(frozen=True, slots=True)
class ClassifierFree:
    """Classifier-free guidance: uncond + scale * (cond - uncond)."""

    inside: bool = False

    def branches(self, scale: float) -> tuple[str, ...]:
        return ("cond",) if scale == 1 else ("cond", "uncond")

    def needed(self, scale: float, sigma: float) -> tuple[str, ...]:
        return self.branches(scale)

    def remembered(self, scale: float) -> tuple[str, ...]:
        return self.branches(scale)

    def combine(self, velocities: Sequence[Tensor], scale: float, sigma: float) -> Tensor:
        if len(velocities) == 1:
            return velocities[0]
        cond, uncond = velocities
        return uncond + scale * (cond - uncond)
