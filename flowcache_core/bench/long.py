"""`bench long`: does what was asked for stay in a long film? Films of a minute of held-out scenes in which nothing leaves for good.

Of every ten seconds the last chunks are looked at: which prompted colours are there, how far the mean picture has moved from that of the first
chunk, how much contrast and saturation there is for that of the first chunk, how much changes from frame to frame, and PSNR to the film of the plain
window. The arms differ in what history keeps. `chance`: the colours of another prompt; `ceiling` and `true_motion`: the same of the true clip.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..device import fast_dtype
from ..kv.compressor import Compressor
from ..kv.policy import KVPolicy, Positions
from ..kv.scores.even import Even
from ..kv.scores.random import Random
from ..kv.scores.salience import Salience
from ..kv.scores.streaming import StreamingLLM
from ..models.bundle import BUNDLED, Bundle, load_bundle, weights_id
from ..models.bundle import NAME as BUNDLED_NAME
from ..policies.planned import Planned
from ..run.generate import Job, decode, generate, run_of
from ..run.sink import returns
from ..show.metrics import mean_and_error, psnr
from ..training.evaluate import held_out
from ..training.measures import ENOUGH, colour_masks
from ..training.scenes import Scene, make_scene, render
from .sweep import over

NAME = "long"
STRETCH = 10
"""Seconds."""
LOOKED = 2
"""Chunks at the end of a stretch."""
SINK = 3
"""Latent frames of the film's beginning that a budget keeps, if not told otherwise: the first chunk, as in LongLive (arXiv 2509.22622)."""
FRAMES_SEEN = 5
"""Frames in which a colour has to be, as in the figures of the model card."""
WINDOW = "window"
WHOLE = "whole film"
"""What ComfyUI's own sampler keeps."""
SHORTER = "shorter window"
"""As long as the budget: what a sliding window of so many chunks keeps."""


POLICIES = (StreamingLLM(), Random(), Even(), Salience())


@dataclass(frozen=True)
class Arm:
    """What history keeps: all that the window holds (None), or a budget. `sink`: latent frames of the film's beginning that the budget keeps;
    `whole`: the budget has room for all of the film."""

    policy: KVPolicy | None = None
    sink: int = SINK
    positions: Positions = "within the window"
    whole: bool = False

    def made(self, bundle: Bundle, job: Job, budget: float, share: float) -> tuple[Tensor, Any]:
        """-> latents, report. `budget`: in chunks; `share`: see `plan_of`."""
        room = job.schedule(bundle).chunks if self.whole else budget
        history = Compressor(self.policy, room, sink=self.sink, positions=self.positions) if self.policy else None
        return generate(bundle, job, plan_of(share), compressor=history)


