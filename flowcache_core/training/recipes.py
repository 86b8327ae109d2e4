"""The bundled models by name: how each is trained, and on what it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..models.causal_wan_family import SELF_FORCING
from ..models.family import Family
from ..models.magi_family import MAGI
from ..models.skyreels_family import SKYREELS
from ..run.generate import Job
from . import causal, dit, magi, magi_vae, vae
from .loop import USUAL, TrainOptions
from .scenes import Scene, make_scene


class TrainNetwork(Protocol):
    def __call__(self, out: Path, steps: int, batch: int, options: TrainOptions = USUAL) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """`scene`: index -> a clip like those that it was trained on; `job`: films by which it is judged.

    `vae`: trains the VAE in a folder, given the steps of its stages, None where the model has that of another; `vae_steps`: these steps, by
    name, in their order. `teacher`: family and films of the model that it was distilled from.
    """

    family: Family
    scene: Callable[[int], Scene]
    job: Job
    vae: Callable[..., None] | None
    vae_steps: Mapping[str, int]
    network: TrainNetwork
    steps: int
    batch: int
    teacher: tuple[Family, Job] | None = None


SKYREELS_VAE = {"autoencoder": vae.AUTOENCODER_STEPS, "encoder": vae.ENCODER_STEPS, "decoder": vae.DECODER_STEPS}
RECIPES = {
    "tiny-skyreels": Recipe(SKYREELS, make_scene, Job(""), vae.train, SKYREELS_VAE, dit.train, dit.STEPS, dit.BATCH),
    "tiny-magi": Recipe(
        MAGI, magi.scene, Job.usual(MAGI, ""), magi_vae.train, {"decoder": magi_vae.DECODER_STEPS}, magi.train, magi.STEPS, magi.BATCH
    ),
    "tiny-causal": Recipe(
        SELF_FORCING, make_scene, Job.usual(SELF_FORCING, ""), None, {}, causal.train, causal.STEPS, causal.BATCH,
        (SKYREELS, Job("", ar_step=Job.steps)),
    ),
}  # fmt: skip
