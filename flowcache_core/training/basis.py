"""The latent space of a bundled model: sixteen leading principal components of patches of 4 frames x 8 x 8 pixels.

A small VAE's encoder is taught to produce these latents and its decoder to invert them, and the network is trained on
them directly, so the two trainings are independent and clips need no encoding. The space is smooth: near latents are near
pictures. Components keep a quarter power of their variance (whitened they would all weigh alike and the network would
spend itself on noise; as they are, only brightness would count), and an orthogonal rotation spreads them so that every
channel has unit variance, as the Wan 2.1 latent format promises. Films of 4n + 1 frames count their first frame four times, those of 4n do not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import whole
from ..models.wan_vae import LATENT_CHANNELS, SPATIAL, TEMPORAL
from .scenes import Scene, make_scene, render

BASIS = "basis.safetensors"
"""Its file in the folder of a training."""
CLIPS = 160
"""Clips that the components are measured on."""
POWER = 0.25
"""A component of variance v is scaled to the standard deviation v ** POWER before the rotation."""


class Basis:
    """`mean` [768]; `to` [16, 768]: patch -> latent; `back` [768, 16]: its inverse on the span."""

    def __init__(self, mean: Tensor, to: Tensor, back: Tensor) -> None:
        self.mean, self.to, self.back = mean, to, back

    def at(self, device: torch.device) -> Basis:
        return Basis(self.mean.to(device), self.to.to(device), self.back.to(device))

    def encode(self, film: Tensor) -> Tensor:
        """[3, 4n+1 or 4n+4, H, W] in -1..1 -> [16, n+1, H/8, W/8]. Of 4n+1 frames the first counts as four equal ones."""
        _, frames, h, w = film.shape
        film = torch.cat([film[:, :1].expand(-1, -frames % TEMPORAL, -1, -1), film], 1)
        patches = film.view(3, -1, TEMPORAL, h // SPATIAL, SPATIAL, w // SPATIAL, SPATIAL).permute(1, 3, 5, 2, 0, 4, 6).flatten(3)
        return ((patches - self.mean) @ self.to.T).permute(3, 0, 1, 2).contiguous()

    def decode(self, latents: Tensor, first: int = 1) -> Tensor:
        """[16, n+1, h, w] -> [3, 4n+first, 8h, 8w], the least-squares picture. Used to look at a network before there is a VAE.

        `first`: pixel frames of the first latent frame."""
        _, n, h, w = latents.shape
        patches = (latents.permute(1, 2, 3, 0) @ self.back.T + self.mean).view(n, h, w, TEMPORAL, 3, SPATIAL, SPATIAL)
        film = patches.permute(4, 0, 3, 1, 5, 2, 6).reshape(3, n * TEMPORAL, h * SPATIAL, w * SPATIAL)
        return film[:, TEMPORAL - first :]


def fit(clips: int = CLIPS, scene: Callable[[int], Scene] = make_scene) -> Basis:
    """Principal components of the patches of training clips 0 .. clips - 1, which `scene` draws up."""
    size = TEMPORAL * 3 * SPATIAL * SPATIAL
    identity = Basis(torch.zeros(size), torch.eye(size), torch.eye(size))
    count, total, second = 0, torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    for seed in range(clips):
        x = identity.encode(render(scene(seed)).transpose(0, 1) * 2 - 1).flatten(1)
        count += x.shape[1]
        total += x.sum(1)
        second += x @ x.T
    mean = total / count
    values, vectors = torch.linalg.eigh(second / count - torch.outer(mean, mean))
    values, vectors = values[-LATENT_CHANNELS:].flip(0), vectors[:, -LATENT_CHANNELS:].flip(1)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    deviation = values**POWER
    deviation = deviation / deviation.square().mean().sqrt()
    scale = deviation / values.sqrt()
    turn = hadamard(LATENT_CHANNELS)
    return Basis(mean.float(), (turn @ (vectors * scale).T).float(), ((vectors / scale) @ turn.T).float())


def hadamard(size: int) -> Tensor:
    """Orthogonal [size, size] of entries +-1/sqrt(size); `size` a power of two. float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def basis_of(vae: Path) -> Path:
    """The file beside a bundled VAE of which its latents are."""
    return vae.with_stem(f"{vae.stem}-basis")


def load_or_fit(folder: Path, clips: int = CLIPS, scene: Callable[[int], Scene] = make_scene) -> Basis:
    """That in `folder`, made on the first call."""
    path = folder / BASIS
    if not path.exists():
        made = fit(clips, scene)
        with whole(path) as partial:
            save_file({"mean": made.mean, "to": made.to.contiguous(), "back": made.back.contiguous()}, partial)
    return Basis(**load_file(path))
