"""AR Video Scheduler."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from .fit import require_ours
from .within import within_schema

NODE = "AR Video Scheduler"


class ARVideoScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheScheduler",
            display_name=NODE,
            category="FlowCache",
            description="The noise levels that a model was published with, exactly. For SamplerCustomAdvanced, in place of BasicScheduler.",
            search_aliases=["sigmas", "scheduler", "magi", "skyreels"],
            inputs=[
                io.Model.Input("model", tooltip="The model knows its noise levels."),
                io.Int.Input("steps", default=16, min=1, max=1000,
                             tooltip="SkyReels-V2: 30 to 50. MAGI-1: 64 (24B: 32). MAGI-1 distilled: 64, 32, 16, 8, or 12 of two lengths. "
                                     "Few-step causal models: 4 (CausVid: 3)."),
                io.Float.Input("shift", default=0.0, min=0.0, max=100.0, step=0.1, advanced=True,
                               tooltip="0: that of ModelSamplingSD3 where it is on the MODEL, otherwise as published: 8 for SkyReels-V2, 3 for "
                                     "MAGI-1, 5 for Self-Forcing (CausVid: 8). More spends more steps on strong noise."),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip="Below 1 a given film is changed only so far."),
            ],
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    @within_schema
    def execute(cls, model: Any, steps: int, shift: float, denoise: float) -> io.NodeOutput:
        noise = require_ours(model, NODE).family.noise
        patched = getattr(model.object_patches.get("model_sampling"), "shift", None)
        return io.NodeOutput(torch.tensor(noise.levels(steps, shift or patched or noise.shift, denoise)))
