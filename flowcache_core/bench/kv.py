"""`bench kv`: what a smaller history costs, by policy, fraction and bits, against the run that keeps all of it.

Two measurements. Films, one chunk after the other, so that all earlier chunks are history: of the last chunks PSNR and SSIM
to the film with the whole history, drift from the first chunk to the last, the error of every layer's attention output on the
same clean latents, seconds, and the peak of the KV cache. Films of few steps amplify any difference, so what one setting gains on
another is given with its standard error over the prompts; most of what fewer bits seem to cost is
rounding of 16-bit computation, which --precision float32 leaves out. And true clips in which history matters: a sprite goes behind a wide bar and
comes out again chunks later, the prompt is empty, and the error is that of the velocity where it comes out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor

from ..device import fast_dtype
from ..kv.compressor import Budget, Compressor
from ..kv.named import policy_named
from ..kv.policy import STORED, Granularity, KVPolicy, Stored, fitted
from ..kv.scores import KV_POLICIES
from ..kv.scores.even import Even
from ..kv.scores.random import Random
from ..models.adapter import Call, ModelAdapter
from ..models.bundle import BUNDLED, Bundle, load_bundle, weights_id
from ..models.bundle import NAME as MODEL
from ..models.causal_wan_family import TINY, FewSteps
from ..models.family import Family
from ..network import Attend
from ..run.generate import Job, decode, generate
from ..run.session import Session
from ..sampling.schedule import ChunkSchedule
from ..show.metrics import mean_and_error, psnr, ssim
from ..training.scenes import HIDDEN_CHUNK, hidden_scene, motion_mask, render
from .around import Around
from .prompts import PROMPTS, seed_of
from .sweep import over

MODELS = (MODEL, TINY.name)
NAME = "kv"
FRACTIONS = (0.5, 0.25, 0.125)
QUARTER = 0.25
DEFAULT, CHANCE = Even.name, Random.name
BRANCH = ("cond",)
SINK = 1
"""Latent frames at the start that every policy is made to keep, and the latest chunk in films; the rest is its own choice."""
COMPARED = 2
"""The last chunks of a film: those before them have looked back on less."""
LEVELS = (0.95, 0.8, 0.6)
"""Noise levels at which the true clips are looked at; a model that was distilled to a few has its own."""


@dataclass(frozen=True)
class Point:
    """One row. `fraction` of the film's chunks is the budget; 1 keeps all. `name`: of the policy, with the settings that were asked for."""

    name: str
    policy: KVPolicy
    fraction: float
    dtype: Stored = "as computed"
    soft: float = 0.0
    granularity: Granularity = "token"

    def compressor(self, chunks: int) -> Compressor:
        return Compressor(self.policy, self.fraction * chunks, sink=SINK, dtype=self.dtype, soft=self.soft, granularity=self.granularity)


