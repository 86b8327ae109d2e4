"""A film from a prompt without ComfyUI: what the demo, the benches and the evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import attending, kernel_for
from ..kv.compressor import Compressor
from ..models.adapter import ModelAdapter
from ..models.bundle import Bundle
from ..models.family import Family
from ..policies.protocol import CachePolicy
from ..ranks.world import ALONE, ONE, Spread, World
from ..sampling.chunk import Chunk
from ..sampling.given import GivenNoise
from ..sampling.schedule import ChunkSchedule, Section, sections_of
from ..sampling.solvers import Solver, solver
from .identity import digest
from .report import RunReport
from .run import Place, Run
from .states import States
from .turn import Turn

Progress = Callable[[Chunk], None]
MakeAdapter = Callable[[ModelAdapter, Sequence[float]], ModelAdapter]
"""(adapter of the network, noise levels) -> the adapter that a run uses."""


@dataclass(frozen=True)
class Job:
    """One film. `cfg` 1 runs the prompt alone; above it the empty or `negative` prompt runs beside it.

    `denoise` < 1 starts from a given film; `addnoise` is the timestep of the light noise on given first frames; `overlap`
    counts the pixel frames that a bidirectional section carries into the next.
    """

    prompt: str
    frames: int = 57
    steps: int = 50
    seed: int = 0
    negative: str = ""
    size: int = 128
    cfg: float = 3.0
    shift: float = 8.0
    ar_step: int = 5
    solver: str = "unipc"
    fps: int = 24
    denoise: float = 1.0
    addnoise: int = 20
    overlap: int = 17
    width: int = 0
    """Of the picture in pixels; `size` is then its height. 0 makes it square."""

    @classmethod
    def usual(cls, family: Family, prompt: str, **changes: Any) -> Job:
        """With the family's usual settings, but for `changes`; `ar_step` follows the steps."""
        usual, published = family.usual, family.published
        steps = changes.get("steps", usual.steps)
        settings = {"frames": usual.frames, "steps": steps, "cfg": usual.cfg, "shift": family.noise.shift, "ar_step": published.stagger(steps),
                    "solver": published.solver, "addnoise": published.given_noise, "fps": usual.fps}  # fmt: skip
        return cls(prompt, **{**settings, **changes})

    def schedule(self, bundle: Bundle, prefix: int = 0, suffix: int = 0) -> ChunkSchedule:
        """With latent frames given at the start and the end. Raises ValueError, before anything runs, for what does not fit."""
        layout, pixels = bundle.layout, bundle.family.frames
        frames, size = self._frames(bundle), layout.chunk_frames
        return ChunkSchedule(frames, size, self.steps, self.ar_step, layout.window, prefix, suffix, pixels, layout.aligned, layout.profile)

    def sections(self, bundle: Bundle, prefix: int = 0, suffix: int = 0) -> tuple[Section, ...]:
        """The same for the upstream way. Raises ValueError."""
        chunk, pixels = bundle.layout.chunk_frames, bundle.family.frames
        length, overlap = chunk * bundle.layout.window, pixels.latent(self.overlap)
        return sections_of(self._frames(bundle), chunk, self.steps, self.ar_step, length, overlap, prefix, suffix, pixels)

    def sigmas(self, bundle: Bundle) -> tuple[float, ...]:
        return bundle.family.noise.levels(self.steps, self.shift, self.denoise)

    def noise(self, bundle: Bundle) -> Tensor:
        """[1, C, F, h, w]."""
        return torch.randn(self.noise_shape(bundle), generator=torch.Generator().manual_seed(self.seed))

    def noise_shape(self, bundle: Bundle) -> tuple[int, int, int, int, int]:
        latents, frames = bundle.family.latents, bundle.family.frames.latent(self.frames)
        height, width = (side // latents.spatial for side in self.picture)
        return 1, latents.channels, frames, height, width

    @property
    def picture(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.size, self.width or self.size

    def _frames(self, bundle: Bundle) -> int:
        """Latent frames. Raises ValueError for a film, a picture or a rate that the family does not make."""
        family, multiple = bundle.family, bundle.family.latents.multiple
        for side in self.picture:
            if side < multiple or side % multiple:
                nearest = max(multiple, side // multiple * multiple)
                raise ValueError(f"a picture of {side} pixels does not fit: use a multiple of {multiple}, such as {nearest}")
        family.require_rate(self.fps)
        return family.require_frames(self.frames, bundle.layout.chunk_frames)


@dataclass(frozen=True)
class Given:
    """What a film sets out from: latents [1, C, F, h, w] of its first frames, of its last frames, of all of it (for `denoise` < 1)."""

    start: Tensor | None = None
    end: Tensor | None = None
    film: Tensor | None = None

    @property
    def prefix(self) -> int:
        return 0 if self.start is None else self.start.shape[2]

    @property
    def suffix(self) -> int:
        return 0 if self.end is None else self.end.shape[2]

    def begin(self, noise: Tensor, sigma: float) -> Tensor:
        """Noise, mixed with the film at noise level `sigma`, with the given frames put in. Raises ValueError for another size."""
        for what, latents, frames in (("first frames", self.start, self.prefix), ("last frames", self.end, self.suffix), ("film", self.film, None)):
            wanted = (*noise.shape[:2], frames or noise.shape[2], *noise.shape[3:])
            if latents is not None and tuple(latents.shape) != wanted:
                raise ValueError(f"the given {what} have latents of shape {tuple(latents.shape)}, but {wanted} are needed")
        x = noise.clone() if self.film is None else sigma * noise + (1 - sigma) * self.film.to(noise)
        if self.start is not None:
            x[:, :, : self.prefix] = self.start
        if self.end is not None:
            x[:, :, -self.suffix :] = self.end
        return x


NOTHING = Given()


@torch.inference_mode()
def generate(bundle: Bundle, job: Job, policy: CachePolicy | None = None, on_step: Progress = lambda chunk: None,
             given: Given = NOTHING, adapter: MakeAdapter = lambda adapter, sigmas: adapter,
             compressor: Compressor | None = None, integrator: Solver | None = None,
             states: States | None = None, world: World = ONE) -> tuple[Tensor, RunReport]:  # fmt: skip
    """Block-causal with a KV cache -> latents [1, C, F, h, w] and the report. Given frames come out as they went in.

    `compressor` bounds the history that chunks look back on; without one it is all that the window holds. `integrator` takes the
    place of the solver that the job names. `states`: a run that is stopped leaves its state there, and the next of the same film goes on.
    `world`: the devices that share the film; each of them calls this with the same arguments, and gets the film.
    """
    film = job.schedule(bundle, given.prefix, given.suffix)
    spread = _spread(bundle, job, film, policy, world)
    guided = Guided(bundle, job, spread=spread)
    latents, report = _made(bundle, job, film, guided, on_step, given, adapter, policy, compressor, integrator, states)
    report.notes, report.devices = (*report.notes, *filter(None, (spread.expectation, spread.line))), spread.as_dict()
    return latents, report


@torch.inference_mode()
def generate_upstream(bundle: Bundle, job: Job, on_step: Progress = lambda chunk: None, given: Given = NOTHING,
                      policy: CachePolicy | None = None, integrator: Solver | None = None, states: States | None = None,
                      adapter: MakeAdapter = lambda adapter, sigmas: adapter) -> tuple[Tensor, RunReport]:  # fmt: skip
    """As published: bidirectional over each section, every chunk in every row, the branches one after the other.

    `policy`: one that plans, and so can leave out whole rows; None computes all of them. `integrator`, `states`, `adapter`: as in `generate`.
    """
    film, guided = job.sections(bundle, given.prefix, given.suffix), Guided(bundle, job, True)
    return _made(bundle, job, film, guided, on_step, given, adapter, policy, None, integrator, states)


def _spread(bundle: Bundle, job: Job, film: ChunkSchedule, policy: CachePolicy | None, world: World) -> Spread:
    words, (*_, height, width) = bundle.text(job.prompt).shape[1], job.noise_shape(bundle)
    family, itemsize = bundle.family, bundle.like.element_size()
    branches = len(family.guidance.branches(job.cfg))
    return world.spread(family, bundle.adapter(), film, (height, width), branches, words, itemsize, policy, job.cfg, job.sigmas(bundle))


def _made(bundle: Bundle, job: Job, film: ChunkSchedule | tuple[Section, ...], guided: Guided, on_step: Progress, given: Given, adapter: MakeAdapter,
          policy: CachePolicy | None, compressor: Compressor | None, integrator: Solver | None,
          states: States | None) -> tuple[Tensor, RunReport]:  # fmt: skip
    if job.denoise < 1 and given.film is None:
        raise ValueError(f"denoise {job.denoise} starts from a given film, and none was given: use 1 for a new film")
    run = _settled(bundle, job, film, guided, adapter, policy, compressor, integrator)
    x = given.begin(job.noise(bundle).to(bundle.like.device), run.sigmas[0])
    with attending(kernel_for(bundle.like.device, bundle.like.dtype, run.adapter.head_dim)):
        return run.sample(x, guided, Steps(on_step), states and replace(states, film={**states.film, **guided.film}))


def run_of(bundle: Bundle, job: Job, policy: CachePolicy | None = None, compressor: Compressor | None = None) -> Run:
    """As `generate` will run a film from its prompt alone: settled, and not begun. Raises ValueError, with the way out, for what cannot work."""
    return _settled(bundle, job, job.schedule(bundle), Guided(bundle, job), lambda adapter, sigmas: adapter, policy, compressor, None)


def _settled(bundle: Bundle, job: Job, film: ChunkSchedule | tuple[Section, ...], guided: Guided, adapter: MakeAdapter,
             policy: CachePolicy | None, compressor: Compressor | None, integrator: Solver | None) -> Run:  # fmt: skip
    levels, like, spread = job.sigmas(bundle), bundle.like, guided.spread
    branches, whole = len(guided.branches[guided.own]), adapter(bundle.adapter(), levels)
    _, channels, _, height, width = job.noise_shape(bundle)
    place = Place(1, branches, branches * guided.context.shape[1], 0, like.element_size(), like.device, alike=True)
    mine, compressor = spread.adapter(whole, policy, compressor), spread.compressor(compressor, whole.heads)
    return Run(bundle.family, mine, film, levels, (channels, height, width), place, policy, compressor, job.fps,
               GivenNoise(job.addnoise, job.seed), integrator or solver(job.solver), job.cfg, spread=spread)  # fmt: skip


def warm_up(bundle: Bundle) -> None:
    """One chunk of few steps, so that what is timed next does not pay for what every process pays once."""
    generate(bundle, Job.usual(bundle.family, "", frames=bundle.family.frames.pixel(bundle.layout.chunk_frames), steps=4))


@dataclass(frozen=True)
class Steps:
    """An observer that only counts steps."""

    on_step: Progress

    def begin(self, report: RunReport, notes: Iterable[str]) -> None: ...

    def step(self, report: RunReport, chunk: Chunk, clean: Tensor | None, film: Tensor) -> None:
        self.on_step(chunk)


@dataclass(frozen=True)
class Guided:
    """Evaluates the branches of a job, side by side or one after the other (`apart`), and combines them. Under `spread` other devices evaluate
    some of them."""

    bundle: Bundle
    job: Job
    apart: bool = False
    spread: Spread = ALONE
    branches: tuple[str, ...] = field(init=False)
    context: Tensor = field(init=False)
    """[branches, words, channels]."""
    levels: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        guidance, text = self.bundle.family.guidance, self.bundle.text
        branches = ("prompt",) if guidance.inside else guidance.branches(self.job.cfg)
        object.__setattr__(self, "levels", self.job.sigmas(self.bundle))
        object.__setattr__(self, "branches", branches)
        object.__setattr__(self, "context", torch.cat([text(self.job.negative if k else self.job.prompt) for k in range(len(branches))]))

    @property
    def own(self) -> slice:
        """The branches of this device; where guidance is inside, the run shares them."""
        return slice(None) if self.bundle.family.guidance.inside else self.spread.own(len(self.branches))

    @property
    def texts(self) -> dict[str, object]:
        """As people wrote them, and as the network reads them."""
        return {"prompt": self.job.prompt, "negative": self.job.negative, "texts": self.context}

    @property
    def film(self) -> dict[str, object]:
        """What the film depends on besides the run: texts and weights."""
        return {**self.texts, "weights": digest(self.bundle.network)}

    def __call__(self, turn: Turn, x: Tensor) -> Tensor:
        x, n, guidance = x.to(self.bundle.like.dtype), len(self.branches), self.bundle.family.guidance
        if self.apart:
            each = [turn.denoise(x, self.context[k : k + 1], self.branches[k : k + 1]).float() for k in range(n)]
        else:
            branches = self.branches[self.own]
            mine = turn.denoise(x.expand(len(branches), -1, -1, -1, -1), self.context[self.own], branches)
            if guidance.inside or turn.committing:
                return mine[: len(x)].float()
            each = list(self.spread.joined(mine, n).float().chunk(n))
        return guidance.combine(each, self.job.cfg, self.levels[turn.step])


@torch.inference_mode()
def decode(bundle: Bundle, latents: Tensor) -> Tensor:
    """-> film float32 [T, 3, H, W] in 0..1."""
    weight = next(bundle.vae.parameters())
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=bundle.network.dtype == torch.bfloat16):
        film = bundle.vae.decode(latents.to(weight).contiguous(memory_format=torch.channels_last_3d))[0]
    return (film.float() / 2 + 0.5).clamp(0, 1).transpose(0, 1).cpu()
