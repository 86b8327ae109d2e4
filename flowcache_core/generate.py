"""A film from a prompt without ComfyUI: what the demo, the benches and the evaluation share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunk import Chunk
from .decision import CachePolicy
from .demo.bundle import Bundle
from .models.attention import bidirectional
from .models.skyreels_adapter import SkyReelsAdapter
from .models.wan_vae import LATENT_CHANNELS, SPATIAL, TEMPORAL, latent_frames
from .report import RunReport
from .sampler import sample_chunks, sample_window
from .schedule import ChunkSchedule, Row, flow_sigmas, nearest_frames, timestep
from .session import Session
from .solvers import solver

Progress = Callable[[Chunk], None]
BRANCHES = ("cond", "uncond")


@dataclass(frozen=True)
class Job:
    """One film. `cfg` 1 runs the prompt alone; above it the empty or `negative` prompt runs beside it."""

    prompt: str
    frames: int = 57
    steps: int = 50
    seed: int = 0
    negative: str = ""
    size: int = 128
    cfg: float = 5.0
    shift: float = 8.0
    ar_step: int = 5
    solver: str = "unipc"
    fps: int = 24

    def schedule(self, bundle: Bundle) -> ChunkSchedule:
        """Raises ValueError, before anything runs, for frames or sizes that do not fit."""
        below, above = nearest_frames(self.frames, bundle.chunk_frames)
        if self.frames != below:
            latents, rest = latent_frames(self.frames), (self.frames - 1) % TEMPORAL
            what = f"not {TEMPORAL}n + 1" if rest else f"{latents} latent frames, not a multiple of chunk {bundle.chunk_frames}"
            raise ValueError(f"{self.frames} frames are {what}: use {below} or {above}")
        if self.size < 16 or self.size % 16:
            raise ValueError(f"a picture of {self.size} pixels does not fit: use a multiple of 16, such as {max(16, self.size // 16 * 16)}")
        return ChunkSchedule(latent_frames(self.frames), bundle.chunk_frames, self.steps, self.ar_step, bundle.window)

    def noise(self) -> Tensor:
        side = self.size // SPATIAL
        return torch.randn(1, LATENT_CHANNELS, latent_frames(self.frames), side, side, generator=torch.Generator().manual_seed(self.seed))


@torch.inference_mode()
def generate(bundle: Bundle, job: Job, policy: CachePolicy | None = None, on_step: Progress = lambda chunk: None) -> tuple[Tensor, RunReport]:
    """Block-causal with a KV cache -> latents [1, 16, F, h, w] and the report."""
    schedule, levels, like = job.schedule(bundle), flow_sigmas(job.steps, job.shift), bundle.network.patch_embedding.weight
    noise = job.noise().to(like.device)
    branches, text = _text(bundle, job)
    with Session(SkyReelsAdapter(bundle.network), schedule, levels, tuple(noise.shape[3:]), policy=policy, fps=job.fps) as session:  # type: ignore[arg-type]

        def predict(part: Tensor, chunk: Chunk) -> Tensor:
            batch = part.to(like.dtype).expand(len(branches), -1, -1, -1, -1)
            return _guided(session.denoise(batch, chunk, text, branches).float(), job.cfg)

        def moved(chunk: Chunk, clean: Tensor, film: Tensor) -> None:
            session.note(chunk, clean)
            on_step(chunk)

        latents = sample_chunks(predict, noise, schedule, levels, solver(job.solver), session.commit, moved)
    return latents, session.report


@torch.inference_mode()
def generate_upstream(bundle: Bundle, job: Job, on_step: Progress = lambda chunk: None) -> tuple[Tensor, RunReport]:
    """As published: bidirectional over the window, every chunk in every row, the branches one after the other."""
    schedule, levels, like = job.schedule(bundle), flow_sigmas(job.steps, job.shift), bundle.network.patch_embedding.weight
    noise = job.noise().to(like.device)
    branches, text = _text(bundle, job)
    report = RunReport(schedule.chunks, schedule.steps)
    frame_tokens = SkyReelsAdapter(bundle.network).tokens_per_frame(*noise.shape[3:])

    def predict(window: Tensor, sigmas: Tensor, row: Row) -> Tensor:
        t = torch.tensor([[timestep(float(s)) for s in sigmas]], device=window.device)
        with report.clock("network", window.device):
            each = [
                bundle.network(window.to(like.dtype), t, bundle.network.text_kv(text[i : i + 1]), bidirectional, fps=job.fps)
                for i in range(len(branches))
            ]
        report.whole_row(row, frame_tokens * window.shape[2])
        return _guided(torch.cat(each).float(), job.cfg)

    latents = sample_window(predict, noise, schedule, levels, solver(job.solver), lambda chunk, clean, film: on_step(chunk))
    report.close()
    return latents, report


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
