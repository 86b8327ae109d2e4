"""Save AR Video."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import InputImpl, io, ui
from comfy_execution.graph_utils import ExecutionBlocker

from ..flowcache_core.show.film import frames_of
from ..flowcache_core.show.film_file import FilmFile
from .kind import require_vae_of
from .output_files import place_of
from .vae_pieces import OVERLAPS, frames_by, is_carried, is_tiled, pieces_of
from .within import within_schema

NODE = "Save AR Video"
IMAGES_AT_ONCE = 16
ABSENT = object()
NO_IMAGES = f"{NODE} gives images only where its images_out is on: it is off, so that a long film needs no memory"


class SaveARVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheSaveVideo",
            display_name=NODE,
            category="FlowCache",
            description="Decodes a film piece by piece straight into an mp4: memory does not grow with its length, and what was written plays "
            "even if the run is stopped.",
            search_aliases=["save video", "stream", "mp4", "decode", "video combine"],
            is_output_node=True,
            inputs=[
                io.String.Input("filename_prefix", default="video/flowcache", tooltip="As in Save Video: a folder and a name in the output folder."),
                io.Float.Input("fps", default=24.0, min=0.01, max=1000.0, step=0.01,
                               tooltip="Frames per second: connect the fps output of Empty AR Video Latent."),
                io.Int.Input("crf", default=19, min=0, max=51, tooltip="Quality of H.264: less is better and larger; 0 is lossless but for colour."),
                io.Boolean.Input("images_out", default=False,
                                 tooltip="Also give the whole film as images, for other nodes. It then needs memory for all of it."),
                io.Latent.Input("samples", optional=True, tooltip="The sampled film, with vae; or connect images."),
                io.Vae.Input("vae", optional=True, tooltip="Decodes samples. The bundled model's own, or that of the checkpoint's family."),
                io.Image.Input("images", optional=True, tooltip="A decoded film, in place of samples and vae."),
                io.String.Input("report", optional=True, force_input=True,
                                tooltip="The json output of Cache Report: is written into the file, beside workflow and prompt."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            outputs=[
                io.Video.Output(is_output_list=True, tooltip="The saved film; of a batch, every film."),
                io.Image.Output(tooltip="The decoded film, where images_out is on."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, filename_prefix: Any, samples: Any = ABSENT, vae: Any = ABSENT, images: Any = ABSENT) -> bool | str:
        """`filename_prefix` is named for the host, which reports what is wrong beside an input that there is."""
        return _wrong(*(one is not ABSENT for one in (samples, vae, images))) or True

    @classmethod
    @within_schema
    def execute(cls, filename_prefix: str, fps: float, crf: int, images_out: bool, samples: dict[str, torch.Tensor] | None = None,
                vae: Any = None, images: torch.Tensor | None = None, report: str = "") -> io.NodeOutput:  # fmt: skip
        if wrong := _wrong(*(one is not None for one in (samples, vae, images))):
            raise ValueError(wrong)
        if samples is not None:
            require_vae_of(samples, vae, NODE)
        films = _decoded(samples["samples"], vae) if images is None else [images[..., :3].split(IMAGES_AT_ONCE)]
        total = len(images) if images is not None else frames_by(vae)(samples["samples"].shape[2]) * len(samples["samples"])
        bar, kept, saved, lines = comfy.utils.ProgressBar(total), [], [], []
        for film in films:
            result, text = _save(_watched(film, bar, kept if images_out else None), filename_prefix, fps, crf, _metadata(cls.hidden, report))
            saved.append(result)
            lines.append(text)
        if images is None and not (is_carried(vae) or is_tiled(vae)):
            lines.append(OVERLAPS)
        videos = [InputImpl.VideoFromFile(str(_path(result))) for result in saved]
        shown = {**ui.PreviewVideo(saved).as_dict(), **ui.PreviewText("\n".join(lines)).as_dict()}
        return io.NodeOutput(videos, torch.cat(kept) if images_out else ExecutionBlocker(NO_IMAGES), ui=shown)


def _wrong(samples: bool, vae: bool, images: bool) -> str:
    """What is wrong with the inputs that are connected; "" where nothing is."""
    if images and (samples or vae):
        return f"{NODE} takes samples with vae, or images, and both are connected: take one away"
    if not images and not (samples and vae):
        missing = " and ".join(name for name, there in (("samples", samples), ("vae", vae)) if not there)
        return f"{NODE} takes samples with vae, or images: connect {missing}, or images"
    return ""


def _decoded(samples: torch.Tensor, vae: Any) -> Iterator[Iterator[torch.Tensor]]:
    """Latents [B, C, F, h, w] -> the pieces of every film. Raises ValueError for latents of single images."""
    if samples.ndim != 5:
        raise ValueError(f"{NODE} takes latents of films, batch x channels x frames x height x width, and these have shape {tuple(samples.shape)}")
    return (pieces_of(vae, film) for film in samples.split(1))


def _watched(pieces: Any, bar: Any, kept: list[torch.Tensor] | None) -> Iterator[torch.Tensor]:
    """The pieces as they come, on the bar, and in `kept` where they are to be kept."""
    for piece in pieces:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(len(piece))
        if kept is not None:
            kept.append(piece)
        yield piece


def _save(pieces: Iterator[torch.Tensor], prefix: str, fps: float, crf: int, metadata: dict[str, str]) -> tuple[ui.SavedResult, str]:
    """Pieces [T, H, W, 3] in 0..1 -> the file, and what to say of it."""
    first = next(pieces)
    height, width = first.shape[1:3]
    folder, name, subfolder = place_of(prefix, NODE, width, height)
    path = folder / f"{name}.mp4"
    with FilmFile(path, (height, width), fps, crf, metadata) as file:
        for piece in chain([first], pieces):
            file.add(frames_of(piece.float().cpu().movedim(-1, 1)))
    text = f"{file.frames} frames of {width} x {height} ({file.frames / fps:.2f} s), {path.stat().st_size / 2**20:.2f} MiB: {path.name}"
    return ui.SavedResult(path.name, subfolder, io.FolderType.output), text


def _path(saved: ui.SavedResult) -> Path:
    return Path(folder_paths.get_output_directory()) / saved["subfolder"] / saved["filename"]


def _metadata(hidden: Any, report: str) -> dict[str, str]:
    """What Save Video of the host writes, workflow and prompt, and the report of the run."""
    if args.disable_metadata:
        return {}
    metadata = {**(hidden.extra_pnginfo or {}), **({"prompt": hidden.prompt} if hidden.prompt is not None else {})}
    return {key: json.dumps(value) for key, value in metadata.items()} | ({"flowcache_report": report} if report.strip() else {})
