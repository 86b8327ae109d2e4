"""Causal Wan models behind the adapter seam: the network of SkyReels-V2 without frame rate, its timesteps not rounded. It only looks back."""

from __future__ import annotations

from typing import Any, ClassVar

from ..sampling.noise import TRAIN_STEPS
from .causal_wan import NAME
from .skyreels_adapter import WanAdapter


class CausalWanAdapter(WanAdapter):
    name: ClassVar[str] = NAME

    def timestep(self, sigma: float) -> float:
        return TRAIN_STEPS * sigma


def whole_timestep(sigma: Any) -> Any:
    """The whole timestep next to a noise level; of a tensor of levels, of each."""
    return (TRAIN_STEPS * sigma + 0.5) // 1


class WholeTimesteps(CausalWanAdapter):
    """Of models that were published with whole timesteps, each for the noise level next to it."""

    def timestep(self, sigma: float) -> float:
        return whole_timestep(sigma)
