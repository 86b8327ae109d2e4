"""MAGI-1 as families: the base models and the distilled ones, which have the same shapes, as published or as FlowCache ran them.

Schedule, ranges of history, guidance: MAGI-1 report (arXiv 2505.13211), sections 2.3 and 2.4, and the released settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt

from torch import Tensor

from ..sampling.frames import FOUR_N
from ..sampling.noise import steps_in_all
from ..sampling.profile import Profile
from ..sampling.schedule import ChunkSchedule
from ..sampling.solvers import Euler, Solver
from .family import Bundled, ChunkLayout, Family, Latents, Loaders, Preview, Published, Usual, any_levels
from .magi import LATENT_CHANNELS, PATCH, Magi
from .magi_adapter import ALONE, NULL, RANGES, SHORTCUT, TEXT, MagiAdapter
from .magi_checkpoint import LAYERS, claims, magi_config, original_names, release_of
from .magi_text import WORDS
from .magi_vae import LATENT_SCALE, MagiVAE
from .word_text import encode_prompt

CHUNK_FRAMES = 6
STAGES = 4
"""Chunks that are denoised together at most: as many as there are stages of a chunk's steps."""
EVERY = 10_000
"""Chunks; more than any film has."""
COMMIT = 1e-4
LAST_STAGE = 0.7
"""Noise level at which the last stage begins."""
TINY = 1e-6
"""Noise levels that are closer than this are one."""
NEAR = 5e-3
"""Those of a scheduler with a table are as close as this to what is meant."""
PROFILE = Profile(knots=((0.0, 1.0), (50.0, 1.0)), whole_from=2.0, changes=((STAGES - 1) / STAGES,))
"""Even steps: long ones do harm where guidance is strong, and that is not near the end. In the last stage guidance is another."""

TINY_PREVIEW = Preview(
    (
        (0.0481, 0.0466, -0.007),
        (-0.0042, 0.0601, 0.0314),
        (0.0621, -0.0016, 0.0262),
        (0.0097, 0.0116, 0.0661),
        (0.0482, 0.046, -0.0068),
        (-0.0036, 0.0594, 0.0317),
        (0.0624, -0.0014, 0.0261),
        (0.0101, 0.0121, 0.0656),
        (0.0491, 0.0465, -0.0076),
        (-0.0037, 0.0593, 0.0313),
        (0.0615, -0.0012, 0.0271),
        (0.0093, 0.012, 0.0659),
        (0.049, 0.0465, -0.0074),
        (-0.0038, 0.0596, 0.0312),
        (0.0615, -0.0015, 0.0273),
        (0.0098, 0.0113, 0.0661),
    ),
    (-0.0293, -0.0338, -0.0529),
)
"""As `python -m flowcache_core.training --model tiny-magi preview` finds it."""


@dataclass(frozen=True, slots=True)
class MagiNoise:
    """Times u^2 for u even in 0..1, shifted: few, long steps where little noise is left. 12 steps are a part of the grid of 16."""

    shift: float = 3.0
    commit: float = COMMIT

    def levels(self, steps: int, shift: float, denoise: float = 1.0) -> tuple[float, ...]:
        """`denoise` < 1 keeps the last `steps` of int(steps / denoise) steps."""
        whole = steps_in_all(steps, denoise, "64, 32, 16 and 8 are the published settings")
        return tuple(self.level(place, shift) for place in places(whole)[-steps - 1 :])

    def level(self, place: float, shift: float) -> float:
        """At a place 0..1 of a run whose steps are equally long."""
        x = 1 - place**2
        return shift * x / (1 + (shift - 1) * x)

    def timestep(self, sigma: float) -> float:
        return 1 - sigma


def places(steps: int) -> list[float]:
    """Where on 0..1 a chunk's steps lie: evenly, or for 12 steps as published: every third of the length of two."""
    if steps != SHORTCUT:
        return [i / steps for i in range(steps + 1)]
    return [i / 16 for i in range(17) if i % 4 != 1]


@dataclass(frozen=True, slots=True)
class ThreeBranches:
    """(1 - p) alone + (p - w) null + w text. Until the last stage p = 1.5 and w is `scale` (published: 7.5); in it p = 1 and w = 0.

    In the last stage `alone` has no weight and is not run; `text` has none either, but later chunks look back on its keys and values.
    """

    inside: bool = True
    previous: float = 1.5

    def branches(self, scale: float) -> tuple[str, ...]:
        return TEXT, NULL, ALONE

    def needed(self, scale: float, sigma: float) -> tuple[str, ...]:
        return (TEXT, NULL) if is_last_stage(sigma) else self.branches(scale)

    def remembered(self, scale: float) -> tuple[str, ...]:
        return TEXT, NULL

    def combine(self, velocities: Sequence[Tensor], scale: float, sigma: float) -> Tensor:
        text, null, *alone = velocities
        if is_last_stage(sigma):
            return null
        p, w = self.previous, scale
        return (1 - p) * alone[0] + (p - w) * null + w * text


