"""AR Chunk Sampler."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..flowcache_core.sampling.solvers import SOLVERS
from .chunk_sampler import AUTO, BIDIRECTIONAL, CAUSAL, PUBLISHED, ChunkSampler
from .mailbox import Mailbox
from .within import within_schema

Report = io.Custom("FLOWCACHE_REPORT")


class ARChunkSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheSampler",
            display_name="AR Chunk Sampler",
            not_idempotent=True,  # two equal nodes are two samplers, each with its own report
            category="FlowCache",
            description="Denoises a film chunk by chunk, from noise or from given frames. For SamplerCustomAdvanced.",
            search_aliases=["flowcache", "diffusion forcing", "skyreels", "image to video", "extend video", "long video"],
            inputs=[
                io.Combo.Input("solver", options=[*(kind.name for kind in SOLVERS), PUBLISHED], default=PUBLISHED,
                               tooltip="auto: as published, SkyReels-V2 with unipc, MAGI-1 with euler, few-step causal models with renoise."),
                io.Int.Input("ar_step", default=-1, min=-1, max=1000,
                             tooltip="How many rows a chunk starts after the one before it. -1: as published, 5 for SkyReels-V2, a quarter of the "
                                     "steps for MAGI-1, one after the other for few-step causal models. 0: all together. As many as steps: one "
                                     "after the other."),
                io.Int.Input("chunk_frames", default=0, min=0, max=64, advanced=True, tooltip="Latent frames per chunk. 0: as trained."),
                io.Int.Input("window", default=0, min=0, max=1000, advanced=True, tooltip="Chunks a chunk sees, itself included. 0: as trained."),
                io.Combo.Input("fps", options=["24", "16", PUBLISHED], default=PUBLISHED, advanced=True,
                               tooltip="Frame rate the network is told; SkyReels-V2 1.3B has learnt these two. auto: that of the model."),
                io.Combo.Input("attention", options=[AUTO, CAUSAL, BIDIRECTIONAL], optional=True,
                               tooltip="Block-causal: a chunk sees itself and the KV cache of earlier chunks, so idle chunks cost nothing and "
                                       "caching works; a model trained bidirectionally then sees less than it is used to and makes another film. "
                                       "Bidirectional: every frame of a section sees every other, and all of it runs in every row. "
                                       "Auto: as the model was trained; SkyReels-V2 checkpoints bidirectional, the bundled model block-causal."),
                io.Int.Input("window_frames", default=0, min=0, max=100000, optional=True, advanced=True,
                             tooltip="Bidirectional only: frames per section, 97 or 121 as published. 0: as trained."),
                io.Int.Input("overlap_history", default=17, min=1, max=1000, step=4, optional=True, advanced=True,
                             tooltip="Bidirectional only: the frames that a section takes over from the one before it. 17 as published."),
                io.Int.Input("addnoise_condition", default=-1, min=-1, max=999, optional=True, advanced=True,
                             tooltip="Light noise (timestep of 1000) on given first frames as the network sees them. -1: as published, 20 for "
                                     "SkyReels-V2, none for MAGI-1. 0: clean."),
                io.Int.Input("save_every", default=0, min=0, max=100000, optional=True, advanced=True,
                             tooltip="After so many finished chunks the state of the run is saved in output/flowcache_states. Stopped by whatever, "
                                     "the same film goes on from there when it is queued again. A state takes as much room as the KV cache. 0: off."),
                io.Vae.Input("vae", optional=True,
                             tooltip="Decodes finished chunks while the next ones run: the film so far plays under this node, in the page that "
                                     "queued it. The film stays the same; the run takes longer by the time of decoding, which the report tells."),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Sampler.Output(tooltip="For SamplerCustomAdvanced."),
                Report.Output(display_name="report", tooltip="For Cache Report: what the last run of this sampler did."),
            ],
        )  # fmt: skip

    @classmethod
    @within_schema
    def execute(cls, solver: str, ar_step: int, chunk_frames: int, window: int, fps: str, attention: str = AUTO, window_frames: int = 0,
                overlap_history: int = 17, addnoise_condition: int = 20, save_every: int = 0, vae: Any = None) -> io.NodeOutput:  # fmt: skip
        mailbox = Mailbox()
        sampler = ChunkSampler(solver, ar_step, chunk_frames, window, 0 if fps == PUBLISHED else int(fps), mailbox, cls.hidden.unique_id,
                               attention, window_frames, overlap_history, addnoise_condition, save_every, vae)  # fmt: skip
        return io.NodeOutput(sampler, mailbox)