def points(asked: str = "", granularity: Granularity = "token", more: bool = True) -> list[Point]:
    """Every policy at every fraction; of the default also a quarter softly and in fewer bits, and the whole history in these.

    `asked`: these policies alone, separated by commas, each with settings as in `kv/named.py`; `more`: the further rows of the default.
    Raises ValueError for unknown ones.
    """
    names = [part.strip() for part in asked.split(",") if part.strip()] or [kind.name for kind in KV_POLICIES]
    out = []
    for name in names:
        policy = policy_named(*name.split(maxsplit=1))
        out += [Point(name, policy, fraction, granularity=granularity) for fraction in FRACTIONS]
        if name == DEFAULT and more:
            out.append(Point(f"{name}, soft 0.1", policy, QUARTER, soft=0.1, granularity=granularity))
            out += [Point(name, policy, fraction, dtype, granularity=granularity) for fraction in (QUARTER, 1.0) for dtype in STORED[1:]]
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(policy.name for policy in KV_POLICIES)
    parser.add_argument("--model", choices=MODELS, default=MODEL, help="which of the bundled models (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help=f"how many of the {len(PROMPTS)} fixed prompts (default %(default)s)")
    parser.add_argument("--chunks", type=int, default=12, help="length of the films in chunks (default %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="per chunk, few as in the models that are made for long films (default %(default)s)")
    parser.add_argument("--clips", type=int, default=32, help="true clips with a hidden sprite (default %(default)s)")
    parser.add_argument("--policies", default="", help=f"which policies, separated by commas, of {names}; each may have settings behind it, "
                        "as in 'h2o,importance-redundancy lam=0.5 queries=chunk' (default: all)")  # fmt: skip
    parser.add_argument("--precision", choices=("fast", "float32"), default="fast",
                        help="of the computation: the machine's fast dtype, or float32 (default %(default)s)")  # fmt: skip
    parser.add_argument("--as-computed", action="store_true", help=f"leave out the further rows of {DEFAULT}: softly, and in fewer bits")
    parser.add_argument("--granularity", choices=get_args(Granularity), default="token", help="what is kept as a whole (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="films made side by side, each on its share of the cores (default %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows"}: means over the prompts, and over the clips for `reappearing_error`. Raises ValueError for what cannot work.

    `share`: as `fraction`; `wall_ratio`: seconds with the whole history over seconds; `gain`: PSNR above that of chance at the
    same fraction, as computed; `cost`: PSNR below that of the same history as computed; both with their standard error over the prompts.
    """
    if not 1 <= args.prompts <= len(PROMPTS):
        raise ValueError(f"{args.prompts} prompts were asked for: there are 1 to {len(PROMPTS)}")
    if args.chunks < 12 or args.clips < 1:
        raise ValueError(f"{args.chunks} chunks and {args.clips} clips were asked for: use at least 12 chunks and 1 clip")
    wanted = [Point("whole history", WHOLE, 1.0), *points(args.policies, args.granularity, not args.as_computed)]
    family = BUNDLED[args.model]
    bundle = load_bundle(torch.float32 if args.precision == "float32" else fast_dtype(), family=family)
    jobs = jobs_of(bundle, args.prompts, args.chunks, args.steps)
    films = over(jobs, partial(measure, wanted=wanted), args.workers, bundle)
    clips = over(range(args.clips), partial(reappearing, wanted=wanted), args.workers, bundle)
    quality = {(point.name, point.fraction, point.dtype): [film[k]["psnr"] for film in films] for k, point in enumerate(wanted)}
    rows = [
        _row(point, [film[k] for film in films], [film[0] for film in films], [clip[k] for clip in clips], quality) for k, point in enumerate(wanted)
    ]
    settings = {key: getattr(args, key) for key in ("model", "prompts", "chunks", "steps", "clips", "precision", "granularity", "workers")}
    return {**settings, "weights": weights_id(family), "dtype": bundle.dtype, "rows": rows}


def jobs_of(bundle: Bundle, prompts: int, chunks: int, steps: int) -> list[Job]:
    """Films of the first fixed prompts, one chunk after the other. Raises ValueError for steps that the model was not distilled to."""
    frames = bundle.family.frames.pixel(chunks * bundle.layout.chunk_frames)
    jobs = [Job.usual(bundle.family, PROMPTS[i], frames=frames, steps=steps, seed=seed_of(i), ar_step=steps) for i in range(prompts)]
    bundle.family.check_levels(jobs[0].sigmas(bundle))
    return jobs


def levels_of(family: Family) -> tuple[float, ...]:
    """Noise levels below 1 at which a network of the family is looked at."""
    return family.noise.trained[1:] if isinstance(family.noise, FewSteps) else LEVELS


WHOLE = Random()
"""Scores that nothing depends on, where all is kept."""
Values = dict[str, Any]


@torch.inference_mode()
def measure(bundle: Bundle, job: Job, wanted: Sequence[Point]) -> list[Values]:
    """One prompt through all points, of which the first keeps the whole history."""
    chunks, out = job.schedule(bundle).chunks, list[Values]()
    for point in wanted:
        latents, report = generate(bundle, job, compressor=point.compressor(chunks))
        frames = bundle.layout.chunk_frames
        film = decode(bundle, latents[:, :, -COMPARED * frames :])
        if not out:
            whole, reference, begin = latents, film, decode(bundle, latents[:, :, :frames])
            exact = attention_outputs(bundle, job, whole, point)
        attended = attention_outputs(bundle, job, whole, point) if out else exact
        errors = [relative(a, b) for a, b in zip(attended, exact, strict=True)]
        drift = float((film[-bundle.family.frames.each * frames :].mean(0) - begin.mean(0)).abs().mean()) * 255
        same = film is reference
        out.append({"psnr": None if same else psnr(film, reference), "ssim": None if same else ssim(film, reference), "drift": drift,
                    "seconds": report.wall_s, "peak": report.kv_peak_bytes, "errors": errors})  # fmt: skip
    return out


def attention_outputs(bundle: Bundle, job: Job, latents: Tensor, point: Point) -> list[Tensor]:
    """Clean latents [1, C, F, h, w] pass chunk by chunk -> per layer the attention output of the last chunk."""
    schedule, last = job.schedule(bundle), dict[int, Tensor]()
    adapter = cast(ModelAdapter, Watched(bundle.adapter(), lambda layer, out: last.__setitem__(layer, out)))
    budget = point.compressor(schedule.chunks).budget_for(adapter, schedule, (latents.shape[3], latents.shape[4]), job.fps, 1, 2)
    with remembering(bundle, adapter, latents, job.prompt, schedule, job.sigmas(bundle), budget, schedule.chunks):
        return [last[layer] for layer in range(len(last))]


def remembering(bundle: Bundle, adapter: ModelAdapter, latents: Tensor, prompt: str, schedule: ChunkSchedule, sigmas: Sequence[float],
                budget: Budget, chunks: int) -> Session:  # fmt: skip
    """A session whose first `chunks` chunks are history, taken from clean latents. The caller closes it."""
    session = Session(adapter, schedule, sigmas, (latents.shape[3], latents.shape[4]), budget=budget)
    x, text = latents.to(bundle.like), bundle.text(prompt)
    for index in range(chunks):
        chunk = schedule.at(index, schedule.steps)
        session.denoise(x[:, :, chunk.start : chunk.start + chunk.frames], chunk, text, BRANCH)
        session.commit(chunk)
    return session


class Watched(Around):
    """Passes on what attention returned, layer by layer."""

    def __init__(self, inner: ModelAdapter, seen: Callable[[int, Tensor], None]) -> None:
        super().__init__(inner)
        self.record = seen

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        def watched(layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
            out = attend(layer, q, k, v, x)
            self.record(layer, out)
            return out

        return self.inner.forward(call, watched)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@torch.inference_mode()
def reappearing(bundle: Bundle, seed: int, wanted: Sequence[Point]) -> list[float]:
    """One true clip -> per point the mean square error of the velocity on the cells where the hidden sprite comes out.

    `fraction` is of the chunks before that one. Where a policy is not made to keep the latest frames it may give them up.
    """
    film = render(hidden_scene(seed))
    clean = bundle.vae.encode((film.transpose(0, 1)[None] * 2 - 1).to(bundle.vae.conv2.weight)).float()
    looked_at = levels_of(bundle.family)
    schedule, levels = ChunkSchedule(clean.shape[2], bundle.layout.chunk_frames, len(looked_at), window=bundle.layout.window), (*looked_at, 0.0)
    adapter, target = bundle.adapter(), schedule.at(HIDDEN_CHUNK, 0)
    mine, frame_tokens = slice(target.start, target.start + target.frames), adapter.tokens_per_frame(clean.shape[3], clean.shape[4])
    truth, where = clean[:, :, mine], motion_mask(film)[mine]
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed))
    out = []
    for point in wanted:
        slots = int(point.fraction * target.start * frame_tokens)
        budget = Budget(slots, SINK * frame_tokens, 0, point.granularity, fitted(point.policy, adapter), point.dtype, soft=point.soft)
        with remembering(bundle, adapter, clean, "", schedule, levels, budget, HIDDEN_CHUNK) as session:
            errors = []
            for step, sigma in enumerate(looked_at):
                part = ((1 - sigma) * truth + sigma * noise).to(bundle.like)
                velocity = session.denoise(part, replace(target, step=step), bundle.text(""), BRANCH)
                errors.append(float((velocity.float() - (noise - truth)).square()[:, :, where].mean()))
        out.append(sum(errors) / len(errors))
    return out


Quality = dict[tuple[str, float, Stored], list[float]]
"""PSNR of every prompt by policy, fraction and dtype."""


def _row(point: Point, films: Sequence[Values], whole: Sequence[Values], clips: Sequence[float], quality: Quality) -> dict[str, Any]:
    def mean(key: str, digits: int) -> float | None:
        values = [film[key] for film in films]
        return None if None in values else round(sum(values) / len(values), digits)

    def error(key: str) -> float | None:
        values = [film[key] for film in films]
        return None if None in values else mean_and_error(values)[1]

    def against(name: str, sign: int) -> tuple[float | None, float | None]:
        other = quality.get((name, point.fraction, "as computed"))
        return mean_and_error(sign * np.subtract([film["psnr"] for film in films], other)) if other else (None, None)

    layers, fewer = np.mean([film["errors"] for film in films], 0), point.dtype != "as computed"
    gain, gain_error = (None, None) if fewer else against(CHANCE, 1)
    cost, cost_error = against(point.name, -1) if fewer else (None, None)
    return {
        "policy": point.name, "fraction": point.fraction, "dtype": point.dtype, "share": point.fraction,
        "psnr": mean("psnr", 2), "psnr_error": error("psnr"), "ssim": mean("ssim", 4),
        "gain": gain, "gain_error": gain_error, "cost": cost, "cost_error": cost_error,
        "drift": mean("drift", 2), "attention_error": round(float(layers.mean()), 4), "reappearing_error": round(sum(clips) / len(clips), 4),
        "seconds": mean("seconds", 3), "wall_ratio": round(sum(film["seconds"] for film in whole) / sum(film["seconds"] for film in films), 3),
        "kv_peak_bytes": max(film["peak"] for film in films), "attention_error_by_layer": [round(float(e), 4) for e in layers],
    }  # fmt: skip
