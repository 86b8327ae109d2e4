"""`bench magi`: the frontier of MAGI-1, on its bundled model, and what each change that FlowCache made to the model costs.

As in `bench frontier` all arms of a share compute the same tokens, here with the branches of guidance that run at each step, and every film is
compared with the stock one (ranges of history, clean pass, Euler) and the converged one. Steps are divisible by four. Arms at shares:

`steps` and `steps-euler` take fewer steps with UniPC and Euler; the better of the two is the rival. `steps-multistep` takes them with this project's
solver. `default` is Chunkwise Cache with a plan under Euler, as published, and `default-unipc` the same under UniPC; `motion` refines the plan by
token. `published-increment` is the rule published for MAGI-1 (FlowCache, ICLR 2026, section 3) with its threshold found for the share.

Arms that have no share, on longer films: `no-ranges` lets every chunk see all of history, `no-clean-pass` leaves out the pass of finished chunks;
`flowcache-magi-slow` and `-fast` are FlowCache without both, its thresholds of 64 steps rescaled to other numbers, and `motion-published` is
MotionCache (arXiv 2605.01725) likewise. `kv-5` and `kv-6` see all of history through KV Compressor, in five and six chunks with the four that are
denoised; `default-kv-6` is the plan at the second share with six. The mix in the last quarter belongs to distilled models, of which none is bundled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ..kv.compressor import Compressor
from ..kv.scores.importance import ImportanceRedundancy
from ..models.bundle import Bundle
from ..models.magi_family import MAGI, STAGES, magi
from ..policies.chunkwise import Chunkwise
from ..policies.motion import PRESETS as MOTION_RULES
from ..policies.planned import Planned
from ..policies.presets import preset
from ..policies.protocol import CachePolicy
from ..sampling.solvers import Multistep
from . import frontier
from .frontier import Film, Made, Setting, add_films, affordable, fewer, make, measured, prompts_of, shares_of, steps_for
from .increment import incremental

NAME = "magi"
SHARES = (0.56, 0.40, 0.30, 0.20)
FRAMES, LONG = 48, 96
"""Pixel frames of the films at shares, and of the others, in which history is longer than the window."""
CONTROLS, LONG_FILMS = 2, 1
"""Films that all arms at shares make, and films of the arms without a share."""
RULED_FOR = 64
"""Steps for which thresholds were published."""
CONVERGED = 2
"""How many times the steps the converged film has; with a second-order solver."""


def stock(frames: int, steps: int, cfg: float) -> Setting:
    return Setting(frames, steps, cfg, MAGI.noise.shift, MAGI.published.stagger(steps), solver=MAGI.published.solver)


def changed(bundle: Bundle, **changes: Any) -> Bundle:
    """The same network, run as FlowCache changed it (`magi_family.magi`)."""
    family = magi(distilled=False, **changes)
    return replace(bundle, family=family, layout=replace(bundle.layout, window=family.layout.window))


def as_there(bundle: Bundle, film: Film, share: float, arm: str) -> Made:
    return frontier.run_arm(bundle, film, arm, share)


def fewer_with_ours(bundle: Bundle, film: Film, share: float) -> Made:
    job = film.job
    return make(bundle, fewer(job, steps_for(bundle, job, film.setting, share)), film.setting, integrator=Multistep())


def planned_unipc(bundle: Bundle, film: Film, share: float) -> Made:
    job, setting = replace(film.job, solver="unipc"), film.setting
    return make(bundle, job, setting, affordable(bundle, job, setting, steps_for(bundle, job, setting, share), Planned))


AT_SHARES: dict[str, Callable[[Bundle, Film, float], Made]] = {
    **{arm: partial(as_there, arm=arm) for arm in ("steps", "steps-euler", "default", "motion", "published-increment")},
    "steps-multistep": fewer_with_ours,
    "default-unipc": planned_unipc,
}
"""Arms at a share."""
MAIN = ("steps", "steps-euler", "steps-multistep", "default", "default-unipc")
"""Of these all films are made."""


def as_published(bundle: Bundle, film: Film, name: str) -> Made:
    """FlowCache with the increments of the latents replayed; its thresholds fit changes over steps of `RULED_FOR`."""
    rule = preset(name)
    assert isinstance(rule, Chunkwise)
    rescaled = replace(rule, threshold=rule.threshold * RULED_FOR / film.setting.steps, replay="residual")
    return make(changed(bundle, ranges=(), clean_pass=False), film.job, film.setting, rescaled, adapter=incremental)


def motion_published(bundle: Bundle, film: Film) -> Made:
    """MotionCache with the increments of the latents replayed, its thresholds rescaled as FlowCache's are."""
    rule = MOTION_RULES["magi-1"]
    threshold = rule.threshold * RULED_FOR / film.setting.steps
    rescaled = replace(rule, threshold=threshold, base=replace(rule.chunkwise, threshold=threshold, replay="residual"))
    return make(changed(bundle, ranges=(), clean_pass=False), film.job, film.setting, rescaled, adapter=incremental)


