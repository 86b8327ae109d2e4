"""Cache Report."""

from __future__ import annotations

import json

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..flowcache_core.show.plot import chunk_map, history_map
from .mailbox import Mailbox
from .sampler import Report
from .within import within_schema


class CacheReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheReport",
            display_name="Cache Report",
            category="FlowCache",
            description="What a run of AR Chunk Sampler computed and reused, as text, JSON and a chunk x step map, and what a budget kept.",
            is_output_node=True,
            inputs=[
                Report.Input("report", tooltip="The report output of AR Chunk Sampler."),
                io.Latent.Input("latent", tooltip="The sampled latent: the report is of the run that made it."),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="What this node shows."),
                io.String.Output(display_name="json", tooltip="The same and more for scripts; its plan fits the input plan of Chunkwise Cache."),
                io.Image.Output(display_name="map", tooltip="A line per chunk, a column per step: computed, in part, reused or skipped."),
                io.Image.Output(display_name="history", tooltip="Which places of the history KV Compressor kept."),
            ],
        )

    @classmethod
    @within_schema
    def execute(cls, report: Mailbox, latent: dict[str, torch.Tensor]) -> io.NodeOutput:
        run = report.of(latent["samples"])
        done = run.report
        steps, history = (torch.from_numpy(np.asarray(draw(done), np.float32) / 255)[None] for draw in (chunk_map, history_map))
        text = done.text()
        shown = {**ui.PreviewImage(steps, cls=cls).as_dict(), **ui.PreviewText(text).as_dict(), "flowcache": [json.dumps(run.panel)]}
        if done.history.frames:
            shown["images"] = [*shown["images"], *ui.PreviewImage(history, cls=cls).as_dict()["images"]]
        return io.NodeOutput(text, json.dumps({**done.as_dict(), "run": run.number}), steps, history, ui=shown)
