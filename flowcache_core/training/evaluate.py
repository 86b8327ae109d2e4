"""The figures of the model card: does the film show what the prompt says, and does it hold still where it should?

Held-out scenes give prompts; films come from noise. A sprite is found by its colour. Each measure is also taken of the
true clips of the same scenes, which is the ceiling of the measure, and, for colours, with the prompts of other scenes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..models.bundle import Bundle, files_of
from ..models.checkpoint import read
from ..models.family import Family
from ..run.generate import Job, decode, generate
from ..show.metrics import mean_and_error, psnr
from .scenes import COLOURS, DIRECTIONS, HELD_OUT, Scene, Sprite, make_scene, render
from .vae import reconstruction

NEAR, ENOUGH = 0.2, 40
"""A pixel shows a colour within this distance (RGB in 0..1); this many pixels show a sprite."""


@dataclass
class Tally:
    """Sprites seen with their colour, movers seen going the right way, and grey levels of background drift."""

    sprites: int = 0
    colour_present: int = 0
    movers: int = 0
    direction_right: int = 0
    drift: float = 0.0
    drift_clips: int = 0

    def figures(self) -> dict[str, float | int]:
        return {
            "sprites": self.sprites,
            "colour_present": round(self.colour_present / max(self.sprites, 1), 3),
            "movers": self.movers,
            "direction_right": round(self.direction_right / max(self.movers, 1), 3),
            "background_drift_levels": round(self.drift / max(self.drift_clips, 1), 2),
        }


def colour_masks(film: Tensor) -> dict[str, Tensor]:
    """[T, 3, H, W] in 0..1 -> per colour a bool mask [T, H, W]: the nearest palette colour, if it is near."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
    distance = torch.cdist(film.permute(0, 2, 3, 1).flatten(0, 2), palette)
    near, which = distance.min(1)
    which = torch.where(near < NEAR, which, -1).view(film.shape[0], *film.shape[2:])
    return {name: which == i for i, name in enumerate(COLOURS)}


def went(mask: Tensor, sprite: Sprite) -> str:
    """The direction in which the centre of a mask [T, H, W] moved: over all its visible frames, or before the bounce."""
    until = len(mask) // 3 if sprite.verb == "bounces" else len(mask)
    area = mask[:until].sum((1, 2))
    seen = (area >= ENOUGH).nonzero().flatten()
    if len(seen) < 2:
        return ""
    ys, xs = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in mask.shape[1:]), indexing="ij")
    first, last = (torch.stack([(xs * mask[i]).sum() / area[i], (ys * mask[i]).sum() / area[i]]) for i in (int(seen[0]), int(seen[-1])))
    moved = last - first
    return max(DIRECTIONS, key=lambda d: float(moved @ torch.tensor(DIRECTIONS[d], dtype=torch.float32)))


def score(film: Tensor, scene: Scene, chunk_pixels: int, tally: Tally) -> None:
    masks = colour_masks(film)
    for sprite in scene.sprites:
        mask = masks[sprite.colour]
        tally.sprites += 1
        tally.colour_present += int((mask.sum((1, 2)) >= ENOUGH).sum() >= 5)
        if sprite.direction:
            tally.movers += 1
            tally.direction_right += went(mask, sprite) == sprite.direction
    if scene.pan_word == "":
        anything = torch.stack(list(masks.values())).any(0)
        still = ~(anything[:chunk_pixels].any(0) | anything[-chunk_pixels:].any(0))
        change = (film[-chunk_pixels:].mean(0) - film[:chunk_pixels].mean(0)).abs().mean(0)
        tally.drift += float(change[still].mean()) * 255
        tally.drift_clips += 1


@dataclass
class Likeness:
    """Films beside those that the model's teacher makes of the same noise and prompt."""

    bundle: Bundle
    job: Job
    chunk_pixels: int
    films: Tally = field(default_factory=Tally)
    psnr: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)
    before: Tensor | None = None

    def add(self, film: Tensor, scene: Scene, seed: int) -> None:
        made = decode(self.bundle, generate(self.bundle, replace(self.job, prompt=scene.caption, seed=seed))[0])
        score(made, scene, self.chunk_pixels, self.films)
        self.psnr.append(psnr(film, made))
        if self.before is not None:
            self.other.append(psnr(film, self.before))
        self.before = made

    def figures(self) -> dict[str, Any]:
        """`psnr`: mean over the films and its standard error; `other`: the same against the film of the prompt before, which is chance."""
        return {"name": self.bundle.name, "steps": self.job.steps, "cfg": self.job.cfg, "ar_step": self.job.ar_step, "films": self.films.figures(),
                "psnr_db": mean_and_error(self.psnr), "psnr_of_other_prompts_db": mean_and_error(self.other or self.psnr)}  # fmt: skip


def held_out(number: int) -> int:
    """Which scene the figures' film of this number is of."""
    return HELD_OUT + 1000 + number


def evaluate(bundle: Bundle, job: Job, scene: Callable[[int], Scene] = make_scene, prompts: int = 50,
             teacher: tuple[Bundle, Job] | None = None) -> dict[str, Any]:  # fmt: skip
    """Films like `job` of `prompts` held-out captions with seeds 0, 1, ...; takes some ten seconds a film of 50 steps on two cores.

    `scene`: index -> a clip as the model was trained on, at least as long as the job's films. `teacher`: what the model was distilled from,
    and its films.
    """
    film_of, truth, other = Tally(), Tally(), Tally()
    vae_psnr = reconstruction(vae_of(bundle.family), scene=scene)
    chunk_pixels = bundle.family.frames.each * bundle.layout.chunk_frames
    likeness = Likeness(*teacher, chunk_pixels) if teacher else None
    for i in tqdm(range(prompts), unit="film"):
        asked = scene(held_out(i))
        latents, _ = generate(bundle, replace(job, prompt=asked.caption, seed=i))
        film = decode(bundle, latents)
        score(film, asked, chunk_pixels, film_of)
        score(render(asked, frames=job.frames), asked, chunk_pixels, truth)
        score(film, scene(held_out((i + 1) % prompts)), chunk_pixels, other)
        if likeness:
            likeness.add(film, asked, i)
    return {
        "prompts": prompts, "steps": job.steps, "job": {k: v for k, v in asdict(job).items() if k in ("cfg", "shift", "ar_step", "solver", "frames")},
        "vae_psnr_db": round(vae_psnr, 2), "films": film_of.figures(), "true_clips": truth.figures(),
        "films_against_other_prompts": {"colour_present": other.figures()["colour_present"], "direction_right": other.figures()["direction_right"]},
        **({"teacher": likeness.figures()} if likeness else {}),
    }  # fmt: skip


def vae_of(family: Family, path: Path | None = None) -> Any:
    """The VAE of a family's tiny model in a file, by default the bundled one, in float32 whatever the network computes in."""
    assert family.bundled is not None
    return family.bundled.load_vae({k: v.float() for k, v in read(path or files_of(family)[1])[0].items()})


def contact_sheet(film: Tensor, shots: int = 5) -> np.ndarray:
    """[T, 3, H, W] -> uint8 [H, shots * W, 3]: evenly spaced frames in a row."""
    picked = film[torch.linspace(0, len(film) - 1, shots).round().long()]
    return (picked.permute(2, 0, 3, 1).flatten(1, 2) * 255).round().byte().numpy()
