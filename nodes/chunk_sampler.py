"""The sampler object behind AR Chunk Sampler: the core's loops, driven by the stock guider."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from tqdm.auto import tqdm

from ..flowcache_core.kv.cache import KVSizes
from ..flowcache_core.kv.compressor import Budget
from ..flowcache_core.kv.layout import capacity
from ..flowcache_core.models.wan_vae import latent_frames
from ..flowcache_core.policies.planned import Planned
from ..flowcache_core.policies.presets import PLANS
from ..flowcache_core.policies.protocol import Foresees, PartPolicy, WindowPolicy
from ..flowcache_core.run.footprint import footprint
from ..flowcache_core.run.report import RunReport
from ..flowcache_core.run.session import Session
from ..flowcache_core.run.window import WindowSession
from ..flowcache_core.sampling.chunk import Chunk
from ..flowcache_core.sampling.given import GivenNoise, given_frames
from ..flowcache_core.sampling.loop import sample_chunks, sample_windows
from ..flowcache_core.sampling.plan import Plan
from ..flowcache_core.sampling.schedule import ChunkSchedule, Row, Window, plan_windows
from ..flowcache_core.sampling.solvers import require_finite, solver
from .host_model import (
    CHUNKWISE_NODE,
    EXPECTED,
    KV_NODE,
    TURN,
    ChunkLayout,
    ChunkTurn,
    Expected,
    HostModel,
    WindowTurn,
    compressor_of,
    node_of,
    policy_of,
    require_ours,
    take_expected,
)
from .live import LiveMap

NODE = "AR Chunk Sampler"
AUTO, CAUSAL, BIDIRECTIONAL = "auto", "block-causal (KV cache)", "bidirectional (as trained)"

Schedules = ChunkSchedule | tuple[Window, ...]
"""One rolling schedule with a KV cache, or bidirectional windows."""


def say(lines: Iterable[str]) -> None:
    """Onto the console, above a progress bar."""
    for line in lines:
        tqdm.write(f"FlowCache: {line}", file=sys.stderr)


def expects(guider: Any, model: HostModel, film: Schedules, noise: torch.Tensor, fps: int) -> Expected:
    """What a run will hold. Raises ValueError, with the way out, for a budget that cannot serve it."""
    adapter, policy, compressor = model.adapter(), policy_of(guider.model_options), compressor_of(guider.model_options)
    alone = getattr(guider, "cfg", None) == 1 and "middle" not in guider.conds
    conds = [one for name, many in guider.conds.items() if not (alone and name == "negative") for one in many]
    tokens = sum(one["cross_attn"].shape[1] for one in conds if one.get("cross_attn") is not None)
    batch, schedules = noise.shape[0], [film] if isinstance(film, ChunkSchedule) else [window.schedule for window in film]
    rows, itemsize, grid = len(conds) * batch, adapter.dtype.itemsize, tuple(noise.shape[3:])
    bounded, budget = None, None
    if compressor and isinstance(film, ChunkSchedule):
        budget = compressor.plan(adapter, film, grid, fps, rows, itemsize, guider.model_patcher.load_device)
        room = capacity(film, adapter.tokens_per_frame(*grid), budget.rows)
        bounded = budget.bytes(KVSizes.of(adapter, batch, room), len(conds), itemsize)
    held = footprint(
        adapter, schedules[0], (noise.shape[1], *grid), rows, tokens * batch, itemsize,
        policy.keeps if policy else None, guider.model_patcher.model_size(), bounded,
        policy.plan(film) if isinstance(policy, PartPolicy) and isinstance(film, ChunkSchedule) else None,
    )  # fmt: skip
    if isinstance(film, ChunkSchedule):
        return Expected(max(frames for _, frames in (film.span(k) for k in range(film.chunks))), held, budget)
    return Expected(max(one.frames for one in schedules), replace(held, kv=0))


class Mailbox:
    """Where the runs of one sampler leave their report for Cache Report; it holds numbers, never tensors of a run."""

    def __init__(self) -> None:
        self.report: RunReport | None = None
        self.runs = 0

    def put(self, report: RunReport) -> None:
        self.report, self.runs = report, self.runs + 1

    @property
    def name(self) -> str:
        """Which run the report is of, where the sampler has made several."""
        return f"run {self.runs} of this sampler: " if self.runs > 1 else ""


class Progress:
    """Bar, preview and live map of one run of `total` steps."""

    def __init__(self, film: torch.Tensor, total: int, chunks: int, node: str | None, callback: Any, hide: bool) -> None:
        self.total, self.chunks, self.callback, self.at = total, chunks, callback, 0
        self.shown, self.live = film.clone(), LiveMap(node, total)
        self.bar = tqdm(total=total, disable=hide)

    def begin(self, report: RunReport, said: Iterable[str]) -> None:
        """What is known before the first step, onto console and page."""
        say(said)
        self.live.show(report, 0)

    def step(self, report: RunReport, chunk: Chunk, clean: torch.Tensor | None, film: torch.Tensor) -> None:
        """`clean`: the chunk as it is now predicted; None where its step was skipped, which leaves the preview as it is."""
        if clean is not None:
            self.shown[:, :, chunk.start : chunk.start + chunk.frames] = clean
        self.at += 1
        self.bar.set_postfix_str(f"chunk {chunk.index + 1}/{self.chunks}, {report.share:.0%} of tokens computed", refresh=False)
        self.bar.update()
        self.live.show(report, self.at)
        last = self.at == self.total
        if self.callback is not None and (last or clean is not None):
            self.callback(self.at - 1, self.shown if last else clean, film, self.total)


@dataclass(frozen=True)
class ChunkSampler(comfy.samplers.Sampler):
    """Settings of the node; `chunk_frames`, `window` and `window_frames` 0 mean the model's own."""

    solver: str
    ar_step: int
    chunk_frames: int
    window: int
    fps: int
    mailbox: Mailbox
    node: str | None = None
    attention: str = AUTO
    window_frames: int = 0
    overlap_history: int = 17
    addnoise_condition: int = 20

    def around(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):  # type: ignore[no-untyped-def]
        """The host's OUTER_SAMPLE: refuses before any weights move, and tells what the run will hold; puts given frames back as they came."""
        guider = executor.class_obj
        model, options = require_ours(guider.model_patcher, NODE), guider.model_options
        self._require(noise, latent_image, sigmas)
        if self.fps != model.layout.fps and not model.diffusion_model.config.fps:
            raise ValueError(
                f"{NODE}: fps {self.fps} would change nothing, this model has no frame-rate tensors (of the SkyReels-V2 models only the 1.3B has): "
                f"set fps to {model.layout.fps}"
            )
        prefix, suffix = (0, 0) if denoise_mask is None else given_frames(denoise_mask)
        film = self.schedules(model.layout, noise.shape[2], len(sigmas) - 1, prefix, suffix, options)
        policy = policy_of(options)
        if isinstance(policy, Foresees):
            policy.check_run(len(sigmas) - 1)
        if isinstance(policy, Planned) and policy.exact is not None:
            _ = policy.plan(film) if isinstance(film, ChunkSchedule) else policy.plans([window.schedule for window in film])
        expected = expects(guider, model, film, noise, self.fps)
        logging.info(f"FlowCache: {expected.held.sentence()}")
        token = EXPECTED.set(expected)
        try:
            samples = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        finally:
            EXPECTED.reset(token)
        keep_given(samples, latent_image, prefix, suffix)
        return samples

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):  # type: ignore[no-untyped-def]
        model, expected = require_ours(model_wrap.model_patcher, NODE), take_expected()
        self._require(noise, latent_image, sigmas)
        prefix, suffix = (0, 0) if denoise_mask is None else given_frames(denoise_mask)
        film = self.schedules(model.layout, noise.shape[2], len(sigmas) - 1, prefix, suffix, extra_args["model_options"])
        x = model.model_sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))
        keep_given(x, latent_image, prefix, suffix)
        expected = expected or expects(model_wrap, model, film, noise, self.fps)
        run = partial(self._causal, budget=expected.budget) if isinstance(film, ChunkSchedule) else self._bidirectional
        light = GivenNoise(self.addnoise_condition, extra_args.get("seed") or 0)
        options = extra_args["model_options"]["transformer_options"]
        try:
            samples, report = run(film, model, model_wrap, sigmas, extra_args, x, light, callback, disable_pbar)
        finally:
            options.pop(TURN, None)
        report.expected = expected.held
        self.mailbox.put(report)
        say([report.summary()])
        return model.model_sampling.inverse_noise_scaling(sigmas[-1], samples)

    def schedules(self, layout: ChunkLayout, frames: int, steps: int, prefix: int, suffix: int, model_options: dict[str, Any]) -> Schedules:
        """Raises ValueError, with the way out, for a film that these settings cannot make."""
        chunk, window = self.chunk_frames or layout.chunk_frames, self.window or layout.window
        causal = layout.causal if self.attention == AUTO else self.attention == CAUSAL
        if causal:
            return ChunkSchedule(frames, chunk, steps, self.ar_step, window, prefix, suffix)
        self._require_whole_rows(model_options)
        length = latent_frames(self.window_frames) if self.window_frames else chunk * window
        return plan_windows(frames, chunk, steps, self.ar_step, length, latent_frames(self.overlap_history), prefix, suffix)

    def _require_whole_rows(self, model_options: dict[str, Any]) -> None:
        """Raises ValueError for settings on the MODEL that bidirectional attention cannot serve."""
        policy, compressor = policy_of(model_options), compressor_of(model_options)
        decides = policy is not None and not isinstance(policy, WindowPolicy)
        nodes = " and ".join([*([node_of(policy)] if policy and decides else []), *([KV_NODE] if compressor else [])])
        if not nodes:
            return
        mine = f"{AUTO}, for this model {BIDIRECTIONAL}" if self.attention == AUTO else BIDIRECTIONAL
        why = "no chunk can be skipped by itself" if decides else "there is no KV cache"
        *others, final = PLANS
        plans = f"; or use {CHUNKWISE_NODE} with preset {', '.join(others)} or {final}, which skip whole rows" if decides else ""
        raise ValueError(
            f"{nodes} cannot work with the attention of {NODE}, {mine}: there every frame changes every other in every "
            f"row, so {why}; set attention to {CAUSAL}, or bypass {nodes}{plans}"
        )

    def _causal(self, schedule, model, model_wrap, sigmas, extra_args, x, light, callback, hide, budget: Budget | None):  # type: ignore[no-untyped-def]
        levels, options = sigmas.tolist(), extra_args["model_options"]["transformer_options"]
        grid, policy = tuple(x.shape[3:]), policy_of(extra_args["model_options"])
        progress = Progress(x, schedule.chunk_steps, schedule.chunks, self.node, callback, hide)
        session = Session(model.adapter(), schedule, levels, grid, x.shape[0], policy, self.fps, light.sigma, budget)
        with session, progress.bar:
            progress.begin(session.report, session.foresee(x.device))

            def predict(part: torch.Tensor, chunk: Chunk) -> torch.Tensor:
                options[TURN] = ChunkTurn(session, chunk)
                return velocity(model_wrap, part, sigmas[chunk.step], extra_args)

            def on_step(chunk: Chunk, clean: torch.Tensor | None, film: torch.Tensor) -> None:
                session.note(chunk, clean)
                progress.step(session.report, chunk, clean, film)

            def settle(frame_s: float) -> Plan:
                before, plan = session.report.notes, session.settle(frame_s)
                progress.begin(session.report, (line for line in session.report.notes if line not in before))
                return plan

            plan, steps_on = session.plan or settle, solver(self.solver)
            samples = sample_chunks(predict, x, schedule, levels, steps_on, session.commit, on_step, light, plan, session.choose)
            return samples, session.report

    def _bidirectional(self, windows, model, model_wrap, sigmas, extra_args, x, light, callback, hide):  # type: ignore[no-untyped-def]
        levels, options = sigmas.tolist(), extra_args["model_options"]["transformer_options"]
        policy = policy_of(extra_args["model_options"])
        steps = sum(window.schedule.chunk_steps for window in windows)
        chunks = windows[-1].index + windows[-1].schedule.chunks
        progress = Progress(x, steps, chunks, self.node, callback, hide)
        with WindowSession(model.adapter(), windows, tuple(x.shape[3:]), self.fps, policy) as session, progress.bar:
            progress.begin(session.report, session.foresee())

            def predict(part: torch.Tensor, per_frame: tuple[float, ...], row: Row) -> torch.Tensor:
                options[TURN] = WindowTurn(session, per_frame)
                return velocity(model_wrap, part, sigmas[min(chunk.step for chunk in row.active)], extra_args)

            def on_step(chunk: Chunk, clean: torch.Tensor | None, film: torch.Tensor) -> None:
                session.note(chunk, clean)
                progress.step(session.report, chunk, clean, film)

            def settle(frame_s: float) -> tuple[Plan, ...]:
                plans = session.settle(frame_s)
                progress.begin(session.report, session.report.notes)
                return plans

            plans = session.plans or settle
            return sample_windows(predict, x, windows, levels, solver(self.solver), on_step, light, plans), session.report

    def _require(self, noise: torch.Tensor, latent_image: Any, sigmas: torch.Tensor) -> None:
        if noise.ndim != 5:
            raise ValueError(
                f"{NODE} needs a video latent [batch, channels, frames, height, width], got {tuple(noise.shape)}: use Empty AR Video Latent"
            )
        if len(sigmas) < 2:
            raise ValueError(f"{NODE} got {max(len(sigmas) - 1, 0)} steps: set at least 1 in the scheduler")
        if float(sigmas[-1]) != 0:
            raise ValueError(f"{NODE} needs noise levels that end in 0, these end in {float(sigmas[-1]):.4f}: do not split the sigmas")
        require_finite(noise, "the latents' noise values")
        if latent_image is not None:
            require_finite(latent_image, "the latents")


def velocity(model_wrap: Callable[..., torch.Tensor], x: torch.Tensor, sigma: torch.Tensor, extra_args: dict[str, Any]) -> torch.Tensor:
    """What the guider makes of the network's velocity: it speaks of clean latents at one noise level, x - sigma * velocity."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    clean = model_wrap(x, sigma * x.new_ones(x.shape[0]), **extra_args)
    return (x - clean) / sigma if float(sigma) else clean


def keep_given(samples: torch.Tensor, source: torch.Tensor, prefix: int, suffix: int) -> None:
    """Puts given latent frames of `source` into `samples`, in place."""
    end = samples.shape[2] - suffix
    samples[:, :, :prefix] = source[:, :, :prefix].to(samples)
    samples[:, :, end:] = source[:, :, end:].to(samples)
