"""Wan 2.1 distilled to a few steps and to chunk after chunk, as families: Self-Forcing, Causal-Forcing, CausVid, LongLive, Krea Realtime.

They have the shapes of Wan 2.1 itself, and of each other; they differ in frames per chunk and noise levels. Chunks, noise levels, noise that is
laid on again after every step: CausVid (arXiv 2412.07772), section 4; Self-Forcing (arXiv 2506.08009), sections 3 and 4, and the released settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any

from torch import Tensor

from ..sampling.frames import FOUR_N_PLUS_1
from ..sampling.guidance import ClassifierFree
from ..sampling.noise import TRAIN_STEPS, steps_in_all
from ..sampling.profile import DISTILLED
from ..sampling.schedule import ChunkSchedule
from .causal_wan import FPS, HORIZON
from .causal_wan_adapter import CausalWanAdapter, WholeTimesteps, whole_timestep
from .causal_wan_checkpoint import AVERAGED, KREA, LATEST, SMALL, claims, config_of, declares_causal, original_names, release_of
from .family import OUR_RATE, Bundled, ChunkLayout, Family, Latents, Loaders, Published, Usual
from .skyreels import PATCH, SkyReelsV2
from .skyreels_family import TINY_PREVIEW
from .wan_vae import LATENT_CHANNELS, SPATIAL, WanVAE
from .word_text import encode_prompt

SHIFT = 5.0
NEAR = 5e-3
"""Noise levels that are as close as this are one."""


def shifted(time: float, shift: float) -> float:
    """A time 0..1 of a run whose steps are equally long, 1 at its beginning -> the noise level."""
    return shift * time / (1 + (shift - 1) * time)


def unshifted(level: float, shift: float) -> float:
    return level / (shift - (shift - 1) * level)


@dataclass(frozen=True, slots=True)
class FewSteps:
    """The few noise levels that a model was distilled on, `trained`, falling from 1; the last step goes to 0.

    Another number of steps, or another shift, gives levels on the line through these (`require_trained` says which of them the network knows).
    `whole`: the network is given the whole timestep next to a level, as in CausVid's published settings, which list timesteps; the level itself is
    then the nearest of a thousand shifted ones.
    """

    trained: tuple[float, ...]
    shift: float = SHIFT
    commit: float = 0.0
    whole: bool = False

    def levels(self, steps: int, shift: float, denoise: float = 1.0) -> tuple[float, ...]:
        """`denoise` < 1 keeps the last `steps` of int(steps / denoise) steps. Raises ValueError for what cannot be made."""
        if not 0 < shift < inf:
            raise ValueError(f"shift {shift:g} makes no noise levels: use a number above 0, {self.shift:g} is the published setting")
        whole = steps_in_all(steps, denoise, f"{len(self.trained)} is the published setting")
        if whole == len(self.trained) and shift == self.shift:
            return (*self.trained, 0.0)[-steps - 1 :]
        return (*(self.level(place / whole, shift) for place in range(whole - steps, whole)), 0.0)

    def level(self, place: float, shift: float) -> float:
        """At a place 0..1 of a run whose steps are equally long; of a tensor of places, of each."""
        times = [*(unshifted(level, self.shift) for level in self.trained), 0.0]
        gone = place * len(self.trained)
        left = sum((now - to) * _within(step + 1 - gone) for step, (now, to) in enumerate(pairwise(times)))
        return shifted(left, shift)

    def timestep(self, sigma: float) -> float:
        return whole_timestep(sigma) if self.whole else TRAIN_STEPS * sigma

    def require_trained(self, title: str, levels: Sequence[float]) -> None:
        """Raises ValueError for a noise level that the network of this title was not distilled on."""
        strange = next((level for level in levels[:-1] if all(abs(level - known) > NEAR for known in self.trained)), None)
        if strange is None:
            return
        n, known = len(self.trained), ", ".join(f"{level:.4g}" for level in self.trained)
        counts = [str(steps) for steps in range(n, 0, -1) if n % steps == 0]
        raise ValueError(
            f"{title} was distilled on {n} noise levels, {known}, and {strange:.4g} is none of them ({len(levels) - 1} steps were asked for): take "
            f"them from AR Video Scheduler with {' or '.join(counts)} step{'s' * (n > 1)}, without a node that changes the shift"
        )


def _within(part: Any) -> Any:
    """Of a step, how much of it is left: 0..1; of a tensor, of each."""
    return part.clamp(0, 1) if isinstance(part, Tensor) else min(max(part, 0.0), 1.0)


FOUR = FewSteps(tuple(shifted(time, SHIFT) for time in (1.0, 0.75, 0.5, 0.25)))
KREA_FOUR = FewSteps((1.0, 0.937, 0.833, 0.625))
THREE = FewSteps(tuple(shifted(time, 8.0) for time in (1.0, 0.28, 0.12)), shift=8.0, whole=True)
"""Of timesteps 1000, 757, 522."""


def require_sequence(title: str, schedule: ChunkSchedule) -> None:
    """Raises ValueError for chunks that overlap in time, and for given last frames: earlier chunks are seen clean, later ones not at all."""
    if schedule.suffix:
        raise ValueError(f"{title} makes every chunk from those before it, and was not trained with given last frames: leave them out")
    if schedule.chunks - schedule.given > 1 and schedule.ar_step < schedule.steps:
        raise ValueError(
            f"{title} finishes every chunk before the next begins, and with ar_step {schedule.ar_step} and {schedule.steps} steps a chunk would look "
            f"back on noise: set ar_step to -1, which is as published, or to {schedule.steps}"
        )


def causal_wan(name: str, title: str, noise: FewSteps = FOUR, chunk_frames: int = 3, sizes: tuple[int, int, int] = SMALL,
               horizon: int = HORIZON, generator: str = AVERAGED, bundled: Bundled | None = None) -> Family:  # fmt: skip
    """`chunk_frames`: latent frames that are denoised together; `sizes`: width, width of the feed-forward layer, layers as released; `horizon`:
    latent frames that are attended to together at most; `generator`: which of a training state the published settings read."""
    return Family(
        name=name,
        title=title,
        network=SkyReelsV2,
        adapter=WholeTimesteps if noise.whole else CausalWanAdapter,
        original_names=partial(original_names, first=generator),
        claims=partial(claims, sizes=sizes),
        config_of=partial(config_of, title=title),
        release=partial(release_of, title=title, sizes=sizes),
        layout=ChunkLayout(chunk_frames, window=horizon // chunk_frames, fps=FPS, causal=True, profile=DISTILLED),
        frames=FOUR_N_PLUS_1,
        latents=Latents(LATENT_CHANNELS, SPATIAL, PATCH, "Wan21"),
        noise=noise,
        guidance=ClassifierFree(),
        rates=(FPS, OUR_RATE),
        takes_rate=lambda config: False,
        known_by_shapes=False,
        declares=declares_causal,
        file_names=(name,),
        loaders=Loaders("Load CLIP (umt5-xxl, type wan)", "Load VAE (Wan 2.1)"),
        one_length=True,
        recache=True,
        check=partial(require_sequence, title),
        check_levels=partial(noise.require_trained, title),
        published=Published("renoise", lambda steps: steps, given_noise=0, scale=None),
        usual=Usual(frames=57, steps=len(noise.trained), cfg=1.0),
        bundled=bundled,
    )


TINY = Bundled("tiny-causal", "tiny-wan-vae", WanVAE.from_state_dict, encode_prompt, TINY_PREVIEW)
SELF_FORCING = causal_wan("self-forcing", "Self-Forcing", bundled=TINY)
CAUSAL_FORCING = causal_wan("causal-forcing", "Causal-Forcing", generator=LATEST)
FRAMEWISE = causal_wan("causal-forcing-framewise", "Causal-Forcing frame-wise", chunk_frames=1)
CAUSVID = causal_wan("causvid", "CausVid", THREE, generator=LATEST)
LONGLIVE = causal_wan("longlive", "LongLive", horizon=12, generator=LATEST)
KREA_REALTIME = causal_wan("krea-realtime", "Krea Realtime", KREA_FOUR, sizes=KREA)
CAUSAL = (SELF_FORCING, CAUSAL_FORCING, FRAMEWISE, CAUSVID, LONGLIVE, KREA_REALTIME)
