"""The sampler object behind AR Chunk Sampler: the core's loops, driven by the stock guider."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import torch

from ..flowcache_core.models.family import Family
from ..flowcache_core.policies.presets import PLANS
from ..flowcache_core.policies.protocol import SectionPolicy
from ..flowcache_core.run.lead import Leader
from ..flowcache_core.run.run import Film, Place, Run
from ..flowcache_core.run.states import States
from ..flowcache_core.sampling.given import GivenNoise, given_frames
from ..flowcache_core.sampling.prompts import forecast_prompts, require_chunks
from ..flowcache_core.sampling.schedule import ChunkSchedule, sections_of
from ..flowcache_core.sampling.solvers import require_finite, solver
from .evaluation import Guidance
from .fit import require_ours
from .guidance import alone, conds_of, evaluates_alike, scale_of, unread
from .host_model import HostModel
from .host_network import TURN
from .mailbox import Mailbox
from .native_model import SAMPLER
from .other_nodes import BASE, blocks_of, require_counting_texts, require_one_model, require_plain_texts, require_steady_hooks
from .progress import Progress, say
from .projector import FilmPreview
from .settings_on_model import CHUNKWISE_NODE, KV_NODE, PROMPTS_NODE, clean_pass_of, compressor_of, policy_node, policy_of
from .sharing import shared
from .states import states_of
from .texts import ChunkConds, by_branch, require_texts, tokens_of, with_durations

NODE = "AR Chunk Sampler"
AUTO, CAUSAL, BIDIRECTIONAL = "auto", "block-causal (KV cache)", "bidirectional (as trained)"
PUBLISHED = "auto"
"""Solver: what the family was published with."""
START = "ar_config"
"""Key in transformer_options under which the host's node hands a start image to its own sampler."""


def place_of(guider: Any, model: HostModel, noise: torch.Tensor, film: Film) -> Place:
    """How many texts the guider has, how long they are, and where the network will be."""
    branches = by_branch(conds_of(guider, model.family))
    at_once = max(2, *(len(row.active) for row in film.rows)) if isinstance(film, ChunkSchedule) else 1
    tokens = sum(min(len(some), at_once) * tokens_of(some) for some in branches)
    patcher = guider.model_patcher
    return Place(noise.shape[0], max(len(branches), 1), tokens * noise.shape[0], patcher.model_size(), model.dtype_of(patcher).itemsize,
                 patcher.load_device, evaluates_alike(guider))  # fmt: skip


