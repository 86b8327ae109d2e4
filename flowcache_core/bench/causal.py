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
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from ..device import fast_dtype
from ..models.bundle import Bundle, load_bundle, weights_id
from ..models.causal_wan_family import SELF_FORCING
from ..run.generate import Job, decode, generate
from ..show.metrics import mean_and_error, psnr
from ..training.measures import Tally, score
from .long import ARMS, WINDOW, Values, long_film, named_arms, require_seconds, rows_of, scene_of
from .sweep import over

NAME = "causal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=6, help="long films of an arm (default %(default)s)")
    parser.add_argument("--seconds", type=int, default=60, help="length of the long films, in whole tens (default %(default)s)")
    parser.add_argument("--budget", type=float, default=3.0, help="history of the arms that have a budget, in chunks (default %(default)s)")
    parser.add_argument("--arms", default="", help=f"which arms, separated by semicolons, of {'; '.join(ARMS)} (default: all)")
    parser.add_argument("--films", type=int, default=16, help="films with and without clean passes (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="films made side by side, each on its share of the cores (default %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows": by arm and stretch, "clean_pass": figures with and without}. Raises ValueError, before any film is made, for what cannot work."""
    require_seconds(args.seconds)
    if args.prompts < 2 or args.films < 2 or args.workers < 1:
        raise ValueError(f"{args.prompts} prompts, {args.films} films and {args.workers} workers were asked for: use at least 2, 2 and 1")
    bundle, arms = load_bundle(fast_dtype(), family=SELF_FORCING), list(dict.fromkeys([WINDOW, *named_arms(args.arms)]))
    numbers = still_scenes(args.prompts)
    work, todo = partial(long_film, seconds=args.seconds, budget=args.budget), [(number, arm) for arm in arms for number in numbers]
    films = over(todo, work, args.workers, bundle)
    by_arm = {arm: films[k * len(numbers) : (k + 1) * len(numbers)] for k, arm in enumerate(arms)}
    passes = over(range(args.films), clean_passes, args.workers, bundle)
    settings = {key: getattr(args, key) for key in ("prompts", "seconds", "budget", "films", "workers")}
    return {**settings, "model": bundle.name, "weights": weights_id(SELF_FORCING), "dtype": bundle.dtype, "scenes": numbers,
            "rows": [row for arm in arms for row in rows_of(arm, by_arm[arm], by_arm[WINDOW])], "clean_pass": without_passes(passes)}  # fmt: skip


def still_scenes(count: int) -> list[int]:
    """The first held-out scenes in which the camera does not pan."""
    found: list[int] = []
    number = 0
    while len(found) < count:
        if not scene_of(number).pan_word:
            found.append(number)
        number += 1
    return found


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
