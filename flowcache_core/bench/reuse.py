"""`bench reuse`: how good a film stays when chunks reuse their predictions, over a sweep of settings.

Every film is compared with the uncached run of the same prompt and seed in the same process, and timed against it there.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ..decision import CachePolicy
from ..demo.bundle import load_bundle
from ..device import fast_dtype
from ..generate import Job, decode, generate
from ..policies.chunkwise import Chunkwise
from .metrics import psnr, ssim
from .prompts import PROMPTS, seed_of

NAME = "reuse"
THRESHOLDS = (0.02, 0.03, 0.05, 0.1)
TIME_THRESHOLDS = (0.02, 0.04, 0.08, 0.16)


@dataclass(frozen=True)
class Rule:
    """One point of the sweep."""

    rule: str
    setting: float
    policy: CachePolicy


def rules() -> list[Rule]:
    """The default rule along its threshold, then one change of it at a time."""
    out = [Rule("default", t, Chunkwise(threshold=t)) for t in THRESHOLDS]
    out += [Rule("extrapolated", t, Chunkwise(threshold=t, order=1)) for t in THRESHOLDS]
    out += [Rule("residual", t, Chunkwise(threshold=t, replay="residual")) for t in THRESHOLDS]
    return out + [Rule("time", t, Chunkwise(threshold=t, signature="time")) for t in TIME_THRESHOLDS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=16, help=f"how many of the {len(PROMPTS)} fixed prompts (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rules", default="", help="only these rules, by name, separated by commas")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows": [...]}: means over the prompts; `wall_ratio` is uncached seconds over cached seconds."""
    if not 1 <= args.prompts <= len(PROMPTS):
        raise ValueError(f"{args.prompts} prompts were asked for: there are 1 to {len(PROMPTS)}")
    wanted = [r for r in rules() if not args.rules or r.rule in args.rules.split(",")]
    if not wanted:
        raise ValueError(f"no rule is called {args.rules}: there are {', '.join(dict.fromkeys(r.rule for r in rules()))}")
    bundle = load_bundle(fast_dtype())
    generate(bundle, Job("", 9, 2))
    sums: list[dict[str, float]] = [{"share": 0.0, "chunk_share": 0.0, "psnr": 0.0, "ssim": 0.0, "plain": 0.0, "cached": 0.0} for _ in wanted]
    with tqdm(total=args.prompts * (len(wanted) + 1), unit="film") as bar:
        for index in range(args.prompts):
            job = Job(PROMPTS[index], steps=args.steps, seed=seed_of(index))
            latents, plain = generate(bundle, job)
            reference = decode(bundle, latents)
            bar.update()
            for point, total in zip(wanted, sums, strict=True):
                latents, report = generate(bundle, job, point.policy)
                film = decode(bundle, latents)
                total["share"] += report.share
                total["chunk_share"] += report.chunk_steps_computed / report.chunk_steps
                total["psnr"] += psnr(film, reference)
                total["ssim"] += ssim(film, reference)
                total["plain"] += plain.wall_s
                total["cached"] += report.wall_s
                bar.update()
    n = args.prompts
    rows = [
        {"rule": p.rule, "setting": p.setting, "share": round(t["share"] / n, 4), "chunk_share": round(t["chunk_share"] / n, 4),
         "psnr": round(t["psnr"] / n, 2), "ssim": round(t["ssim"] / n, 4), "wall_ratio": round(t["plain"] / t["cached"], 3)}
        for p, t in zip(wanted, sums, strict=True)
    ]  # fmt: skip
    return {"steps": args.steps, "prompts": n, "rows": rows}
