"""Cache Report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..flowcache_core.show.plot import chunk_map, history_map
from ..flowcache_core.show.report_file import KINDS, write_report
from .mailbox import Kept, Mailbox
from .output_files import place_of
from .sampler import Report
from .within import within_schema

NO_FILE = "none"


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
                io.Combo.Input("save", options=[NO_FILE, *KINDS], default=NO_FILE, optional=True,
                               tooltip="Also writes a file: json as the output json, csv a line per chunk and step, png the map. none: no file."),
                io.String.Input("filename_prefix", default="flowcache/report", optional=True, advanced=True,
                                tooltip="For save: a folder and a name in the output folder, as in Save Image."),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="What this node shows."),
                io.String.Output(display_name="json", tooltip="The same and more for scripts; its plan fits the input plan of Chunkwise Cache."),
                io.Image.Output(display_name="map", tooltip="A line per chunk, a column per step: computed, in part, reused or skipped."),
                io.Image.Output(display_name="history", tooltip="Which places of the history KV Compressor kept."),
            ],
        )  # fmt: skip

    @classmethod
    @within_schema
    def execute(cls, report: Mailbox, latent: dict[str, torch.Tensor], save: str = NO_FILE,
                filename_prefix: str = "flowcache/report") -> io.NodeOutput:  # fmt: skip
        run = report.of(latent["samples"])
        done = run.report
        steps, history = (torch.from_numpy(np.asarray(draw(done), np.float32) / 255)[None] for draw in (chunk_map, history_map))
        text = done.text()
        file = "" if save == NO_FILE else f"\nwritten: {_write(run, save, filename_prefix)}"
        shown = {**ui.PreviewImage(steps, cls=cls).as_dict(), **ui.PreviewText(text + file).as_dict(), "flowcache": [json.dumps(run.panel)]}
        if done.history.frames:
            shown["images"] = [*shown["images"], *ui.PreviewImage(history, cls=cls).as_dict()["images"]]
        return io.NodeOutput(text, json.dumps({**done.as_dict(), "run": run.number}), steps, history, ui=shown)


def _write(run: Kept, kind: str, prefix: str) -> str:
    """The report as a file of the output folder -> its name there."""
    folder, name, subfolder = place_of(prefix, "Cache Report")
    file = f"{name}.{kind}"
    write_report(folder / file, run.report, run=run.number)
    return str(Path(subfolder, file))
