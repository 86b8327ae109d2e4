"""`bench causal`: a few-step causal model far beyond its trained horizon, and without its clean passes, on the bundled one.

Long films of held-out scenes whose camera stands still, by what history keeps: the plain window, or a budget. Of every ten seconds the last
chunks are looked at: which prompted colours are there, how far the mean picture has moved from that of the first chunk, how much contrast
there is for that of the first chunk, and PSNR to the plain window's film. In one arm positions go on growing, where those beyond the
trained window otherwise count as at its edge. Of every film it is also found whether it returns to its first frames (`run/sink.py`).

Films of the usual length with every clean pass and with none: PSNR between the two, and the figures of the model card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..device import fast_dtype
from ..kv.compressor import Compressor
from ..kv.policy import KVPolicy
from ..kv.scores.even import Even
from ..kv.scores.random import Random
from ..kv.scores.salience import Salience
from ..kv.scores.streaming import StreamingLLM
from ..models.bundle import Bundle, load_bundle, weights_id
from ..models.causal_wan_family import SELF_FORCING
from ..run.generate import Job, decode, generate
from ..run.sink import returns
from ..show.metrics import mean_and_error, psnr
from ..training.evaluate import held_out
from ..training.measures import ENOUGH, Tally, colour_masks, score
from ..training.scenes import Scene, make_scene
from .sweep import over

NAME = "causal"
STRETCH = 10
"""Seconds."""
LOOKED = 2
"""Chunks at the end of a stretch."""
SINK = 3
"""Latent frames of the film's beginning that every budget keeps: the first chunk, as in LongLive (arXiv 2509.22622)."""
FRAMES_SEEN = 5
"""Frames in which a colour has to be, as in the figures of the model card."""
WINDOW = "window"


@dataclass(frozen=True)
class Arm:
    """What history keeps: all that the window holds (None), or a budget. `grows`: positions are what they are, however far back."""

    policy: KVPolicy | None = None
    grows: bool = False

    def made(self, bundle: Bundle, job: Job, budget: float) -> tuple[Tensor, Any]:
        """-> latents, report. `budget`: in chunks."""
        if self.grows:
            chunks = job.schedule(bundle).chunks
            bundle = replace(bundle, layout=replace(bundle.layout, window=chunks))
        return generate(bundle, job, compressor=Compressor(self.policy, budget, sink=SINK) if self.policy else None)


