"""The sampler object behind AR Chunk Sampler: the core's loop, driven by the stock guider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from tqdm.auto import tqdm

from ..flowcache_core.chunk import Chunk
from ..flowcache_core.report import RunReport
from ..flowcache_core.sampler import sample_chunks
from ..flowcache_core.schedule import ChunkSchedule
from ..flowcache_core.session import Session
from ..flowcache_core.solvers import require_finite, solver
from .host_model import TURN, Turn, policy_of, require_ours
from .live import LiveMap

NODE = "AR Chunk Sampler"


class Mailbox:
    """Where a finished run leaves its report for Cache Report; it holds numbers, never tensors of the run."""

    report: RunReport | None = None


@dataclass(frozen=True)
class ChunkSampler(comfy.samplers.Sampler):
    """Settings of the node; `chunk_frames` and `window` 0 mean the model's own."""

    solver: str
    ar_step: int
    chunk_frames: int
    window: int
    fps: int
    mailbox: Mailbox
    node: str | None = None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):  # type: ignore[no-untyped-def]
        model = require_ours(model_wrap.model_patcher, NODE)
        self._require(noise, latent_image, denoise_mask, sigmas)
        levels = sigmas.tolist()
        schedule = self.schedule(model.layout, noise.shape[2], len(levels) - 1)
        options = extra_args["model_options"]["transformer_options"]
        total, at, shown = schedule.chunk_steps, 0, torch.zeros_like(noise)
        live = LiveMap(self.node, total)
        x = model.model_sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))

        def predict(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            sigma = levels[chunk.step]
            options[TURN] = Turn(session, chunk)
            clean = model_wrap(part, sigmas[chunk.step] * part.new_ones(part.shape[0]), **extra_args)
            return (part - clean) / sigma if sigma else clean

        def on_step(chunk: Chunk, clean: torch.Tensor, film: torch.Tensor) -> None:
            nonlocal at
            session.note(chunk, clean)
            shown[:, :, chunk.start : chunk.start + chunk.frames] = clean
            at += 1
            bar.set_postfix_str(f"chunk {chunk.index + 1}/{schedule.chunks}, computed {session.report.share:.0%}", refresh=False)
            bar.update()
            live.show(session.report, at)
            if callback is not None:
                callback(at - 1, shown if at == total else clean, film, total)

        with (
            Session(
                model.adapter(), schedule, levels, tuple(noise.shape[3:]), noise.shape[0], policy_of(extra_args["model_options"]), self.fps
            ) as session,
            tqdm(total=total, disable=disable_pbar) as bar,
        ):
            try:
                samples = sample_chunks(predict, x, schedule, levels, solver(self.solver), session.commit, on_step)
            finally:
                options.pop(TURN, None)
        self.mailbox.report = session.report
        bar.write(f"FlowCache: {session.report.summary()}")
        return model.model_sampling.inverse_noise_scaling(sigmas[-1], samples)

    def schedule(self, layout: Any, frames: int, steps: int) -> ChunkSchedule:
        return ChunkSchedule(frames, self.chunk_frames or layout.chunk_frames, steps, self.ar_step, self.window or layout.window)

    def _require(self, noise: torch.Tensor, latent_image: Any, denoise_mask: Any, sigmas: torch.Tensor) -> None:
        if noise.ndim != 5:
            raise ValueError(
                f"{NODE} needs a video latent [batch, channels, frames, height, width], got {tuple(noise.shape)}: use Empty AR Video Latent"
            )
        if len(sigmas) < 2:
            raise ValueError(f"{NODE} got {max(len(sigmas) - 1, 0)} steps: set at least 1 in the scheduler")
        if float(sigmas[-1]) != 0:
            raise ValueError(f"{NODE} needs noise levels that end in 0, these end in {float(sigmas[-1]):.4f}: do not split the sigmas")
        if denoise_mask is not None:
            raise ValueError(f"{NODE} does not take a noise mask: remove Set Latent Noise Mask from the latent")
        require_finite(noise, "the latents' noise values")
        if latent_image is not None:
            require_finite(latent_image, "the latents")
