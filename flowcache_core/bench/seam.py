"""`bench seam`: how visible the join is where a film is extended, against the ordinary change from frame to frame.

A clip of the bundled model is extended, from its last frames, in every way there is, and the mean absolute difference
between its last frame and the first new one is set beside that of neighbouring frames inside the two parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..device import fast_dtype
from ..models.bundle import Bundle, load_bundle
from ..run.generate import Given, Job, decode, generate, generate_upstream
from ..sampling.frames import Frames
from .measured import data, origin, table
from .prompts import PROMPTS, seed_of

NAME = "seam"


@dataclass(frozen=True)
class Method:
    """One way to extend. `frames`: pixel frames of the clip that are given; 0 gives all of it.

    rolled: the clip stays in place and the window rolls on. latents: its last latents become the first of a new film.
    pixels: its last frames are encoded anew. published: the same, bidirectional, as SkyReels-V2 extends its films.
    """

    rule: str
    frames: int

    def extend(self, bundle: Bundle, job: Job, clip: Tensor, film: Tensor) -> tuple[Tensor, Tensor]:
        """`clip`: latents [1, C, F, h, w]; `film`: its frames [T, 3, H, W] -> the clip's frames and the new ones, as joined."""
        if self.rule == "rolled":
            longer = replace(job, frames=bundle.family.frames.pixel(2 * clip.shape[2]))
            whole = decode(bundle, generate(bundle, longer, given=Given(start=clip))[0])
            return whole[: len(film)], whole[len(film) :]
        latents = bundle.family.frames.latent(self.frames)
        if self.rule == "latents":
            more, _ = generate(bundle, job, given=Given(start=clip[:, :, -latents:]))
            whole = decode(bundle, torch.cat([clip, more[:, :, latents:]], 2))
            return whole[: len(film)], whole[len(film) :]
        given = Given(start=encode(bundle, film[-self.frames :]))
        make = generate_upstream if self.rule == "published" else generate
        return film, decode(bundle, make(bundle, job, given=given)[0])[self.frames :]


RULES = (Method("rolled", 0), Method("latents", 9), Method("latents", 17), Method("pixels", 9), Method("pixels", 17), Method("published", 17))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=8, help=f"how many of the {len(PROMPTS)} fixed prompts (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rules", default="", help="only these rules, by name, separated by commas")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows": [...]}: means over the prompts, see `measure`."""
    if not 1 <= args.prompts <= len(PROMPTS):
        raise ValueError(f"{args.prompts} prompts were asked for: there are 1 to {len(PROMPTS)}")
    wanted = [r for r in RULES if not args.rules or r.rule in args.rules.split(",")]
    if not wanted:
        raise ValueError(f"no rule is called {args.rules}: there are {', '.join(dict.fromkeys(r.rule for r in RULES))}")
    jobs = [Job(PROMPTS[index], steps=args.steps, seed=seed_of(index)) for index in range(args.prompts)]
    bundle = load_bundle(fast_dtype())
    return {"steps": args.steps, "prompts": args.prompts, "dtype": bundle.dtype, "rows": measure(bundle, jobs, wanted)}


def measure(bundle: Bundle, jobs: list[Job], rules: list[Method]) -> list[dict[str, Any]]:
    """One row per rule, in grey levels of 255: `seam`, `ordinary` (all neighbouring frames), `boundary` (those that part two latent frames).

    `setting` is the number of given frames; share, psnr, ssim and wall_ratio have no meaning here and are null.
    """
    sums = [torch.zeros(3) for _ in rules]
    with tqdm(total=len(jobs) * (len(rules) + 1), unit="film") as bar:
        for job in jobs:
            clip, _ = generate(bundle, job)
            film = decode(bundle, clip)
            bar.update()
            for rule, total in zip(rules, sums, strict=True):
                total += torch.tensor(jumps(*rule.extend(bundle, replace(job, seed=job.seed + 500), clip, film), bundle.family.frames))
                bar.update()
    means = [(total / len(jobs)).tolist() for total in sums]
    return [
        {"rule": rule.rule, "setting": rule.frames or jobs[0].frames, "share": None, "psnr": None, "ssim": None, "wall_ratio": None,
         "seam": round(seam, 3), "ordinary": round(ordinary, 3), "boundary": round(boundary, 3)}
        for rule, (seam, ordinary, boundary) in zip(rules, means, strict=True)
    ]  # fmt: skip


def jumps(before: Tensor, after: Tensor, frames: Frames) -> tuple[float, float, float]:
    """Two films [T, 3, H, W] in 0..1 that are joined -> mean absolute change at the seam, between neighbouring frames, and at latent boundaries.

    A film begins with the `first` frames of a latent frame (`Frames`), and then every latent frame is `each`; what comes after the seam begins
    with a whole one.
    """
    inside = [change(film[1:], film[:-1]) for film in (before, after)]
    edges = [inside[0][frames.first - 1 :: frames.each], inside[1][frames.each - 1 :: frames.each]]
    return float(change(after[:1], before[-1:])), float(torch.cat(inside).mean()), float(torch.cat(edges).mean())


def change(a: Tensor, b: Tensor) -> Tensor:
    """[T, 3, H, W] twice, 0..1 -> [T], in grey levels of 255."""
    return (a - b).abs().mean((1, 2, 3)) * 255


@torch.inference_mode()
def encode(bundle: Bundle, film: Tensor) -> Tensor:
    """Frames [T, 3, H, W] in 0..1 that fill whole latent frames -> latents [1, C, F, h, w]."""
    return bundle.vae.encode((film.transpose(0, 1)[None] * 2 - 1).to(next(bundle.vae.parameters()))).float()


def shown() -> str:
    lines = [[row[key] for key in ("rule", "setting", "seam", "ordinary", "boundary")] for row in data(NAME)["rows"]]
    return table(["way", "given frames", "seam", "ordinary", "latent boundary"], lines)


FIGURES: dict[str, Callable[[], str]] = {"seam": shown, "seam-origin": lambda: origin(NAME)}
