"""AR Video Frames In: first frames, last frame and clips as given latents with a stock noise mask."""

from __future__ import annotations

from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..flowcache_core.models.family import Family
from ..flowcache_core.sampling.frames import Frames
from ..flowcache_core.sampling.schedule import ChunkSchedule
from .fit import require_film, require_ours
from .kind import require_kind, require_vae
from .shown_text import SHOWS_TEXT
from .within import within_schema

NODE = "AR Video Frames In"


class ARVideoFramesIn(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheConditionFrames",
            display_name=NODE,
            category="FlowCache",
            **SHOWS_TEXT,
            description="Gives a film its first frames (an image, or a clip to go on from) and its last one. They are kept exactly.",
            search_aliases=["image to video", "i2v", "extend video", "continue video", "first frame", "last frame", "end frame", "flowcache"],
            inputs=[
                io.Model.Input("model", tooltip="The model knows how many frames it can look at together."),
                io.Vae.Input("vae", tooltip="Encodes the images. The bundled model's own, or that of the checkpoint's family."),
                io.Latent.Input("latent", tooltip="From Empty AR Video Latent: the whole film, given frames included."),
                io.Image.Input("start", optional=True, tooltip="One image, or a clip: the film begins with it. Resized and cropped to the film."),
                io.Image.Input("end", optional=True, tooltip="The last frame of the film; of several images the last is taken."),
                io.Latent.Input("start_latent", optional=True, tooltip="Instead of start: latents to go on from, without decoding and encoding."),
                io.Int.Input("history", default=0, min=0, max=100000, step=1, optional=True,
                             tooltip="How many frames at the end of the clip are given: 17 as published. 0: all of it."),
            ],
            outputs=[
                io.Latent.Output(tooltip="With a noise mask: 0 keeps a latent frame, 1 generates it."),
                io.Int.Output(display_name="given_frames", tooltip="Frames given at the start: cut them off where the film is joined to its clip."),
            ],
        )  # fmt: skip

    @classmethod
    @within_schema
    def execute(cls, model, vae, latent, start=None, end=None, start_latent=None, history=0) -> io.NodeOutput:  # type: ignore[no-untyped-def]
        mine = require_ours(model, NODE)
        layout, pixels = mine.layout, mine.family.frames
        samples = latent["samples"]
        if samples.ndim != 5:
            raise ValueError(
                f"{NODE} needs a video latent [batch, channels, frames, height, width], got {tuple(samples.shape)}: use Empty AR Video Latent"
            )
        if latent.get("noise_mask") is not None:
            raise ValueError(f"{NODE} makes the noise mask itself, and the latent already has one: connect the latent without it")
        if start is None and end is None and start_latent is None:
            raise ValueError(f"{NODE} was given nothing: connect start, end or start_latent, or remove the node")
        if start is not None and start_latent is not None:
            raise ValueError(f"{NODE} was given both start and start_latent: connect one of the two")
        if start is not None:
            clip = last(start, history or len(start), pixels)
            prefix = pixels.latent(len(clip))
        else:
            prefix = 0 if start_latent is None else first_frames(start_latent["samples"], samples, history, pixels).shape[2]
        suffix = 0 if end is None else 1
        ChunkSchedule(samples.shape[2], layout.chunk_frames, 1, 1, layout.window, prefix, suffix, pixels, layout.aligned)
        require_film(mine, samples.shape[2], prefix, suffix)
        require_kind(latent, mine.family, NODE)
        if start is not None or end is not None:
            require_vae(vae, mine.family, NODE)
        if start_latent is not None:
            require_kind(start_latent, mine.family, NODE)

        out, mask = samples.clone(), samples.new_ones(samples.shape[0], 1, samples.shape[2], 1, 1)
        if start is not None:
            out[:, :, :prefix] = encode(vae, clip, samples, mine.family)
        elif start_latent is not None:
            out[:, :, :prefix] = first_frames(start_latent["samples"], samples, history, pixels).to(samples)
        if end is not None:
            out[:, :, -1:] = encode(vae, end[-1:], samples, mine.family)
        mask[:, :, :prefix], mask[:, :, samples.shape[2] - suffix :] = 0, 0
        given = pixels.pixel(prefix) if prefix else 0
        left = samples.shape[2] - prefix - suffix
        text = f"given: {given} frames ({prefix} latent) at the start, {suffix} at the end; to generate: {left} latent frames"
        return io.NodeOutput({**latent, "samples": out, "noise_mask": mask}, given, ui=ui.PreviewText(text))


def last(clip: torch.Tensor, frames: int, pixels: Frames) -> torch.Tensor:
    """The last frames of [T, H, W, 3] that fill whole latent frames, at most `frames`; a single image may fill one alone.

    Raises ValueError for a clip, or a part of it, that fills none.
    """
    if 1 < (some := min(frames, len(clip))) < pixels.first:
        raise ValueError(f"{NODE}: {some} frames do not fill a latent frame, which has {pixels.first}: give at least {pixels.first}, or one image")
    return clip[-pixels.pixel(pixels.latent(min(frames, len(clip)))) :]


def first_frames(given: torch.Tensor, film: torch.Tensor, history: int, pixels: Frames) -> torch.Tensor:
    """The last latent frames of `given`. Raises ValueError for latents of another size than the film's."""
    if given.ndim != 5 or given.shape[1] != film.shape[1] or given.shape[3:] != film.shape[3:] or given.shape[0] not in (1, film.shape[0]):
        raise ValueError(
            f"start_latent has shape {tuple(given.shape)} and the film {tuple(film.shape)}: batch, channels, height and width must agree"
        )
    return given[:, :, -pixels.latent(history) :] if history else given


def encode(vae: Any, images: torch.Tensor, film: torch.Tensor, family: Family) -> torch.Tensor:
    """[T, H, W, 3] that fill whole latent frames, at the film's size -> latents [1, C, F, h, w]."""
    height, width = film.shape[3] * family.latents.spatial, film.shape[4] * family.latents.spatial
    fitting = comfy.utils.common_upscale(images[..., :3].movedim(-1, 1), width, height, "bilinear", "center").movedim(1, -1)
    latents = vae.encode(fitting)
    if tuple(latents.shape[1:]) != (film.shape[1], family.frames.latent(len(images)), *film.shape[3:]):
        raise ValueError(
            f"the VAE made latents of shape {tuple(latents.shape)} from {len(images)} frames: use the VAE of {family.title}: {family.loaders.vae}"
        )
    return latents.to(film)