ARMS = {
    WINDOW: Arm(),
    SHORTER: Arm(StreamingLLM(), sink=0),
    "even, no sink": Arm(Even(), sink=0),
    WHOLE: Arm(Even(), positions="as they are", whole=True),
    **{policy.name: Arm(policy) for policy in POLICIES},
    **{f"{policy.name}, positions grow": Arm(policy, positions="as they are") for policy in POLICIES},
}
SHOWN = (WINDOW, "even", "even, positions grow")
MEASURES = ("colour", "chance", "ceiling", "moved", "contrast", "saturation", "motion", "true_motion")
Values = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=tuple(BUNDLED), default=BUNDLED_NAME, help="which of the bundled models (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="films of an arm (default %(default)s)")
    parser.add_argument("--seconds", type=int, default=60, help="length of the films, in whole tens (default %(default)s)")
    parser.add_argument("--steps", type=int, help="default: those of the model")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the tokens is computed, by Chunkwise Cache's plan (default %(default)s: uncached)"
    )
    parser.add_argument("--ar-step", type=int, help="default: one chunk after the other, so that history is all that the window holds")
    parser.add_argument("--budget", type=float, default=3.0, help="history of the arms that have a budget, in chunks (default %(default)s)")
    parser.add_argument("--arms", default="; ".join(SHOWN), help=f"which arms, separated by semicolons, of {'; '.join(ARMS)} (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="films made side by side, each on its share of the cores (default %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows": by arm and stretch}. Raises ValueError, before any film is made, for what cannot work."""
    require_seconds(args.seconds)
    if args.prompts < 2 or args.workers < 1:
        raise ValueError(f"{args.prompts} prompts and {args.workers} workers were asked for: use at least 2 and 1")
    family, arms = BUNDLED[args.model], named_arms(args.arms)
    bundle, numbers = load_bundle(fast_dtype(), family=family), lasting_scenes(args.prompts)
    run_of(bundle, job_of(bundle, numbers[0], args.seconds, args.steps, args.ar_step), plan_of(args.share))
    work = partial(long_film, seconds=args.seconds, budget=args.budget, steps=args.steps, ar_step=args.ar_step, share=args.share)
    films = over([(number, arm) for arm in arms for number in numbers], work, args.workers, bundle)
    by_arm = {arm: films[k * len(numbers) : (k + 1) * len(numbers)] for k, arm in enumerate(arms)}
    settings = {key: getattr(args, key) for key in ("prompts", "seconds", "steps", "ar_step", "share", "budget", "workers")}
    return {**settings, "model": bundle.name, "weights": weights_id(family), "dtype": bundle.dtype, "scenes": numbers,
            "rows": [row for arm in arms for row in rows_of(arm, by_arm[arm], by_arm.get(WINDOW))]}  # fmt: skip


def require_seconds(seconds: int) -> None:
    """Raises ValueError for a film that is no whole number of stretches."""
    if seconds < STRETCH or seconds % STRETCH:
        raise ValueError(f"films of {seconds} seconds were asked for: use a whole number of tens")


def plan_of(share: float) -> Planned | None:
    """What computes this part of the tokens; of all of them None, no plan. Raises ValueError for what is no part."""
    if not 0 < share <= 1:
        raise ValueError(f"a share of {share} of the tokens was asked for: use more than 0 and at most 1")
    return Planned(share=share) if share < 1 else None


def named_arms(asked: str) -> list[str]:
    """All where none is named. Raises ValueError for one that there is not."""
    names = [name.strip() for name in asked.split(";") if name.strip()] or list(ARMS)
    if unknown := set(names) - set(ARMS):
        raise ValueError(f"no arm is called {', '.join(sorted(unknown))}: there are {'; '.join(ARMS)}")
    return list(dict.fromkeys(names))


def lasting_scenes(count: int) -> list[int]:
    """The first held-out scenes in which nothing leaves for good."""
    found: list[int] = []
    number = 0
    while len(found) < count:
        if all(sprite.verb != "leaves" for sprite in scene_of(number).sprites):
            found.append(number)
        number += 1
    return found


def scene_of(number: int) -> Scene:
    """Those on which the model card's figures are taken."""
    return make_scene(held_out(number))


def stretches(bundle: Bundle) -> int:
    """Chunks of a stretch; a film has a whole number of them."""
    frames = bundle.layout.chunk_frames * bundle.family.frames.each
    return round(STRETCH * bundle.layout.fps / frames)


def present(film: Tensor, colours: Sequence[str]) -> float:
    """Which part of these colours a film [T, 3, H, W] in 0..1 shows."""
    masks = colour_masks(film)
    return sum(int((masks[colour].sum((1, 2)) >= ENOUGH).sum()) >= FRAMES_SEEN for colour in colours) / len(colours)


def job_of(bundle: Bundle, number: int, seconds: int, steps: int | None = None, ar_step: int | None = None) -> Job:
    """A scene's film. `ar_step` None: one chunk after the other."""
    frames = bundle.family.frames.pixel(stretches(bundle) * seconds // STRETCH * bundle.layout.chunk_frames)
    steps = steps or bundle.family.usual.steps
    return Job.usual(bundle.family, scene_of(number).caption, frames=frames, seed=number, steps=steps, ar_step=ar_step or steps)


@torch.inference_mode()
def long_film(bundle: Bundle, which: tuple[int, str], seconds: int, budget: float, steps: int | None = None, ar_step: int | None = None,
              share: float = 1.0) -> Values:  # fmt: skip
    """A scene's film in one arm. `pictures`: what is looked at of every stretch, by byte."""
    number, arm = which
    each, frames = stretches(bundle), bundle.layout.chunk_frames
    scene, chunks = scene_of(number), stretches(bundle) * seconds // STRETCH
    job, pixels = job_of(bundle, number, seconds, steps, ar_step), bundle.family.frames
    latents, report = ARMS[arm].made(bundle, job, budget, share)
    first = decode(bundle, latents[:, :, :frames])
    own, others = ([sprite.colour for sprite in one.sprites] for one in (scene, scene_of(number + 1)))
    out: list[Values] = []
    pictures = []
    for end in range(each * frames, chunks * frames + 1, each * frames):
        film = decode(bundle, latents[:, :, end - LOOKED * frames : end])
        true = render(scene, pixels.pixel(end) - len(film), len(film))
        out.append({"colour": present(film, own), "chance": present(film, others), "ceiling": present(true, own),
                    "moved": float((film.mean(0) - first.mean(0)).abs().mean()) * 255, "contrast": float(film.std() / first.std()),
                    "saturation": float(saturation(film) / saturation(first)), "motion": motion(film), "true_motion": motion(true)})  # fmt: skip
        pictures.append((film * 255).round().byte())
    found = returns(latents, job.schedule(bundle), SINK)
    return {"stretches": out, "pictures": pictures, "returned": found.chunks[0], "nearest": found.nearest[0], "seconds": report.wall_s,
            "peak": report.kv_peak_bytes}  # fmt: skip


def saturation(film: Tensor) -> Tensor:
    """Of a film [T, 3, H, W]: the mean distance of the channels of a pixel."""
    return (film.amax(1) - film.amin(1)).mean()


def motion(film: Tensor) -> float:
    """Of a film [T, 3, H, W] in 0..1: the mean change from frame to frame, in grey levels of 255."""
    return float((film[1:] - film[:-1]).abs().mean()) * 255


def rows_of(arm: str, films: Sequence[Values], window: Sequence[Values] | None) -> list[Values]:
    """A row for each stretch: means over the films, with their standard errors. `window`: films of the plain one, None where it is not an arm."""
    out = []
    for k in range(len(films[0]["stretches"])):
        values = {key: mean_and_error([film["stretches"][k][key] for film in films]) for key in MEASURES}
        close, other = (likeness(films, window, k), likeness(films, [*window[1:], window[0]], k)) if window else (None, None)
        out.append({"arm": arm, "until": (k + 1) * STRETCH, **values, "psnr_to_window": None if arm == WINDOW else close, "psnr_to_other": other,
                    "returned": sum(len(film["returned"]) > 0 for film in films), "nearest": round(min(film["nearest"] for film in films), 2),
                    "kv_peak_bytes": max(film["peak"] for film in films)})  # fmt: skip
    return out


def likeness(films: Sequence[Values], others: Sequence[Values], stretch: int) -> tuple[float, float | None]:
    """PSNR of a stretch, film by film: mean and standard error."""
    return mean_and_error([psnr(a["pictures"][stretch] / 255, b["pictures"][stretch] / 255) for a, b in zip(films, others, strict=True)])
