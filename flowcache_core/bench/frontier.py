"""`bench frontier`: the film that a given compute buys, by every way of spending it, beside simply taking fewer steps.

At every share of the uncached run's network tokens (clean passes and both branches counted) all arms make the same films. Each
is compared with the uncached film and with the converged one, of at least 200 steps, whose chunks stand equally far apart in noise. A gain
is the mean of paired differences to the best arm that takes fewer steps, with its standard error.

`steps` takes fewer steps with UniPC; `ar_step` is an integer, so the distance between chunks is only nearly that of the full run.
`steps-fractional` keeps it exactly, on a finer grid of levels, and `steps-euler` is `steps` with Euler: the best of these three is the rival.
`even` spaces the computed rows of `steps-fractional` and integrates with this project's multistep solver: what is left of `default`
without its choice of rows. `default` is Chunkwise Cache with a plan, at exactly the tokens of `steps`. `motion` refines that plan by
token. `threshold` is the rule of drift with its threshold found for the share, and `published-residual` and `published-increment` are the rules
published for SkyReels-V2 and MAGI-1 (FlowCache, ICLR 2026, section 3), theirs too. On request
any policy that has a share is an arm by its own name.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..device import commit, fast_dtype
from ..files import write_text
from ..models.bundle import Bundle, load_bundle, weights_id
from ..models.family import Family
from ..models.skyreels_family import SKYREELS
from ..policies import POLICIES
from ..policies.multirate import Multirate
from ..policies.named import policy_named
from ..policies.planned import Planned
from ..policies.protocol import CachePolicy, Forecasts, PlanPolicy, SectionPolicy
from ..policies.target import Target
from ..policies.thresholds import least_computed
from ..run.generate import Job, decode, generate, generate_upstream
from ..run.report import RunReport
from ..sampling.plan import Plan, commit_frames
from ..sampling.planner import evenly
from ..sampling.schedule import ChunkSchedule
from ..sampling.solvers import UniPC
from ..settings import settings_of
from ..show.metrics import mean_and_error, perceptual, psnr, ssim
from ..untrusted import lines_of, parsed, short
from .increment import incremental
from .prompts import PROMPTS, seed_of
from .sweep import over

NAME = "frontier"
SHARES = (0.56, 0.40, 0.30, 0.20, 0.12)
CONVERGED = 200
TINY = 1e-6
"""Against a share that misses whole steps by rounding."""
SEED = re.compile("[0-9]{1,15}")
CAUSAL, BIDIRECTIONAL = "block-causal", "bidirectional"
BASELINES = ("steps", "steps-fractional", "steps-euler")
MEASURES = ("psnr", "ssim", "lpips", "psnr_converged", "ssim_converged", "lpips_converged")

Made = tuple[Tensor, RunReport]


class EveryGrid(UniPC):
    """UniPC as it is, on whatever levels it is given: the solver of fewer steps."""

    @property
    def skipping(self) -> EveryGrid:  # type: ignore[override]
        return self


@dataclass(frozen=True)
class Setting:
    """What a film is made with. `ar_step` -1: one chunk after the other."""

    frames: int = 33
    steps: int = 50
    cfg: float = 3.0
    shift: float = 8.0
    ar_step: int = 5
    attention: str = CAUSAL
    solver: str = "unipc"
    size: int = 128

    def job(self, prompt: str, seed: int) -> Job:
        ar_step = self.steps if self.ar_step < 0 else self.ar_step
        return Job(prompt, self.frames, self.steps, seed, size=self.size, cfg=self.cfg, shift=self.shift, ar_step=ar_step, solver=self.solver)


@dataclass(frozen=True)
class Film:
    """One prompt at one setting, through these arms and shares; through `motion` up to one share alone, above which it is no rival."""

    setting: Setting
    prompt: str
    seed: int
    arms: tuple[str, ...]
    shares: tuple[float, ...]
    motion_up_to: float = 1.0

    @property
    def job(self) -> Job:
        return self.setting.job(self.prompt, self.seed)


def make(bundle: Bundle, job: Job, setting: Setting, policy: Any = None, **more: Any) -> Made:
    if setting.attention == BIDIRECTIONAL:
        return generate_upstream(bundle, job, policy=policy, **more)
    return generate(bundle, job, policy, **more)


def schedule_of(bundle: Bundle, job: Job, setting: Setting) -> ChunkSchedule:
    return job.sections(bundle)[0].schedule if setting.attention == BIDIRECTIONAL else job.schedule(bundle)


def tokens(bundle: Bundle, job: Job, setting: Setting, plan: Plan | None = None) -> float:
    """Latent frames that a run of a plan, or of all steps, puts through the network; where guidance is inside, through all of its branches."""
    schedule = schedule_of(bundle, job, setting)
    plan = plan or Plan.full(schedule, setting.attention == BIDIRECTIONAL)
    if not bundle.family.guidance.inside:
        return plan.frames_computed(schedule)
    ran = np.zeros((schedule.chunks, schedule.steps))
    for k, steps in enumerate(plan.computed):
        ran[k, list(steps)] = 1
        ran[k, list(plan.partial[k] if plan.is_partial(k) else ())] = plan.part
    return in_branches(bundle, job, ran, plan, bundle.family.clean_pass)


def in_branches(bundle: Bundle, job: Job, ran: np.ndarray, plan: Plan | None, clean_pass: bool) -> float:
    """Latent frames, of every step and clean pass as often as there are branches of it, over the number of all branches.

    `ran`: the part of its tokens that every chunk runs at every step, [chunks, steps]. Chunks of which some tokens wait run all branches.
    """
    schedule, guidance = job.schedule(bundle), bundle.family.guidance
    every = len(guidance.branches(job.cfg))
    needed = np.array([len(guidance.needed(job.cfg, level)) for level in job.sigmas(bundle)[:-1]])
    total: float = commit_frames(schedule) * len(guidance.remembered(job.cfg)) * clean_pass
    for k in range(schedule.chunks):
        branches = np.full_like(needed, every) if plan and plan.is_partial(k) else needed
        total += float(ran[k] @ branches) * schedule.span(k)[1]
    return total / every


def share_of(bundle: Bundle, job: Job, report: RunReport, uncached: RunReport) -> float:
    """Of all tokens of the uncached run of `job`, the part that a run has computed, in whatever number of steps."""
    if not bundle.family.guidance.inside:
        return report.tokens_computed / uncached.tokens
    mine, full = (
        in_branches(bundle, fewer(job, r.map.shape[1]), r.shares, r.plans[0] if r.plans else None, r.commits > 0) for r in (report, uncached)
    )
    return mine / full


def fewer(job: Job, steps: int) -> Job:
    """The same film in fewer steps, its chunks as nearly as far apart as integers allow."""
    return replace(job, steps=steps, ar_step=round(job.ar_step * steps / job.steps))


def finer(job: Job, steps: int) -> Job:
    """The coarsest schedule with `steps` evenly spaced levels among its own on which the distance of chunks is an integer."""
    return next(replace(job, steps=n, ar_step=n * job.ar_step // job.steps) for n in range(steps, steps * job.steps + 1, steps)
                if n * job.ar_step % job.steps == 0)  # fmt: skip


def steps_for(bundle: Bundle, job: Job, setting: Setting, share: float) -> int:
    """The fewest steps that compute at least the share: rounded in favour of fewer steps."""
    wanted = share * tokens(bundle, job, setting) - TINY

    def enough(n: int) -> bool:
        return fits(bundle, fewer(job, n), setting) and tokens(bundle, fewer(job, n), setting) >= wanted

    return next(n for n in range(1, job.steps + 1) if n == job.steps or enough(n))


def fits(bundle: Bundle, job: Job, setting: Setting) -> bool:
    """Whether the model was trained for such a schedule."""
    try:
        bundle.family.check(schedule_of(bundle, job, setting))
    except ValueError:
        return False
    return True


def affordable(bundle: Bundle, job: Job, setting: Setting, steps: int, rule: Callable[[float], PlanPolicy]) -> PlanPolicy:
    """The policy, made of a share, that computes as much as possible and no more than the same film in fewer steps."""
    most = tokens(bundle, fewer(job, steps), setting)
    same = most / tokens(bundle, job, setting)
    if not bundle.family.guidance.inside:
        return rule(same)
    schedule = schedule_of(bundle, job, setting)
    tried = (rule(min(same * (1 + percent / 100), 1.0)) for percent in np.arange(30, -30, -0.5))
    return next(policy for policy in tried if tokens(bundle, job, setting, policy.plan(schedule)) <= most + TINY)


def run_arm(bundle: Bundle, film: Film, arm: str, share: float) -> Made:
    job, setting = film.job, film.setting
    n = steps_for(bundle, job, setting, share)
    if arm in ("steps", "steps-euler"):
        return make(bundle, replace(fewer(job, n), solver="euler" if arm == "steps-euler" else "unipc"), setting)
    if arm in ("steps-fractional", "even"):
        fine = finer(job, n)
        plan = evenly(schedule_of(bundle, fine, setting), n, setting.attention == BIDIRECTIONAL)
        return make(bundle, fine, setting, Planned(exact=plan), integrator=EveryGrid() if arm == "steps-fractional" else None)
    if arm == "default":
        return make(bundle, job, setting, affordable(bundle, job, setting, n, Planned))
    if arm == "motion":
        return make(bundle, job, setting, affordable(bundle, job, setting, n, Multirate))
    if arm in BY_NAME:
        return make(bundle, job, setting, by_name(bundle, film, arm, share))
    chunk_share = min(n / job.steps, 1.0)
    if arm == "threshold":
        rule = Target(share=chunk_share)
        within = least_computed(rule, job.steps) <= round(chunk_share * job.steps)
        return generate(bundle, job, rule if within else Target(share=chunk_share, **_reachable(chunk_share, job.steps)))
    published = {"replay": "residual", "order": 0, **_reachable(chunk_share, job.steps)}
    if arm == "published-residual":
        return generate(bundle, job, Target(share=chunk_share, **published))
    increment = Target(share=chunk_share, signature="latent", **published)
    return generate(bundle, replace(job, solver="euler"), increment, adapter=incremental)


def by_name(bundle: Bundle, film: Film, arm: str, share: float) -> CachePolicy:
    """The policy of that name with the share: of all tokens where it plans, of chunk-steps where it decides while the run goes on."""
    n = steps_for(bundle, film.job, film.setting, share)
    same = tokens(bundle, fewer(film.job, n), film.setting) / tokens(bundle, film.job, film.setting)
    return policy_named(arm, f"share={same if isinstance(policy_named(arm), PlanPolicy) else n / film.job.steps}")


def _check_named(bundle: Bundle, film: Film) -> None:
    """Raises ValueError for a share that a policy by name cannot reach."""
    for arm, share in product(set(film.arms) & set(BY_NAME), film.shares):
        policy = by_name(bundle, film, arm, share)
        if isinstance(policy, Forecasts):
            policy.check_run(film.setting.steps)


def _reachable(share: float, steps: int) -> dict[str, Any]:
    """Any number of reused steps in a row, and five steps of warm-up, as published; fewer where the share leaves no room for them."""
    return {"warmup_steps": max(1, min(5, round(share * steps) - 1)), "max_reuse": 1000}


CAUSAL_ARMS = (*BASELINES, "even", "default", "motion", "threshold", "published-residual", "published-increment")
MAIN_ARMS = ("steps", "steps-fractional", "default", "motion")
"""Of these all films are made in the reduced grid."""
BIDIRECTIONAL_ARMS = (*BASELINES, "even", "default")
BY_NAME = tuple(kind.name for kind in POLICIES if "share" in settings_of(kind))
"""Arms on request alone."""


def converged(bundle: Bundle, film: Film) -> Tensor:
    """Latents of the film in so many steps that more would not change it."""
    job = film.job
    return make(bundle, fewer(job, job.steps * math.ceil(CONVERGED / job.steps)), film.setting)[0]


RunArm = Callable[[Bundle, Film, str, float], Made]
"""(bundle, film, arm, share) -> latents and report."""
Measure = Callable[[Bundle, Film], list[dict[str, Any]]]


def measure(bundle: Bundle, film: Film, run_arm: RunArm = run_arm, converged: Callable[[Bundle, Film], Tensor] = converged) -> list[dict[str, Any]]:
    """Of one film: an entry per arm and share."""
    job, setting = film.job, film.setting
    latents, uncached = make(bundle, job, setting)
    references = decode(bundle, latents), decode(bundle, converged(bundle, film))
    entry = {"prompt": film.prompt, "seed": film.seed, "setting": setting}
    out = [{**entry, "arm": "uncached", "share": 1.0, "measured": 1.0, "seconds": uncached.wall_s, "full_s": uncached.wall_s,
            **_closeness(references[0], references)}]  # fmt: skip
    made: dict[Any, Any] = {}
    for share in film.shares:
        n = steps_for(bundle, job, setting, share)
        for arm in film.arms:
            if arm == "motion" and share > film.motion_up_to:
                continue
            key = ("steps" if arm == "steps-fractional" and finer(job, n) == fewer(job, n) else arm), n
            if key not in made:
                latents, report = run_arm(bundle, film, arm, share)
                made[key] = share_of(bundle, job, report, uncached), report.wall_s, _closeness(decode(bundle, latents), references)
            measured, seconds, close = made[key]
            out.append({**entry, "arm": arm, "share": share, "measured": measured, "seconds": seconds, "full_s": uncached.wall_s, **close})
    return out


def _closeness(film: Tensor, references: tuple[Tensor, Tensor]) -> dict[str, float | None]:
    values: list[float | None] = []
    for reference in references:
        values += [psnr(film, reference), ssim(film, reference), perceptual(film, reference)]
    return dict(zip(MEASURES, values, strict=True))


def rows(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the prompts of every setting, share and arm, with the gain over the best arm of fewer steps."""
    groups: dict[Any, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for entry in entries:
        film = entry["prompt"], entry["seed"]
        groups.setdefault((entry["setting"], entry["share"], entry["arm"]), {})[film] = entry
    out = []
    for (setting, share, arm), films in groups.items():
        values = {m: _mean([film[m] for film in films.values()]) for m in MEASURES}
        row: dict[str, Any] = {
            **asdict(setting), "arm": arm, "share": share,
            "share_measured": round(_mean([film["measured"] for film in films.values()]) or 0.0, 4),
            **{m: v if v is None else round(v, 4 if m.startswith(("ssim", "lpips")) else 2) for m, v in values.items()},
        }  # fmt: skip
        for reference in ("", "_converged"):
            others = {r: groups[setting, share, r] for r in BASELINES if r != arm and films.keys() <= groups.get((setting, share, r), {}).keys()}
            rival = max(others, default=None, key=lambda r: sum(others[r][key][f"psnr{reference}"] for key in films))
            row[f"gain{reference}"] = row[f"gain{reference}_se"] = None
            if rival is None:
                continue
            differences = [film[f"psnr{reference}"] - others[rival][key][f"psnr{reference}"] for key, film in films.items()]
            mean, error = mean_and_error(differences)
            row[f"gain{reference}"], row[f"gain{reference}_se"] = mean, error or 0.0
            row["wins"] = sum(d > 0 for d in differences)
        seconds = sum(film["seconds"] for film in films.values())
        row["wins"], row["prompts"] = row.get("wins"), len(films)
        row["wall_ratio"] = round(sum(film["full_s"] for film in films.values()) / seconds, 3)
        row["ideal"] = round(row["wall_ratio"] * row["share_measured"], 3)
        row["each"] = [[round(film[m], 2) for m in ("psnr", "psnr_converged")] for film in films.values()]
        out.append(row)
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


CONTROLS, BOTH_WAYS, OTHERS = 2, 4, 1
"""In the reduced grid: films that all arms make, films in bidirectional attention, films at each of the other settings."""
REDUCED = [Setting(57), Setting(steps=30), Setting(steps=100), Setting(cfg=1.0), Setting(cfg=5.0), Setting(shift=3.0),
           Setting(ar_step=0), Setting(ar_step=25), Setting(ar_step=-1)]  # fmt: skip
"""The usual setting with one thing changed at a time."""


def films(args: argparse.Namespace) -> list[Film]:
    """Raises ValueError for arguments that cannot work."""
    prompts, shares = prompts_of(args), shares_of(args.shares)
    usual = Setting(args.frames, args.steps, args.cfg, args.shift, args.ar_step, args.attention)
    wanted = tuple(a for a in args.arms.split(",") if a)
    if unknown := set(wanted) - {*CAUSAL_ARMS, *BY_NAME}:
        raise ValueError(f"no arm is called {', '.join(sorted(unknown))}: there are {', '.join(CAUSAL_ARMS)}, and on request {', '.join(BY_NAME)}")

    def those(arms: Sequence[str], attention: str = CAUSAL) -> tuple[str, ...]:
        more = [name for name in BY_NAME if attention == CAUSAL or isinstance(policy_named(name), SectionPolicy)]
        return tuple(a for a in (*arms, *more) if a in wanted) if wanted else tuple(arms)

    if args.attention == BIDIRECTIONAL:
        return [Film(usual, prompt, seed, those(BIDIRECTIONAL_ARMS, BIDIRECTIONAL), shares) for seed, prompt in prompts]

    if args.grid != "reduced":
        out = [Film(usual, prompt, seed, those(CAUSAL_ARMS), shares) for seed, prompt in prompts]
    else:
        out = [Film(usual, prompt, seed, those(CAUSAL_ARMS), shares) for seed, prompt in prompts[:CONTROLS]]
        out += [Film(usual, prompt, seed, those(MAIN_ARMS), shares, 0.2) for seed, prompt in prompts[CONTROLS:]]
    if args.grid == "usual":
        return out
    both = replace(usual, attention=BIDIRECTIONAL)
    if args.grid == "reduced":
        others, some, few, at = REDUCED, prompts[:OTHERS], those(("steps", "steps-fractional", "default")), tuple(s for s in shares if s == 0.3)
        out += [Film(both, prompt, seed, those(BIDIRECTIONAL_ARMS, BIDIRECTIONAL), shares) for seed, prompt in prompts[:BOTH_WAYS]]
    else:
        others = [Setting(f, n, c, s, a) for f in (33, 57) for n in (30, 50, 100) for c in (1.0, 3.0, 5.0) for s in (3.0, 8.0)
                  for a in (0, 5, 25, -1)]  # fmt: skip
        some, few, at = prompts, those(CAUSAL_ARMS), shares
        out += [Film(both, prompt, seed, those(BIDIRECTIONAL_ARMS, BIDIRECTIONAL), shares) for seed, prompt in prompts]
    return out + [Film(setting, prompt, seed, few, at or shares) for setting in others if setting != usual for seed, prompt in some]


def prompts_of(args: argparse.Namespace) -> list[tuple[int, str]]:
    if args.prompts_file is None:
        if not 1 <= args.prompts <= len(PROMPTS):
            raise ValueError(f"{args.prompts} prompts were asked for: there are 1 to {len(PROMPTS)}")
        return [(seed_of(i) if args.seed is None else args.seed + i, PROMPTS[i]) for i in range(args.prompts)]
    out: list[tuple[int, str]] = []
    try:
        lines = lines_of(args.prompts_file)
    except ValueError as why:
        raise ValueError(f"the prompts file {args.prompts_file} cannot be read: {why}") from None
    for number, line in enumerate(lines, 1):
        seed, tab, prompt = line.partition("\t")
        if not tab or not SEED.fullmatch(seed.strip()):
            raise ValueError(f"line {number} of {args.prompts_file} (empty ones not counted) is not a seed, a tab and a prompt: {short(line, 60)!r}")
        out.append((int(seed) + (args.seed or 0), prompt.strip()))
    if not out:
        raise ValueError(f"the prompts file {args.prompts_file} has no line: write a seed, a tab and a prompt on each")
    return out


def shares_of(text: str) -> tuple[float, ...]:
    """Raises ValueError."""
    return tuple(_share(one) for one in text.split(","))


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a share: use numbers between 0 and 1, separated by commas") from error
    if not 0 < share <= 1:
        raise ValueError(f"a share of {share} was asked for: use numbers above 0 and up to 1")
    return share


class Kept:
    """Finished films, in a file that grows with them: a bench that was stopped goes on where it was, at the same commit."""

    def __init__(self, path: Path | None, precision: str) -> None:
        self.path, self.made_by = path, f"{commit()} {precision}"
        self.films: dict[Film, list[dict[str, Any]]] = {}
        self._lines: list[str] = []
        for line in path.read_bytes().decode(errors="replace").splitlines() if path and path.exists() else ():
            try:
                values = parsed(line)
            except ValueError:  # half a line, of a version that did not write the file whole
                continue
            self._lines.append(line)
            try:
                if values["made_by"] != self.made_by:
                    continue
                parts: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values["film"].items()}
                film = Film(**{**parts, "setting": Setting(**parts["setting"])})
                self.films[film] = [{**entry, "setting": film.setting} for entry in values["entries"]]
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f"{path} is not what this bench writes: a line of it is {short(line, 60)!r}; move the file away") from None

    def add(self, film: Film, entries: list[dict[str, Any]]) -> None:
        self.films[film] = entries
        if self.path is None:
            return
        values = {"made_by": self.made_by, "film": asdict(film), "entries": [{**entry, "setting": None} for entry in entries]}
        self._lines.append(json.dumps(values))
        write_text(self.path, "\n".join(self._lines) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--grid", choices=("usual", "reduced", "full"), default="reduced",
                        help="usual: one setting; reduced: also bidirectional, and other settings, and arms that are no rivals, on a few prompts, in "
                        "about an hour on two cores; full: all settings against each other, for many hours (default %(default)s)")  # fmt: skip
    add_films(parser, SHARES)
    parser.add_argument("--arms", default="", help=f"which arms, separated by commas, of {', '.join(CAUSAL_ARMS)} (default: all)")
    parser.add_argument("--frames", type=int, default=Setting.frames, help="pixel frames of the usual setting (default %(default)s)")
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--cfg", type=float, default=Setting.cfg)
    parser.add_argument("--shift", type=float, default=Setting.shift)
    parser.add_argument("--ar-step", type=int, default=Setting.ar_step, help="-1: one chunk after the other (default %(default)s)")
    parser.add_argument("--attention", choices=(CAUSAL, BIDIRECTIONAL), default=CAUSAL, help="of the usual setting (default %(default)s)")


