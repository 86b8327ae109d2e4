"""AR Chunk Sampler."""

from __future__ import annotations

from comfy_api.latest import io

from ..flowcache_core.solvers import SOLVERS
from .chunk_sampler import ChunkSampler, Mailbox

Report = io.Custom("FLOWCACHE_REPORT")


class ARChunkSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheSampler",
            display_name="AR Chunk Sampler",
            category="FlowCache",
            description="Denoises a film chunk by chunk; each chunk attends to the KV cache of the chunks before it. For SamplerCustomAdvanced.",
            inputs=[
                io.Combo.Input("solver", options=[kind.name for kind in SOLVERS], tooltip="unipc is what SkyReels-V2 was published with."),
                io.Int.Input("ar_step", default=5, min=0, max=1000,
                             tooltip="How many rows a chunk starts after the one before it. 0: all together. As many as steps: one after the other."),
                io.Int.Input("chunk_frames", default=0, min=0, max=64, advanced=True, tooltip="Latent frames per chunk. 0: as trained."),
                io.Int.Input("window", default=0, min=0, max=1000, advanced=True, tooltip="Chunks a chunk sees, itself included. 0: as trained."),
                io.Combo.Input("fps", options=["24", "16"], advanced=True, tooltip="Frame rate the network is told; it has learnt these two."),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Sampler.Output(), Report.Output(display_name="report", tooltip="For Cache Report: what the last run of this sampler did.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, solver: str, ar_step: int, chunk_frames: int, window: int, fps: str) -> io.NodeOutput:
        mailbox = Mailbox()
        return io.NodeOutput(ChunkSampler(solver, ar_step, chunk_frames, window, int(fps), mailbox, cls.hidden.unique_id), mailbox)