ARMS = {
    WINDOW: Arm(),
    StreamingLLM.name: Arm(StreamingLLM()),
    "sink-recent, positions grow": Arm(StreamingLLM(), grows=True),
    **{policy.name: Arm(policy) for policy in (Random(), Even(), Salience())},
}
Values = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=6, help="long films of an arm (default %(default)s)")
    parser.add_argument("--seconds", type=int, default=60, help="length of the long films, in whole tens (default %(default)s)")
    parser.add_argument("--budget", type=float, default=3.0, help="history of the arms that have a budget, in chunks (default %(default)s)")
    parser.add_argument("--arms", default="", help=f"which arms, separated by semicolons, of {'; '.join(ARMS)} (default: all)")
    parser.add_argument("--films", type=int, default=16, help="films with and without clean passes (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="films made side by side, each on its share of the cores (default %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows": by arm and stretch, "clean_pass": figures with and without}. Raises ValueError, before any film is made, for what cannot work."""
    if args.seconds < STRETCH or args.seconds % STRETCH:
        raise ValueError(f"films of {args.seconds} seconds were asked for: use a whole number of tens")
    if args.prompts < 2 or args.films < 2 or args.workers < 1:
        raise ValueError(f"{args.prompts} prompts, {args.films} films and {args.workers} workers were asked for: use at least 2, 2 and 1")
    names = [name.strip() for name in args.arms.split(";") if name.strip()] or list(ARMS)
    if unknown := set(names) - set(ARMS):
        raise ValueError(f"no arm is called {', '.join(sorted(unknown))}: there are {'; '.join(ARMS)}")
    bundle, arms = load_bundle(fast_dtype(), family=SELF_FORCING), [WINDOW, *(name for name in names if name != WINDOW)]
    numbers = still_scenes(args.prompts)
    work, todo = partial(long_film, seconds=args.seconds, budget=args.budget), [(number, arm) for arm in arms for number in numbers]
    films = over(todo, work, args.workers, bundle)
    by_arm = {arm: films[k * len(numbers) : (k + 1) * len(numbers)] for k, arm in enumerate(arms)}
    passes = over(range(args.films), clean_passes, args.workers, bundle)
    settings = {key: getattr(args, key) for key in ("prompts", "seconds", "budget", "films", "workers")}
    return {**settings, "model": bundle.name, "weights": weights_id(SELF_FORCING), "dtype": bundle.dtype, "scenes": numbers,
            "rows": [row for arm in arms for row in rows_of(arm, by_arm[arm], by_arm[WINDOW])], "clean_pass": without_passes(passes)}  # fmt: skip


def scene_of(number: int) -> Scene:
    """Those on which the model card's figures are taken."""
    return make_scene(held_out(number))


def still_scenes(count: int) -> list[int]:
    """The first held-out scenes in which the camera does not pan."""
    found: list[int] = []
    number = 0
    while len(found) < count:
        if not scene_of(number).pan_word:
            found.append(number)
        number += 1
    return found


def stretches(bundle: Bundle) -> int:
    """Chunks of a stretch; a film has a whole number of them."""
    frames = bundle.layout.chunk_frames * bundle.family.frames.each
    return round(STRETCH * bundle.layout.fps / frames)


def present(film: Tensor, colours: Sequence[str]) -> float:
    """Which part of these colours a film [T, 3, H, W] in 0..1 shows."""
    masks = colour_masks(film)
    return sum(int((masks[colour].sum((1, 2)) >= ENOUGH).sum()) >= FRAMES_SEEN for colour in colours) / len(colours)


@torch.inference_mode()
def long_film(bundle: Bundle, which: tuple[int, str], seconds: int, budget: float) -> Values:
    """A scene's film in one arm. `pictures`: what is looked at of every stretch, by byte."""
    number, arm = which
    each, frames = stretches(bundle), bundle.layout.chunk_frames
    scene, chunks = scene_of(number), stretches(bundle) * seconds // STRETCH
    job = Job.usual(bundle.family, scene.caption, frames=bundle.family.frames.pixel(chunks * frames), seed=number)
    latents, report = ARMS[arm].made(bundle, job, budget)
    first = decode(bundle, latents[:, :, :frames])
    own, others = ([sprite.colour for sprite in one.sprites] for one in (scene, scene_of(number + 1)))
    out: list[Values] = []
    pictures = []
    for end in range(each * frames, chunks * frames + 1, each * frames):
        film = decode(bundle, latents[:, :, end - LOOKED * frames : end])
        out.append({"colour": present(film, own), "chance": present(film, others), "moved": float((film.mean(0) - first.mean(0)).abs().mean()) * 255,
                    "contrast": float(film.std() / first.std())})  # fmt: skip
        pictures.append((film * 255).round().byte())
    found = returns(latents, job.schedule(bundle), SINK)
    return {"stretches": out, "pictures": pictures, "returned": found.chunks[0], "nearest": found.nearest[0], "seconds": report.wall_s,
            "peak": report.kv_peak_bytes}  # fmt: skip


def rows_of(arm: str, films: Sequence[Values], window: Sequence[Values]) -> list[Values]:
    """A row for each stretch: means over the films, with their standard errors."""
    out = []
    for k in range(len(films[0]["stretches"])):
        values = {key: mean_and_error([film["stretches"][k][key] for film in films]) for key in ("colour", "chance", "moved", "contrast")}
        close, other = likeness(films, window, k), likeness(films, [*window[1:], window[0]], k)
        out.append({"arm": arm, "until": (k + 1) * STRETCH, **values, "psnr_to_window": None if arm == WINDOW else close, "psnr_to_other": other,
                    "returned": sum(len(film["returned"]) > 0 for film in films), "nearest": round(min(film["nearest"] for film in films), 2),
                    "kv_peak_bytes": max(film["peak"] for film in films)})  # fmt: skip
    return out


def likeness(films: Sequence[Values], others: Sequence[Values], stretch: int) -> tuple[float, float | None]:
    """PSNR of a stretch, film by film: mean and standard error."""
    return mean_and_error([psnr(a["pictures"][stretch] / 255, b["pictures"][stretch] / 255) for a, b in zip(films, others, strict=True)])


@torch.inference_mode()
def clean_passes(bundle: Bundle, number: int) -> Values:
    """A held-out scene's film of the usual length, with every clean pass and with none."""
    scene, out = scene_of(number), dict[str, Values]()
    job = Job.usual(bundle.family, scene.caption, seed=number)
    for name, clean_pass in (("every", True), ("none", False)):
        made = replace(bundle, family=replace(bundle.family, clean_pass=clean_pass))
        latents, report = generate(made, job)
        film, tally = decode(bundle, latents), Tally()
        score(film, scene, bundle.layout.chunk_frames * bundle.family.frames.each, tally)
        out[name] = {"film": (film * 255).round().byte(), "tally": tally, "seconds": report.wall_s}
    return out


def without_passes(films: Sequence[Values]) -> Values:
    """The figures of the model card with all passes and with none; PSNR between the two, and to the film of another prompt."""
    figures: Values = {}
    for name in ("every", "none"):
        parts = [asdict(film[name]["tally"]) for film in films]
        whole = Tally(**{key: sum(part[key] for part in parts) for key in parts[0]})
        figures[name] = {**whole.figures(), "seconds": round(sum(film[name]["seconds"] for film in films), 1)}
    made = [(film["every"]["film"] / 255, film["none"]["film"] / 255) for film in films]
    others = [psnr(without, made[(k + 1) % len(made)][0]) for k, (_, without) in enumerate(made)]
    return {**figures, "psnr": mean_and_error([psnr(without, whole) for whole, without in made]), "psnr_of_other_prompts": mean_and_error(others)}