def add_films(parser: argparse.ArgumentParser, shares: Sequence[float]) -> None:
    """Which films, at which shares, and how they are made."""
    parser.add_argument("--prompts", type=int, default=16, help=f"how many of the {len(PROMPTS)} fixed prompts (default %(default)s)")
    parser.add_argument("--prompts-file", type=Path, help="other films instead: a line each, seed, tab, prompt")
    parser.add_argument("--seed", type=int, help="the first film's seed in place of the fixed ones; with a prompts file, added to its seeds")
    parser.add_argument("--shares", default=",".join(map(str, shares)), help="computed shares of all tokens (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="films made side by side, each on its share of the cores (default %(default)s)")
    parser.add_argument("--precision", choices=("float32", "fast"), default="float32",
                        help="what the network computes in. Rounding to 16 bits moves films of this model as far as the arms do, so closeness "
                        "is measured in float32; fast is what the demo uses (default %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows"}; `each` in a row has every film's PSNR to the uncached and the converged film.

    Raises ValueError, before any film is made, for what cannot work.
    """
    return {"grid": args.grid, **measured(args, films(args), SKYREELS, measure)}


def measured(args: argparse.Namespace, todo: Sequence[Film], family: Family, measure: Measure) -> dict[str, Any]:
    """The rows of these films, each through `measure`, and what they were made with. Raises ValueError, before any film is made."""
    if args.workers < 1:
        raise ValueError(f"{args.workers} workers were asked for: use 1 or more")
    bundle = load_bundle(torch.float32 if args.precision == "float32" else fast_dtype(), family=family)
    for film in dict.fromkeys(replace(film, prompt="", seed=0) for film in todo):
        family.check(schedule_of(bundle, film.job, film.setting))
        _check_named(bundle, film)
    kept = Kept(args.json.with_suffix(".films.jsonl") if args.json else None, args.precision)
    left = [film for film in todo if film not in kept.films]
    over(sorted(left, key=lambda film: -film.setting.frames), measure, args.workers, bundle, kept.add)
    entries = [entry for film in todo for entry in kept.films[film]]
    settings = {name: getattr(args, name) for name in ("workers", "precision")}
    return {**settings, "model": bundle.name, "weights": weights_id(family), "dtype": bundle.dtype, "rows": rows(entries)}
