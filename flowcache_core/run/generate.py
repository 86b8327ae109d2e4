"""A film from a prompt without ComfyUI: what the demo, the benches and the evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kv.compressor import Compressor
from ..models.adapter import ModelAdapter
from ..models.bundle import Bundle
from ..models.skyreels import SkyReelsV2, require_fps
from ..models.skyreels_adapter import SkyReelsAdapter
from ..models.wan_vae import LATENT_CHANNELS, SPATIAL, TEMPORAL, latent_frames
from ..policies.protocol import CachePolicy
from ..sampling.chunk import Chunk
from ..sampling.given import GivenNoise
from ..sampling.loop import sample_chunks, sample_windows
from ..sampling.schedule import ChunkSchedule, Row, Window, flow_sigmas, plan_windows
from ..sampling.solvers import Solver, solver
from .report import RunReport
from .session import Session
from .window import WindowSession

Progress = Callable[[Chunk], None]
MakeAdapter = Callable[[SkyReelsV2, Sequence[float]], ModelAdapter]
"""(network, noise levels) -> the adapter that a run uses."""
BRANCHES = ("cond", "uncond")


@dataclass(frozen=True)
class Job:
    """One film. `cfg` 1 runs the prompt alone; above it the empty or `negative` prompt runs beside it.

    `denoise` < 1 starts from a given film; `addnoise` is the timestep of the light noise on given first frames; `overlap`
    counts the pixel frames that a bidirectional window carries into the next.
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

    def schedule(self, bundle: Bundle, prefix: int = 0, suffix: int = 0) -> ChunkSchedule:
        """With latent frames given at the start and the end. Raises ValueError, before anything runs, for what does not fit."""
        self._check()
        return ChunkSchedule(latent_frames(self.frames), bundle.chunk_frames, self.steps, self.ar_step, bundle.window, prefix, suffix)

    def windows(self, bundle: Bundle, prefix: int = 0, suffix: int = 0) -> tuple[Window, ...]:
        """The same for the upstream way. Raises ValueError."""
        self._check()
        chunk, length = bundle.chunk_frames, bundle.chunk_frames * bundle.window
        return plan_windows(
            latent_frames(self.frames), chunk, self.steps, self.ar_step, length, latent_frames(self.overlap), prefix=prefix, suffix=suffix
        )

    def sigmas(self) -> tuple[float, ...]:
        return flow_sigmas(self.steps, self.shift, self.denoise)

    def noise(self) -> Tensor:
        side = self.size // SPATIAL
        return torch.randn(1, LATENT_CHANNELS, latent_frames(self.frames), side, side, generator=torch.Generator().manual_seed(self.seed))

    def _check(self) -> None:
        if self.frames < 1 or (self.frames - 1) % TEMPORAL:
            below = max(self.frames - 1, 0) // TEMPORAL * TEMPORAL + 1
            raise ValueError(f"{self.frames} frames are not {TEMPORAL}n + 1: use {below} or {below + TEMPORAL}")
        if self.size < 16 or self.size % 16:
            raise ValueError(f"a picture of {self.size} pixels does not fit: use a multiple of 16, such as {max(16, self.size // 16 * 16)}")
        require_fps(self.fps)


