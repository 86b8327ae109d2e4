"""Colours of a VAE's latents, for previews that decode nothing: the linear map of a latent cell to the mean colour of its pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..models.family import Preview
from ..models.wan_vae import TEMPORAL
from ..sampling.frames import FOUR_N_PLUS_1, Frames
from .scenes import Scene, make_scene, render
from .vae import Codes

CLIPS, LATENTS = 16, 5


def fit(vae: Codes, seeds: Iterable[int] = range(CLIPS), scene: Callable[[int], Scene] = make_scene, pixels: Frames = FOUR_N_PLUS_1) -> Preview:
    """By least squares over the cells of procedural clips, which `scene` draws up and `vae` encodes; `pixels`: how it counts frames."""
    known, wanted = (torch.cat(each) for each in zip(*(cells(vae, scene(seed), pixels) for seed in seeds), strict=True))
    with_one = torch.cat([known, known.new_ones(len(known), 1)], 1)
    *factors, bias = torch.linalg.lstsq(with_one, wanted).solution.tolist()
    return Preview(tuple(map(_rounded, factors)), _rounded(bias))


@torch.no_grad()
def cells(vae: Codes, scene: Scene, pixels: Frames = FOUR_N_PLUS_1) -> tuple[Tensor, Tensor]:
    """Of the beginning of one clip: latents [cells, channels], and what each cell shows, colours [cells, 3] in -1..1."""
    film = render(scene, frames=pixels.pixel(LATENTS)).transpose(0, 1)[None] * 2 - 1
    latents = vae.encode(film)
    first = film[:, :, :1].expand(-1, -1, TEMPORAL - pixels.first, -1, -1)
    shown = torch.nn.functional.avg_pool3d(torch.cat([first, film], 2), (TEMPORAL, 8, 8))
    return tuple(one[0].flatten(1).T for one in (latents, shown))  # type: ignore[return-value]


def _rounded(colour: list[float]) -> tuple[float, float, float]:
    red, green, blue = (round(value, 4) for value in colour)
    return red, green, blue
