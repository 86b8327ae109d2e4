"""Empty AR Video Latent."""

from __future__ import annotations

import math

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..flowcache_core.run.footprint import readable
from .fit import require_film, require_ours
from .kind import kind_of
from .shown_text import SHOWS_TEXT
from .within import within_schema

LONG = 10
"""From so many windows on a film is called long."""
COPIES = 3
"""Of a film's latents that a run holds at the least: what it is given, the noise, and the film."""


class EmptyARVideoLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheLatent",
            display_name="Empty AR Video Latent",
            category="FlowCache",
            **SHOWS_TEXT,
            description="An empty video latent whose length is a whole number of the model's chunks.",
            inputs=[
                io.Model.Input("model", tooltip="The model knows how many latent frames make a chunk."),
                io.Int.Input("width", default=128, min=16, max=8192, step=16, tooltip="Pixels. The bundled model was trained at 128 x 128."),
                io.Int.Input("height", default=128, min=16, max=8192, step=16, tooltip="Pixels."),
                io.Float.Input("length", default=57, min=0.1, max=100000, step=0.1, tooltip="How long the film is, in the unit below."),
                io.Combo.Input("unit", options=["frames", "seconds"], tooltip="Whether length counts frames or seconds."),
                io.Combo.Input("snap", options=["nearest", "up", "down", "off"], advanced=True,
                               tooltip="Which whole number of chunks to take. Off allows a short last chunk."),
                io.Int.Input("batch_size", default=1, min=1, max=64, advanced=True, tooltip="Films denoised side by side."),
            ],
            outputs=[
                io.Latent.Output(tooltip="Zeros of the film's shape: for SamplerCustomAdvanced, or for AR Video Frames In."),
                io.Int.Output(display_name="frames", tooltip="The number of frames after snapping."),
                io.Float.Output(display_name="fps", tooltip="The frame rate of the model: connect it to Create Video."),
            ],
        )  # fmt: skip

    @classmethod
    @within_schema
    def execute(cls, model, width, height, length, unit, snap, batch_size) -> io.NodeOutput:  # type: ignore[no-untyped-def]
        mine = require_ours(model, "Empty AR Video Latent")
        layout, pixels, latent = mine.layout, mine.family.frames, mine.family.latents
        asked = max(1, round(length * layout.fps) if unit == "seconds" else round(length))
        below, above = pixels.nearest(asked, layout.chunk_frames)
        frames = {
            "nearest": below if asked - below <= above - asked else above,
            "up": below if below >= asked else above,
            "down": below,
            "off": pixels.pixel(pixels.latent(asked)),
        }[snap]
        latents = pixels.latent(frames)
        require_film(mine, latents)
        chunks = -(-latents // layout.chunk_frames)
        text = f"{frames} frames ({frames / layout.fps:.2f} s) = {latents} latent frames = {chunks} chunks of {layout.chunk_frames}"
        if frames != asked:
            text += f"; {asked} were asked for, {below} and {above} are the nearest whole chunks"
        if short := latents % layout.chunk_frames:
            text += f"; the last chunk has {short} latent frame{'s' * (short > 1)}, not {layout.chunk_frames} as in training"
        if latents > LONG * layout.chunk_frames * layout.window:
            seen = pixels.pixel(layout.chunk_frames * layout.window)
            text += f"; a long film: the model sees {seen} frames ({seen / layout.fps:.2f} s) at once, and this is {frames / seen:.0f} times as long"
            text += f"; if {length:g} frames were meant, set unit to frames" if unit == "seconds" else ""
        shape = (batch_size, latent.channels, latents, height // latent.spatial, width // latent.spatial)
        samples = torch.zeros(_within_memory(shape), device=comfy.model_management.intermediate_device())
        shown = {**ui.PreviewText(text).as_dict(), "fps": [layout.fps]}
        return io.NodeOutput({"samples": samples, **kind_of(mine.family)}, frames, float(layout.fps), ui=shown)


def _within_memory(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape itself. Raises ValueError for latents of float32 that cannot be sampled on this machine, whatever the model."""
    bytes_needed = COPIES * 4 * math.prod(shape)
    there = comfy.model_management.get_total_memory(comfy.model_management.intermediate_device())
    if bytes_needed > there:
        raise ValueError(
            f"Empty AR Video Latent: latents of shape {shape} and their noise take {readable(bytes_needed)}, and this machine has "
            f"{readable(there)} of memory: make the film shorter or smaller, or set unit to frames if length counts frames"
        )
    return shape
