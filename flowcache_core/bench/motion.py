"""`bench motion`: reuse by token against reuse by chunk, over a sweep of thresholds and at equal shares of computed tokens.

Every film is compared with the uncached run of the same prompt and seed in the same process, and timed against it there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tqdm import tqdm

from ..decision import CachePolicy
from ..demo.bundle import load_bundle
from ..device import fast_dtype
from ..generate import Job, decode, generate
from ..policies.chunkwise import Chunkwise
from ..policies.motion import Motion
from .metrics import psnr, ssim
from .prompts import PROMPTS, seed_of

NAME = "motion"
SHARES = (0.40, 0.30)
"""Shares of computed tokens at which the rules are compared."""
USUAL = "chunkwise,motion"


@dataclass(frozen=True)
class Rule:
    """One point of the sweep."""

    rule: str
    setting: float
    policy: CachePolicy


def rules() -> list[Rule]:
    """The two rules that are compared, then changes of either, one at a time; `setting` is the threshold."""
    out = [Rule("chunkwise", t, Chunkwise(threshold=t)) for t in (0.07, 0.13, 0.25)]
    out += [Rule("motion", t, Motion(threshold=t)) for t in (0.05, 0.1, 0.2)]
    out += [Rule("chunkwise-extrapolated", t, Chunkwise(threshold=t, order=1)) for t in (0.07, 0.13, 0.25)]
    for name, changes in VARIANTS.items():
        out += [Rule(name, t, Motion(threshold=t, **changes)) for t in (0.05, 0.1, 0.2)]
    return out


VARIANTS: dict[str, dict[str, Any]] = {
    "motion-noisy": {"measure": "noisy"},
    "motion-output": {"measure": "output"},
    "motion-change": {"measure": "change"},
    "motion-alpha-0.1": {"alpha": 0.1},
    "motion-alpha-0.6": {"alpha": 0.6},
    "motion-early": {"coarse": 0.2},
    "motion-chunk-scale": {"scale": "chunk"},
    "motion-quantile": {"quantile": 0.9},
    "motion-widen": {"vote": "widen"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=16, help=f"how many of the {len(PROMPTS)} fixed prompts (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=128, help="side of the picture in pixels (default %(default)s)")
    names = ", ".join(dict.fromkeys(r.rule for r in rules()))
    parser.add_argument("--rules", default=USUAL, help=f"which rules, separated by commas, of {names} (default %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows", "summary"}: means over the prompts; `wall_ratio` is uncached seconds over cached seconds.

    `ideal` is the part of the saving that arrives: `wall_ratio` times `share`, 1 where time follows the computed tokens.
    """
    if not 1 <= args.prompts <= len(PROMPTS):
        raise ValueError(f"{args.prompts} prompts were asked for: there are 1 to {len(PROMPTS)}")
    wanted = [r for r in rules() if r.rule in args.rules.split(",")]
    unknown = set(args.rules.split(",")) - {r.rule for r in wanted}
    if unknown:
        raise ValueError(f"no rule is called {', '.join(sorted(unknown))}: there are {', '.join(dict.fromkeys(r.rule for r in rules()))}")
    bundle = load_bundle(fast_dtype())
    jobs = [Job(PROMPTS[index], steps=args.steps, seed=seed_of(index), size=args.size) for index in range(args.prompts)]
    jobs[0].schedule(bundle)
    generate(bundle, Job("", 9, 2))
    sums = [dict.fromkeys(("share", "psnr", "ssim", "plain", "cached"), 0.0) for _ in wanted]
    with tqdm(total=args.prompts * (len(wanted) + 1), unit="film") as bar:
        for job in jobs:
            latents, plain = generate(bundle, job)
            reference = decode(bundle, latents)
            bar.update()
            for point, total in zip(wanted, sums, strict=True):
                latents, report = generate(bundle, job, point.policy)
                film = decode(bundle, latents)
                total["share"] += report.share
                total["psnr"] += psnr(film, reference)
                total["ssim"] += ssim(film, reference)
                total["plain"] += plain.wall_s
                total["cached"] += report.wall_s
                bar.update()
    n = args.prompts
    rows: list[dict[str, Any]] = [
        {"rule": p.rule, "setting": p.setting, "share": round(t["share"] / n, 4), "psnr": round(t["psnr"] / n, 2),
         "ssim": round(t["ssim"] / n, 4), "wall_ratio": round(t["plain"] / t["cached"], 3),
         "ideal": round(t["plain"] / t["cached"] * t["share"] / n, 3)}
        for p, t in zip(wanted, sums, strict=True)
    ]  # fmt: skip
    return {"steps": args.steps, "prompts": n, "size": args.size, "rows": rows, "summary": summary(rows)}


def summary(rows: Sequence[dict[str, Any]], shares: Sequence[float] = SHARES) -> list[dict[str, Any]]:
    """Per share and rule: PSNR, SSIM and wall ratio between the two settings next to it; None outside the sweep, never guessed."""
    out = []
    for share in shares:
        for rule in dict.fromkeys(row["rule"] for row in rows):
            line = sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["share"])
            out.append({"share": share, "rule": rule, **{key: _at(share, line, key) for key in ("psnr", "ssim", "wall_ratio")}})
    return out


def _at(share: float, line: Sequence[dict[str, Any]], key: str) -> float | None:
    for low, high in pairwise(line):
        if low["share"] <= share <= high["share"] and low["share"] < high["share"]:
            part = (share - low["share"]) / (high["share"] - low["share"])
            return round(low[key] + part * (high[key] - low[key]), 4)
    return None
