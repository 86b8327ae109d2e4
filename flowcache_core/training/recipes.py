"""The bundled models by name: how each is trained, and on what it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..models.family import Family
from ..models.magi_family import MAGI
from ..models.skyreels_family import SKYREELS
from ..run.generate import Job
from . import dit, magi, magi_vae, vae
from .scenes import Scene, make_scene


class TrainNetwork(Protocol):
    def __call__(self, out: Path, steps: int, batch: int, until: int | None = None, start: Path | None = None) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """`scene`: index -> a clip like those that it was trained on; `job`: films by which it is judged.

    `vae`: trains the VAE in a folder, given the steps of its stages; `vae_steps`: these, by name, in their order.
    """

    family: Family
    scene: Callable[[int], Scene]
    job: Job
    vae: Callable[..., None]
    vae_steps: Mapping[str, int]
    network: TrainNetwork
    steps: int
    batch: int


SKYREELS_VAE = {"autoencoder": vae.AUTOENCODER_STEPS, "encoder": vae.ENCODER_STEPS, "decoder": vae.DECODER_STEPS}
RECIPES = {
    "tiny-skyreels": Recipe(SKYREELS, make_scene, Job(""), vae.train, SKYREELS_VAE, dit.train, dit.STEPS, dit.BATCH),
    "tiny-magi": Recipe(
        MAGI, magi.scene, Job.usual(MAGI, ""), magi_vae.train, {"decoder": magi_vae.DECODER_STEPS}, magi.train, magi.STEPS, magi.BATCH
    ),
}  # fmt: skip