@dataclass(frozen=True)
class Given:
    """What a film sets out from: latents [1, 16, F, h, w] of its first frames, of its last frames, of all of it (for `denoise` < 1)."""

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
             given: Given = NOTHING, adapter: MakeAdapter = lambda network, sigmas: SkyReelsAdapter(network),
             compressor: Compressor | None = None, integrator: Solver | None = None) -> tuple[Tensor, RunReport]:  # fmt: skip
    """Block-causal with a KV cache -> latents [1, 16, F, h, w] and the report. Given frames come out as they went in.

    `compressor` bounds the history that chunks look back on; without one it is what lies within the window. `integrator` takes the
    place of the solver that the job names.
    """
    schedule, levels, like = job.schedule(bundle, given.prefix, given.suffix), _levels(job, given), bundle.network.patch_embedding.weight
    x, light = given.begin(job.noise().to(like.device), levels[0]), GivenNoise(job.addnoise, job.seed)
    branches, text = _text(bundle, job)
    network, grid = adapter(bundle.network, levels), (x.shape[3], x.shape[4])
    budget = compressor.plan(network, schedule, grid, job.fps, len(branches), like.element_size(), x.device) if compressor else None
    with Session(network, schedule, levels, grid, policy=policy, fps=job.fps, prefix_sigma=light.sigma, budget=budget) as session:
        session.foresee(x.device)

        def predict(part: Tensor, chunk: Chunk) -> Tensor:
            batch = part.to(like.dtype).expand(len(branches), -1, -1, -1, -1)
            return _guided(session.denoise(batch, chunk, text, branches).float(), job.cfg)

        def moved(chunk: Chunk, clean: Tensor | None, film: Tensor) -> None:
            session.note(chunk, clean)
            on_step(chunk)

        latents = sample_chunks(
            predict, x, schedule, levels, integrator or solver(job.solver), session.commit, moved, light, session.plan or session.settle,
            session.choose,
        )  # fmt: skip
    return latents, session.report


@torch.inference_mode()
def generate_upstream(bundle: Bundle, job: Job, on_step: Progress = lambda chunk: None, given: Given = NOTHING,
                      policy: CachePolicy | None = None, integrator: Solver | None = None) -> tuple[Tensor, RunReport]:  # fmt: skip
    """As published: bidirectional over the window, every chunk in every row, the branches one after the other.

    `policy`: one that plans, and so can leave out whole rows; None computes all of them. `integrator`: as in `generate`.
    """
    windows, levels, like = job.windows(bundle, given.prefix, given.suffix), _levels(job, given), bundle.network.patch_embedding.weight
    x, light = given.begin(job.noise().to(like.device), levels[0]), GivenNoise(job.addnoise, job.seed)
    branches, text = _text(bundle, job)
    with WindowSession(SkyReelsAdapter(bundle.network), windows, (x.shape[3], x.shape[4]), job.fps, policy) as session:
        session.foresee()

        def predict(part: Tensor, sigmas: tuple[float, ...], row: Row) -> Tensor:
            each = [session.denoise(part.to(like.dtype), sigmas, text[i : i + 1], branches[i : i + 1]) for i in range(len(branches))]
            return _guided(torch.cat(each).float(), job.cfg)

        def moved(chunk: Chunk, clean: Tensor | None, film: Tensor) -> None:
            session.note(chunk, clean)
            on_step(chunk)

        latents = sample_windows(predict, x, windows, levels, integrator or solver(job.solver), moved, light, session.plans or session.settle)
    return latents, session.report


def _levels(job: Job, given: Given) -> tuple[float, ...]:
    if job.denoise < 1 and given.film is None:
        raise ValueError(f"denoise {job.denoise} starts from a given film, and none was given: use 1 for a new film")
    return job.sigmas()


@torch.inference_mode()
def decode(bundle: Bundle, latents: Tensor) -> Tensor:
    """-> film float32 [T, 3, H, W] in 0..1."""
    weight = bundle.vae.conv2.weight
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=bundle.network.dtype == torch.bfloat16):
        film = bundle.vae.decode(latents.to(weight).contiguous(memory_format=torch.channels_last_3d))[0]
    return (film.float() / 2 + 0.5).clamp(0, 1).transpose(0, 1).cpu()


def _text(bundle: Bundle, job: Job) -> tuple[tuple[str, ...], Tensor]:
    if job.cfg == 1:
        return BRANCHES[:1], bundle.text(job.prompt)
    return BRANCHES, torch.cat([bundle.text(job.prompt), bundle.text(job.negative)])


def _guided(velocity: Tensor, cfg: float) -> Tensor:
    """Classifier-free guidance: uncond + cfg * (cond - uncond)."""
    if len(velocity) == 1:
        return velocity
    cond, uncond = velocity.chunk(2)
    return uncond + cfg * (cond - uncond)