@dataclass(frozen=True, slots=True)
class NearClean:
    """Of a distilled model. In the last stage history counts less: 0.7 of the chunk with its history and 0.3 of the chunk alone.

    `history`: that share; 1 leaves the mix out.
    """

    inside: bool = True
    history: float = 0.7

    def branches(self, scale: float) -> tuple[str, ...]:
        return (TEXT,) if self.history == 1 else (TEXT, ALONE)

    def needed(self, scale: float, sigma: float) -> tuple[str, ...]:
        return self.branches(scale) if is_last_stage(sigma) else (TEXT,)

    def remembered(self, scale: float) -> tuple[str, ...]:
        return (TEXT,)

    def combine(self, velocities: Sequence[Tensor], scale: float, sigma: float) -> Tensor:
        text, *alone = velocities
        return self.history * text + (1 - self.history) * alone[0] if alone and is_last_stage(sigma) else text


def is_last_stage(sigma: float) -> bool:
    return sigma <= LAST_STAGE + TINY


def require_stages(schedule: ChunkSchedule) -> None:
    """Raises ValueError for steps that do not make four stages, a stagger that does not divide them, given last frames."""
    steps, n = schedule.steps, STAGES
    if schedule.suffix:
        raise ValueError("MAGI-1 takes given frames at the start of a film, and was not trained with given last frames: leave them out")
    if steps % n:
        below = max(steps // n, 1) * n
        raise ValueError(f"MAGI-1 goes through its steps in {n} stages of equal length, and {steps} steps do not divide: use {below} or {below + n}")
    together = [steps // k for k in range(1, n + 1) if steps % k == 0]
    if schedule.chunks - schedule.given > 1 and min(schedule.ar_step, steps) not in together:
        *others, least = sorted(together, reverse=True)
        raise ValueError(
            f"MAGI-1 denoises at most {n} chunks together, each as many steps behind the one before; with ar_step {schedule.ar_step} and "
            f"{steps} steps they do not divide: use ar_step {least} (published), or {', '.join(map(str, sorted(others)))}"
        )


def require_step_lengths(levels: Sequence[float]) -> None:
    """Raises ValueError for noise levels other than those of the step length that is an input of a distilled network."""
    steps, first, noise = len(levels) - 1, levels[0], MagiNoise()
    shift = noise.shift
    begun = sqrt(max(1 - first / (shift - (shift - 1) * first), 0.0))
    even = [begun + (1 - begun) * i / steps for i in range(steps + 1)]
    expected = places(steps) if begun < NEAR else even
    if any(abs(noise.level(place, shift) - level) > NEAR for place, level in zip(expected, levels, strict=True)):
        grid = f"{steps} steps of its shortcut, of which every third is long" if steps == SHORTCUT else f"{steps} steps at shift {shift:g}"
        raise ValueError(
            f"MAGI-1 distilled is told how long its steps are, and these noise levels are not those of {grid}: take them from AR Video Scheduler, or "
            "for another number of steps than 12 from the scheduler simple, without a node that changes the shift"
        )


def step_by_step(solver: Solver) -> Solver:
    """Euler's method is far from its limit at the published steps: where a plan leaves steps out they are taken all the same, so that the film
    stays the one of these steps."""
    return Euler(sums=True) if isinstance(solver, Euler) else solver


def magi(distilled: bool, ranges: Sequence[int] = RANGES, clean_pass: bool = True, near_clean: bool = True) -> Family:
    """As published by default. FlowCache (ICLR 2026) ran the distilled model with `ranges` (), `clean_pass` and `near_clean` False.

    `ranges`: chunks that a chunk sees in equal parts of its steps, () all there are; `clean_pass`: whether a finished chunk is passed
    through the network once more; `near_clean`: whether history counts less in the last stage of a distilled model.
    """
    return Family(
        name="magi-1-distill" if distilled else "magi-1",
        title="MAGI-1 distilled" if distilled else "MAGI-1",
        network=Magi,
        adapter=partial(MagiAdapter, distilled=distilled, ranges=ranges),
        original_names=original_names,
        claims=claims,
        config_of=magi_config,
        release=release_of,
        layout=ChunkLayout(CHUNK_FRAMES, window=max(ranges, default=EVERY), causal=True, aligned=True, profile=PROFILE),
        frames=FOUR_N,
        latents=Latents(LATENT_CHANNELS, 8, PATCH, None, scale=LATENT_SCALE),
        noise=MagiNoise(),
        guidance=NearClean(history=0.7 if near_clean else 1.0) if distilled else ThreeBranches(),
        rates=(24,),
        takes_rate=lambda config: False,
        loaders=Loaders("Load CLIP (t5xxl, type pixart)", "Load MAGI-1 VAE"),
        bundled=None if distilled else Bundled("tiny-magi", "tiny-magi-vae", MagiVAE.from_state_dict, encode_prompt, TINY_PREVIEW),
        blocks=LAYERS,
        check=require_stages,
        whole_chunks=True,
        check_levels=require_step_lengths if distilled else any_levels,
        clean_pass=clean_pass,
        published=Published("euler", lambda steps: steps // STAGES, given_noise=0, scale=None if distilled else 7.5),
        words=WORDS,
        solving=step_by_step,
        usual=Usual(frames=96, steps=32, cfg=2.0),
    )


MAGI, MAGI_DISTILLED = magi(distilled=False), magi(distilled=True)