@dataclass(frozen=True)
class ChunkSampler(comfy.samplers.Sampler):
    """Settings of the node; `chunk_frames`, `window`, `window_frames`, `fps` 0: the model's, as are `ar_step` and `addnoise_condition` below 0."""

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
    save_every: int = 0
    vae: Any = None
    """Shows the film while it grows; None: it is not shown."""
    run: Run | None = None
    """The run that this sampler was settled for, once the host has begun it."""
    states: States | None = None
    """Where that run is saved, if it is."""
    leader: Leader | None = None
    """Of the devices that share that run, if they do."""

    def around(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None,
               *args, **kwargs):  # type: ignore[no-untyped-def]  # fmt: skip
        """The host's OUTER_SAMPLE: settles the run before any weights move, and logs what it will hold; puts given frames back as they were."""
        model = require_ours(executor.class_obj.model_patcher, NODE)
        require_one_model(executor.class_obj, NODE)
        require_plain_texts(executor.class_obj, NODE, noise.shape[2])
        require_steady_hooks(executor.class_obj, NODE)
        prefix, suffix = (0, 0) if denoise_mask is None else given_frames(denoise_mask)
        run = self.settled(executor.class_obj, noise, latent_image, sigmas, prefix, suffix, seed)
        logging.info(f"FlowCache: {model.size_of(noise.shape)}")
        states = states_of(self.save_every, executor.class_obj, model)
        with shared(run, executor.class_obj, model, states) as (mine, leader):
            logging.info(f"FlowCache: {mine.held.sentence()}")
            prompts = forecast_prompts(ChunkConds(executor.class_obj.conds).firsts, run.schedule)
            for line in (*prompts, *unread(executor.class_obj, model.family)):
                logging.info(f"FlowCache: {line}")
            with model.expecting(mine):
                settled = replace(self, run=mine, states=states, leader=leader)
                samples = executor(noise, latent_image, settled, sigmas, denoise_mask, callback, disable_pbar, seed, *args, **kwargs)
        keep_given(samples, latent_image, prefix, suffix)
        self.mailbox.sent(samples)
        return samples

    def settled(self, guider: Any, noise: torch.Tensor, latent_image: Any, sigmas: torch.Tensor, prefix: int, suffix: int, seed: int | None) -> Run:
        """Raises ValueError, with the way out, for a run that cannot be made."""
        model, options = require_ours(guider.model_patcher, NODE), guider.model_options
        self._require(noise, latent_image, sigmas)
        family, latent, fps = model.family, (noise.shape[1], *noise.shape[3:]), self.rate(model)
        if family.takes_rate(model.diffusion_model.config):
            family.require_rate(fps)
        elif fps != model.layout.fps:
            raise ValueError(
                f"{NODE}: fps {fps} would change nothing, this model has no frame-rate tensors "
                f"({family.release(model.diffusion_model.config)}): set fps to {model.layout.fps}"
            )
        if options.get("transformer_options", {}).get(START):
            raise ValueError(f"{NODE}: ARVideoI2V gives its start image to {SAMPLER} alone: use AR Video Frames In, or that sampler")
        if not clean_pass_of(options):
            raise ValueError(f"{NODE}: clean_pass of {KV_NODE} is for {SAMPLER}: set it to every chunk, or use that sampler")
        film = self.schedules(model, noise.shape[2], len(sigmas) - 1, prefix, suffix, options)
        require_prompts(guider, film)
        conds = conds_of(guider, family)
        adapter = model.adapter(model.dtype_of(guider.model_patcher))
        require_texts(conds, family, adapter, model.diffusion_model.config.text_dim)
        require_counting_texts(guider, conds, sigmas[:-1].tolist(), NODE)
        return Run(
            family, with_durations(adapter, conds), film, tuple(sigmas.tolist()), latent, place_of(guider, model, noise, film), policy_of(options),
            compressor_of(options), fps, self._light(family, prefix, seed), solver(self._solver(family)), scale_of(guider, family),
            frozenset(ChunkConds(guider.conds).recached),
        )  # fmt: skip

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):  # type: ignore[no-untyped-def]
        model = require_ours(model_wrap.model_patcher, NODE)
        model.begun()
        prefix, suffix = (0, 0) if denoise_mask is None else given_frames(denoise_mask)
        run = self.run or self.settled(model_wrap, noise, latent_image, sigmas, prefix, suffix, extra_args.get("seed"))
        x = model.model_sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))
        keep_given(x, latent_image, prefix, suffix)
        extra_args = alone(extra_args) if model.family.guidance.inside else extra_args
        options = extra_args["model_options"]["transformer_options"]
        options[BASE] = blocks_of(options)
        texts = ChunkConds(model_wrap.conds)

        def of_chunk(executor, network, conds, x, *args):  # type: ignore[no-untyped-def]
            turn = options[TURN]
            return executor(network, texts.only(turn.names, conds, turn.start, x.shape[2]), x, *args)

        comfy.patcher_extension.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, TURN, of_chunk, extra_args["model_options"], is_model_options=True
        )

        evaluate = Guidance.of(model_wrap, extra_args, texts, sigmas, run.sigmas, run.place.alike)

        def clean(part: torch.Tensor) -> torch.Tensor:
            return model.process_latent_out(model.model_sampling.inverse_noise_scaling(sigmas[-1], part).float())

        preview = None if self.vae is None else FilmPreview(self.vae, clean, self.fps)
        progress = Progress(x, run, self.node, callback, disable_pbar, preview)
        try:
            with progress:
                samples, report = (self.leader or run).sample(x, evaluate, progress, self.states)
        finally:
            evaluate.end()
            options.pop(BASE, None)
        self.mailbox.put(report, progress.end(report))
        say([report.summary()])
        return model.model_sampling.inverse_noise_scaling(sigmas[-1], samples)

    def schedules(self, model: HostModel, frames: int, steps: int, prefix: int, suffix: int, model_options: dict[str, Any]) -> Film:
        """Raises ValueError, with the way out, for a film that these settings cannot make."""
        layout, pixels = model.layout, model.family.frames
        chunk, window = self.chunk_frames or layout.chunk_frames, self.window or layout.window
        model.family.require_chunk(chunk, layout)
        causal = layout.causal if self.attention == AUTO else self.attention == CAUSAL
        ar_step = model.family.published.stagger(steps) if self.ar_step < 0 else self.ar_step
        if causal:
            return ChunkSchedule(frames, chunk, steps, ar_step, window, prefix, suffix, pixels, layout.aligned, layout.profile)
        self._require_whole_rows(model_options)
        length = pixels.latent(self.window_frames) if self.window_frames else chunk * window
        return sections_of(frames, chunk, steps, ar_step, length, pixels.latent(self.overlap_history), prefix, suffix, pixels)

    def rate(self, model: HostModel) -> int:
        """Frames per second that the network is told, and by which seconds are counted."""
        return self.fps or model.layout.fps

    def _solver(self, family: Family) -> str:
        return family.published.solver if self.solver == PUBLISHED else self.solver

    def _light(self, family: Family, prefix: int, seed: int | None) -> GivenNoise:
        """Noise on given first frames. Raises ValueError where the network was trained with clean ones."""
        published, level = family.published.given_noise, self.addnoise_condition
        if prefix and level > 0 and not published:
            raise ValueError(
                f"{NODE}: addnoise_condition {level} lays noise on the {prefix} given latent frames, and {family.title} was trained with clean ones: "
                "set it to 0, or to -1, which is as published"
            )
        return GivenNoise(published if level < 0 else level, seed or 0)

    def _require_whole_rows(self, model_options: dict[str, Any]) -> None:
        """Raises ValueError for settings on the MODEL that bidirectional attention cannot serve."""
        policy, compressor = policy_of(model_options), compressor_of(model_options)
        decides = policy is not None and not isinstance(policy, SectionPolicy)
        nodes = " and ".join(filter(None, [policy_node(model_options) if decides else "", KV_NODE if compressor else ""]))
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


def require_prompts(guider: Any, film: Film) -> None:
    """Raises ValueError for a prompt schedule that the film has no chunks for, or that asks for more than this sampler does."""
    texts = ChunkConds(guider.conds)
    if not any(texts.firsts):
        return
    if not isinstance(film, ChunkSchedule):
        raise ValueError(
            f"{PROMPTS_NODE} has a prompt for every chunk, and with attention {BIDIRECTIONAL} all chunks of a section are evaluated at once: set "
            f"attention of {NODE} to {CAUSAL}, or use one prompt"
        )
    require_chunks(texts.firsts, film)


def keep_given(samples: torch.Tensor, source: torch.Tensor, prefix: int, suffix: int) -> None:
    """Puts given latent frames of `source` into `samples`, in place."""
    end = samples.shape[2] - suffix
    samples[:, :, :prefix] = source[:, :, :prefix].to(samples)
    samples[:, :, end:] = source[:, :, end:].to(samples)
