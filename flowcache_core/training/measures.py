"""What a film of sprites shows: which colours and shapes, how many, which way they go, and whether the ground stands still.

A sprite is found by its colour. Its shape is the one whose outline, of as many pixels and at the same centre, covers it best.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from .scenes import COLOURS, DIRECTIONS, SHAPES, Scene, Sprite, outline, render

NEAR, ENOUGH = 0.2, 40
"""A pixel shows a colour within this distance (RGB in 0..1); this many pixels show a sprite."""
LAST, CELL = 4, 8
"""Frames at the end of a film in which what was hidden has to be seen, in more than half of them; pixels from where it should be."""
LOOKED_AT = 8
"""Frames of a film in which shapes are compared, and in which sprites are counted."""


@dataclass
class Tally:
    """Sprites seen with their colour, movers seen going the right way, sprites of the right shape, films with as many sprites as were asked for, and
    grey levels of background drift."""

    sprites: int = 0
    colour_present: int = 0
    movers: int = 0
    direction_right: int = 0
    drift: float = 0.0
    drift_clips: int = 0
    shape_right: int = 0
    films: int = 0
    number_right: int = 0

    def figures(self) -> dict[str, float | int]:
        return {
            "sprites": self.sprites,
            "colour_present": round(self.colour_present / max(self.sprites, 1), 3),
            "movers": self.movers,
            "direction_right": round(self.direction_right / max(self.movers, 1), 3),
            "background_drift_levels": round(self.drift / max(self.drift_clips, 1), 2),
            "shape_right": round(self.shape_right / max(self.sprites, 1), 3),
            "number_right": round(self.number_right / max(self.films, 1), 3),
        }


def colour_masks(film: Tensor) -> dict[str, Tensor]:
    """[T, 3, H, W] in 0..1 -> per colour a bool mask [T, H, W]: the nearest palette colour, if it is near."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
    distance = torch.cdist(film.permute(0, 2, 3, 1).flatten(0, 2), palette)
    near, which = distance.min(1)
    which = torch.where(near < NEAR, which, -1).view(film.shape[0], *film.shape[2:])
    return {name: which == i for i, name in enumerate(COLOURS)}


def went(mask: Tensor, sprite: Sprite) -> str:
    """The direction in which the centre of a mask [T, H, W] moved: over all its visible frames, or before the bounce.

    Jumps of a quarter of the picture do not count: there it has come in again on the other side.
    """
    until = len(mask) // 3 if sprite.verb == "bounces" else len(mask)
    seen = (mask[:until].sum((1, 2)) >= ENOUGH).nonzero().flatten().tolist()
    if len(seen) < 2:
        return ""
    steps = torch.tensor([_centre(mask[i]) for i in seen]).diff(dim=0)
    way = (steps * (steps.abs().amax(1, keepdim=True) < mask.shape[-1] / 4)).sum(0)
    return max(DIRECTIONS, key=lambda d: float(way @ torch.tensor(DIRECTIONS[d], dtype=torch.float32)))


def came_out(film: Tensor, scene: Scene) -> bool:
    """Whether the sprite of a `hidden_scene` is seen at the end of a film [T, 3, H, W]: in its colour, no farther than a latent cell from where
    it is in the true clip."""
    colour = scene.sprites[0].colour
    seen, true = (colour_masks(each)[colour] for each in (film[-LAST:], render(scene, len(film) - LAST, LAST)))
    near = [
        bool(mine.sum() >= ENOUGH) and max(abs(a - b) for a, b in zip(_centre(mine), _centre(theirs), strict=True)) <= CELL
        for mine, theirs in zip(seen, true, strict=True)
    ]
    return sum(near) > LAST / 2


def shape_of(mask: Tensor) -> str:
    """The shape of a sprite of mask [T, H, W], "" where it is not seen. Frames in which it touches an edge count where there are no others."""
    area = mask.sum((1, 2))
    edge = mask[:, 0].any(1) | mask[:, -1].any(1) | mask[:, :, 0].any(1) | mask[:, :, -1].any(1)
    whole, any_of_it = (area >= ENOUGH) & ~edge, area >= ENOUGH
    frames = (whole if whole.any() else any_of_it).nonzero().flatten()
    if len(frames) == 0:
        return ""
    picked = frames[torch.linspace(0, len(frames) - 1, min(LOOKED_AT, len(frames))).round().long()]
    fit = torch.stack([torch.tensor([_covered(mask[int(frame)], shape) for shape in SHAPES]) for frame in picked])
    return SHAPES[int(fit.sum(0).argmax())]


def _covered(mask: Tensor, shape: str) -> float:
    """Intersection over union of a mask [H, W] and a shape of its size at its centre."""
    height, width = mask.shape
    x, y = _centre(mask)
    ys, xs = torch.meshgrid(torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32), indexing="ij")
    template = outline(shape, xs - x, ys - y, (float(mask.sum()) / unit_area(shape)) ** 0.5) < 0
    return float((mask & template).sum() / (mask | template).sum())


@cache
def unit_area(shape: str) -> float:
    """Of a shape of radius 1."""
    side = torch.linspace(-1.5, 1.5, 601)
    ys, xs = torch.meshgrid(side, side, indexing="ij")
    return float((outline(shape, xs, ys, 1.0) < 0).sum()) * 0.005**2


def _centre(mask: Tensor) -> tuple[float, float]:
    """x and y of a mask [H, W] that is not empty."""
    ys, xs = mask.nonzero(as_tuple=True)
    return float(xs.float().mean()), float(ys.float().mean())


def blobs(mask: Tensor) -> Tensor:
    """Regions of at least `ENOUGH` connected pixels in every frame of a mask [T, H, W] -> [T]."""
    number = (torch.arange(1, mask[0].numel() + 1, dtype=torch.float32).view_as(mask[0]) * mask)[:, None]
    while not torch.equal(wider := max_pool2d(number, 3, 1, 1) * mask[:, None], number):
        number = wider
    return torch.tensor([int((frame[frame > 0].unique(return_counts=True)[1] >= ENOUGH).sum()) for frame in number])


def number_of(masks: dict[str, Tensor]) -> int:
    """How many sprites a film shows: the median over frames of what stands apart in one of the colours."""
    some = torch.linspace(0, len(next(iter(masks.values()))) - 1, LOOKED_AT).round().long()
    return int(torch.stack([blobs(mask[some]) for mask in masks.values()]).sum(0).median())


def score(film: Tensor, scene: Scene, chunk_pixels: int, tally: Tally) -> None:
    masks = colour_masks(film)
    tally.films += 1
    tally.number_right += number_of(masks) == len(scene.sprites)
    for sprite in scene.sprites:
        mask = masks[sprite.colour]
        tally.sprites += 1
        tally.colour_present += int((mask.sum((1, 2)) >= ENOUGH).sum() >= 5)
        tally.shape_right += shape_of(mask) == sprite.shape
        if sprite.direction:
            tally.movers += 1
            tally.direction_right += went(mask, sprite) == sprite.direction
    if scene.pan_word == "":
        anything = torch.stack(list(masks.values())).any(0)
        still = ~(anything[:chunk_pixels].any(0) | anything[-chunk_pixels:].any(0))
        change = (film[-chunk_pixels:].mean(0) - film[:chunk_pixels].mean(0)).abs().mean(0)
        tally.drift += float(change[still].mean()) * 255
        tally.drift_clips += 1
