"""What the benches of reuse share: films over prompts and settings, each against the uncached run of its own prompt, and a table.

Every film is compared with the uncached run of the same prompt, seed and solver in the same process, and timed against it there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from ..device import fast_dtype
from ..models.bundle import BUNDLED, Bundle, load_bundle
from ..policies.protocol import CachePolicy, Forecasts
from ..run.generate import Job, MakeAdapter, decode, generate, warm_up
from ..show.metrics import psnr, ssim
from .increment import incremental
from .prompts import PROMPTS, seed_of

MEASURES = ("share", "chunk_share", "psnr", "ssim", "plain", "cached")
J = TypeVar("J")
T = TypeVar("T")
Measured = list[dict[str, float]]
"""Of one prompt: what MEASURES names, for every point of the sweep."""


@dataclass(frozen=True)
class Rule:
    """One point of a sweep. `setting`: what is turned, a threshold or a wanted share."""

    rule: str
    setting: float
    policy: CachePolicy
    solver: str = "unipc"
    increment: bool = False

    @property
    def adapter(self) -> MakeAdapter:
        return incremental if self.increment else lambda adapter, sigmas: adapter


def add_arguments(parser: argparse.ArgumentParser, rules: Sequence[Rule], usual: str, frames: int) -> None:
    names = ", ".join(dict.fromkeys(r.rule for r in rules))
    parser.add_argument("--prompts", type=int, default=16, help=f"how many of the {len(PROMPTS)} fixed prompts (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--frames", type=int, default=frames, help="pixel frames, a whole number of chunks (default %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of the picture in pixels (default %(default)s)")
    parser.add_argument("--rules", default=usual, help=f"which rules, separated by commas, of {names} (default: {usual or 'all'})")
    parser.add_argument("--workers", type=int, default=1, help="films made side by side, each on its share of the cores (default %(default)s)")


def run(args: argparse.Namespace, rules: Sequence[Rule], shares: Sequence[float]) -> dict[str, Any]:
    """-> {"rows", "summary"}: means over the prompts. Raises ValueError, before any film is made, for what cannot work.

    `wall_ratio` is uncached seconds over cached seconds; `ideal`, wall_ratio x share, is 1 where time follows the computed
    tokens.
    """
    if not 1 <= args.prompts <= len(PROMPTS):
        raise ValueError(f"{args.prompts} prompts were asked for: there are 1 to {len(PROMPTS)}")
    if args.workers < 1:
        raise ValueError(f"{args.workers} workers were asked for: use 1 or more")
    wanted = [r for r in rules if not args.rules or r.rule in args.rules.split(",")]
    if unknown := set(filter(None, args.rules.split(","))) - {r.rule for r in rules}:
        raise ValueError(f"no rule is called {', '.join(sorted(unknown))}: there are {', '.join(dict.fromkeys(r.rule for r in rules))}")
    jobs = [Job(PROMPTS[i], frames=args.frames, steps=args.steps, seed=seed_of(i), size=args.size) for i in range(args.prompts)]
    bundle = load_bundle(fast_dtype())
    jobs[0].schedule(bundle)
    for rule in wanted:
        if isinstance(rule.policy, Forecasts):
            rule.policy.check_run(args.steps)
    measured = over(jobs, partial(_measure, wanted=wanted), args.workers, bundle)
    rows = [_row(point, [film[k] for film in measured]) for k, point in enumerate(wanted)]
    settings = {key: getattr(args, key) for key in ("prompts", "steps", "frames", "size", "workers")}
    return {**settings, "dtype": bundle.dtype, "rows": rows, "summary": summary(rows, shares)}


def summary(rows: Sequence[dict[str, Any]], shares: Sequence[float]) -> list[dict[str, Any]]:
    """Per share and rule the values on the line between the two nearest settings; None outside the sweep, never guessed."""
    out = []
    for share in shares:
        for rule in dict.fromkeys(row["rule"] for row in rows):
            points = sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["share"])
            at = {m: between([(p["share"], p[m]) for p in points], share) for m in ("psnr", "ssim", "wall_ratio")}
            out.append({"share": share, "rule": rule, **{m: v if v is None else round(v, 4 if m == "ssim" else 2) for m, v in at.items()}})
    return out


def between(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """y at `x` on the broken line through points (x, y) in rising x; None where the line does not reach."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 if x0 == x1 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def over(jobs: Sequence[J], work: Callable[[Bundle, J], T], workers: int, bundle: Bundle,
         done: Callable[[J, T], None] = lambda job, result: None) -> list[T]:  # fmt: skip
    """`work` for every job, in this process with `bundle` or in several, each with the bundled model and its share of the cores.

    `done` is called with every result as soon as it is there.
    """
    with tqdm(total=len(jobs), unit="prompt") as bar:
        if workers == 1:
            warm_up(bundle)
            out = []
            for job in jobs:
                out.append(work(bundle, job))
                done(job, out[-1])
                bar.update()
            return out
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (workers, bundle.network.dtype, bundle.name)) as pool:
            todo = {pool.submit(_work_there, work, job): job for job in jobs}
            for one in as_completed(todo):
                if one.exception() is None:
                    done(todo[one], one.result())
                bar.update()
            return [one.result() for one in todo]


_bundle: Bundle | None = None
"""Of a worker process."""


def _start_worker(workers: int, dtype: torch.dtype, name: str) -> None:
    global _bundle
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    _bundle = load_bundle(dtype, family=BUNDLED[name])
    warm_up(_bundle)


def _work_there(work: Callable[[Bundle, J], T], job: J) -> T:
    assert _bundle is not None
    return work(_bundle, job)


def _measure(bundle: Bundle, job: Job, wanted: Sequence[Rule]) -> Measured:
    """One prompt through all points; the uncached film of each solver is made once."""
    plain = {}
    for name in dict.fromkeys(point.solver for point in wanted):
        latents, report = generate(bundle, replace(job, solver=name))
        plain[name] = decode(bundle, latents), report
    out = []
    for point in wanted:
        latents, report = generate(bundle, replace(job, solver=point.solver), point.policy, adapter=point.adapter)
        film, (reference, uncached) = decode(bundle, latents), plain[point.solver]
        values = (report.share, report.chunk_steps_computed / report.chunk_steps, psnr(film, reference), ssim(film, reference),
                  uncached.wall_s, report.wall_s)  # fmt: skip
        out.append(dict(zip(MEASURES, values, strict=True)))
    return out


def _row(point: Rule, films: Sequence[dict[str, float]]) -> dict[str, Any]:
    mean = {m: sum(film[m] for film in films) / len(films) for m in MEASURES}
    ratio = mean["plain"] / mean["cached"]
    return {
        "rule": point.rule, "setting": point.setting, "share": round(mean["share"], 4), "chunk_share": round(mean["chunk_share"], 4),
        "psnr": round(mean["psnr"], 2), "ssim": round(mean["ssim"], 4), "wall_ratio": round(ratio, 3), "ideal": round(ratio * mean["share"], 3),
    }  # fmt: skip