def compressed(bundle: Bundle, film: Film, chunks: int, policy: CachePolicy | None = None) -> Made:
    """`chunks`: what the KV cache holds, the four that are denoised among them."""
    compressor = Compressor(ImportanceRedundancy(queries="chunk"), chunks - STAGES, sink=0)
    return make(changed(bundle, ranges=()), film.job, film.setting, policy, compressor=compressor)


ALONE: dict[str, Callable[[Bundle, Film], Made]] = {
    "no-ranges": lambda bundle, film: make(changed(bundle, ranges=()), film.job, film.setting),
    "no-clean-pass": lambda bundle, film: make(changed(bundle, clean_pass=False), film.job, film.setting),
    "flowcache-magi-slow": partial(as_published, name="flowcache-magi-slow"),
    "flowcache-magi-fast": partial(as_published, name="flowcache-magi-fast"),
    "motion-published": motion_published,
    "kv-5": partial(compressed, chunks=5),
    "kv-6": partial(compressed, chunks=6),
    "default-kv-6": partial(compressed, chunks=6, policy=Planned(share=SHARES[1])),
}
"""Arms that compute what they compute."""


def run_arm(bundle: Bundle, film: Film, arm: str, share: float) -> Made:
    return ALONE[arm](bundle, film) if arm in ALONE else AT_SHARES[arm](bundle, film, share)


def converged(bundle: Bundle, film: Film) -> Tensor:
    """Latents of many steps; Euler's method would need far more of them to come as near to its limit."""
    return make(bundle, fewer(film.job, CONVERGED * film.setting.steps), film.setting, integrator=Multistep())[0]


def films(args: argparse.Namespace) -> list[Film]:
    """Raises ValueError for arguments that cannot work."""
    prompts, shares = prompts_of(args), shares_of(args.shares)
    wanted = tuple(a for a in args.arms.split(",") if a)
    if unknown := set(wanted) - {*AT_SHARES, *ALONE}:
        raise ValueError(f"no arm is called {', '.join(sorted(unknown))}: there are {', '.join((*AT_SHARES, *ALONE))}")
    some, others = (tuple(a for a in arms if not wanted or a in wanted) for arms in (AT_SHARES, ALONE))
    usual = stock(args.frames, args.steps, args.cfg)
    main = some if wanted else MAIN
    out = [Film(usual, prompt, seed, some if k < CONTROLS else main, shares) for k, (seed, prompt) in enumerate(prompts) if some]
    return out + [Film(stock(args.long, args.steps, args.cfg), prompt, seed, others, (1.0,)) for seed, prompt in prompts[:LONG_FILMS] if others]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_films(parser, SHARES)
    parser.add_argument("--arms", default="", help=f"which arms, separated by commas, of {', '.join((*AT_SHARES, *ALONE))} (default: all)")
    parser.add_argument("--frames", type=int, default=FRAMES, help="pixel frames of the films at shares (default %(default)s)")
    parser.add_argument("--long", type=int, default=LONG, help=f"pixel frames of films of the other arms, at most {LONG_FILMS} (default %(default)s)")
    parser.add_argument("--steps", type=int, default=MAGI.usual.steps, help="divisible by four (default %(default)s)")
    parser.add_argument("--cfg", type=float, default=MAGI.usual.cfg)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows"}, as `frontier.run`. Raises ValueError, before any film is made, for what cannot work."""
    return measured(args, films(args), MAGI, measure)


def measure(bundle: Bundle, film: Film) -> list[dict[str, Any]]:
    return frontier.measure(bundle, film, run_arm, converged)
