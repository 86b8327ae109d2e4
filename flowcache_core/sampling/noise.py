"""Noise levels: which a chunk goes through, and in what form the network is given them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

TRAIN_STEPS = 1000
MOST = 10**6
"""Steps of a run of which the last are taken."""
NEAREST = 1e-6
"""Levels that are nearer to each other are one to a network, and solvers divide by their distance."""
ROUNDING = 3e-5
"""Of a timestep: what float32, in which hosts hand over levels, takes from one at most."""


class Noise(Protocol):
    """What a family was trained on. Levels are of the flow: x = (1 - sigma) * clean + sigma * noise."""

    @property
    def shift(self) -> float:
        """The published setting of `levels`."""
        ...

    @property
    def commit(self) -> float:
        """The level that the network is given in the pass that rewrites a finished chunk's keys and values."""
        ...

    def levels(self, steps: int, shift: float, denoise: float = 1.0) -> tuple[float, ...]:
        """`steps` + 1 levels, falling to 0. Raises ValueError for what cannot be made."""
        ...

    def timestep(self, sigma: float) -> float:
        """What the network is given for a level."""
        ...


@runtime_checkable
class Curved(Noise, Protocol):
    """Noise whose levels are a curve over the run, which a host's scheduler can follow."""

    def level(self, place: float, shift: float) -> float:
        """The level at a place 0..1 of a run whose steps are equally long, falling from 1 to 0."""
        ...


@dataclass(frozen=True, slots=True)
class FlowNoise:
    """Evenly spaced levels, shifted; timesteps truncated to integers, as SkyReels-V2 does."""

    shift: float = 8.0
    commit: float = 0.0

    def levels(self, steps: int, shift: float, denoise: float = 1.0) -> tuple[float, ...]:
        return flow_sigmas(steps, shift, denoise)

    def timestep(self, sigma: float) -> int:
        return timestep(sigma)


def flow_sigmas(steps: int, shift: float = 8.0, denoise: float = 1.0) -> tuple[float, ...]:
    """`steps` + 1 noise levels from just below 1 down to 0, shifted as s * x / (1 + (s - 1) * x).

    `denoise` < 1 keeps the last `steps` of int(steps / denoise) steps, as ComfyUI's schedulers do: a given film is then
    changed only so far.
    """
    total, first = steps_in_all(steps, denoise, "50 is the published setting"), 1 - 1 / TRAIN_STEPS
    levels = (first * (1 - i / total) for i in range(total - steps, total))
    return (*(shift * x / (1 + (shift - 1) * x) for x in levels), 0.0)


def steps_in_all(steps: int, denoise: float, published: str) -> int:
    """Of a run whose last `steps` are kept where `denoise` is below 1. Raises ValueError for what makes no run."""
    if steps < 1:
        raise ValueError(f"{steps} steps were asked for: at least 1 is needed ({published})")
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise {denoise} is not above 0 and at most 1: 1 makes a new film, 0.5 keeps the rough shape of the given one")
    if steps / denoise > MOST:
        raise ValueError(f"denoise {denoise:.3g} of {steps} steps is the end of more than {MOST} steps: use a larger denoise, 0.1 or more")
    return int(steps / denoise)


def timestep(sigma: float) -> int:
    """The integer timestep 0..999 that the network is given for a noise level; truncated, as upstream does.

    Upstream begins at 0.999 in float32, which is a little more, so levels that are whole timesteps stay whole there.
    """
    return int(TRAIN_STEPS * sigma + ROUNDING)


def require_levels(levels: Sequence[float]) -> None:
    """Raises ValueError for noise levels that do not fall at every step from at most 1 to 0, or by too little."""
    if len(levels) < 2 or levels[-1] != 0 or not 0 < levels[0] <= 1:
        raise ValueError(
            f"noise levels from {levels[0] if levels else None} to {levels[-1] if levels else None}: they have to fall from at most 1 to 0"
        )
    for step, (now, to) in enumerate(pairwise(levels)):
        if not to < now:
            raise ValueError(
                f"the noise level stays at {now:g} or rises, to {to:g}, at step {step + 1} of {len(levels) - 1}: every step has to lower it; ask the "
                "scheduler for fewer steps or more denoise, or take the repeated levels out"
            )
        if now - to < NEAREST:
            raise ValueError(
                f"the noise level falls from {now:g} by only {now - to:.3g} at step {step + 1} of {len(levels) - 1}, and {NEAREST:g} is the least: "
                "ask the scheduler for fewer steps"
            )
