"""The figures of the model card: does the film show what the prompt says, and does it hold still where it should?

Held-out scenes give prompts; films come from noise. Each measure (`measures.py`) is also taken of the true clips of the same scenes, which is its
ceiling, and with the prompts of other scenes, which is chance.
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
from ..run.generate import Given, Job, decode, generate
from ..show.metrics import mean_and_error, psnr
from .measures import Tally, came_out, score
from .scenes import HELD_OUT, HIDDEN_CHUNK, Scene, hidden_scene, make_scene, render
from .vae import reconstruction

BY_CHANCE = ("colour_present", "direction_right", "shape_right", "number_right")
"""What a film may show of a prompt that it was not made of."""


SEEN_AGAIN = 69
"""Frames of a film by whose end a sprite that was hidden is seen nearly whole."""


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
        "films_against_other_prompts": {name: value for name, value in other.figures().items() if name in BY_CHANCE},
        **({"teacher": likeness.figures()} if likeness else {}),
    }  # fmt: skip


def hidden(bundle: Bundle, job: Job, clips: int = 16) -> dict[str, float]:
    """Of true clips the share in which a sprite that was hidden for two chunks comes out again: of `measures.came_out`.

    The film is theirs up to there and made without a prompt from there on. `whole`: with all of history; `none`: chunks that see themselves alone;
    `ceiling`: the true clip through the VAE.
    """
    alone, counts = replace(bundle, layout=replace(bundle.layout, window=1)), dict.fromkeys(("whole", "none", "ceiling"), 0)
    chunk = bundle.layout.chunk_frames
    latest, end = (HIDDEN_CHUNK - 1) * chunk, HIDDEN_CHUNK * chunk
    for seed in range(clips):
        scene = hidden_scene(seed)
        latents = bundle.vae.encode((render(scene, frames=SEEN_AGAIN).transpose(0, 1)[None] * 2 - 1).to(bundle.vae.conv2.weight)).float()
        asked = replace(job, prompt="", cfg=1.0, frames=SEEN_AGAIN, seed=seed, ar_step=job.steps)
        rest = replace(asked, frames=bundle.family.frames.pixel(latents.shape[2] - latest))
        whole, _ = generate(bundle, asked, given=Given(latents[:, :, :end]))
        forgetful, _ = generate(alone, rest, given=Given(latents[:, :, latest:end]))
        films = {"whole": whole, "none": torch.cat([latents[:, :, :latest], forgetful], 2), "ceiling": latents}
        for name, made in films.items():
            counts[name] += came_out(decode(bundle, made), scene)
    return {name: round(count / clips, 3) for name, count in counts.items()}


def vae_of(family: Family, path: Path | None = None) -> Any:
    """The VAE of a family's tiny model in a file, by default the bundled one, in float32 whatever the network computes in."""
    assert family.bundled is not None
    return family.bundled.load_vae({k: v.float() for k, v in read(path or files_of(family)[1])[0].items()})


def contact_sheet(film: Tensor, shots: int = 5) -> np.ndarray:
    """[T, 3, H, W] -> uint8 [H, shots * W, 3]: evenly spaced frames in a row."""
    picked = film[torch.linspace(0, len(film) - 1, shots).round().long()]
    return (picked.permute(2, 0, 3, 1).flatten(1, 2) * 255).round().byte().numpy()
