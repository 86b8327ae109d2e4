"""Colours of a VAE's latents, for previews that decode nothing: the linear map of a latent cell to the mean colour of its pixels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..models.family import Preview
from ..models.wan_vae import WanVAE
from .scenes import make_scene, render

CLIPS = 16
FRAMES = 17


def fit(vae: WanVAE, seeds: Iterable[int] = range(CLIPS)) -> Preview:
    """By least squares over the cells of procedural clips, encoded by `vae`."""
    known, wanted = (torch.cat(each) for each in zip(*(cells(vae, seed) for seed in seeds), strict=True))
    with_one = torch.cat([known, known.new_ones(len(known), 1)], 1)
    *factors, bias = torch.linalg.lstsq(with_one, wanted).solution.tolist()
    return Preview(tuple(map(_rounded, factors)), _rounded(bias))


@torch.no_grad()
def cells(vae: WanVAE, seed: int, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    """Of one clip: latents [cells, channels], and what each cell shows, colours [cells, 3] in -1..1."""
    film = render(make_scene(seed), frames=frames).transpose(0, 1)[None] * 2 - 1
    latents = vae.encode(film)
    first, rest = film[:, :, :1], film[:, :, 1:]
    each = torch.cat([first, rest.unflatten(2, (-1, 4)).mean(3)], 2)
    shown = torch.nn.functional.avg_pool3d(each, (1, 8, 8))
    return tuple(one[0].flatten(1).T for one in (latents, shown))  # type: ignore[return-value]


def _rounded(colour: list[float]) -> tuple[float, float, float]:
    red, green, blue = (round(value, 4) for value in colour)
    return red, green, blue
