"""Compare Runs."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..flowcache_core.show.compare import Spent, closeness, difference_film
from .within import within_schema


class CompareRuns(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheCompare",
            display_name="Compare Runs",
            category="FlowCache",
            description="How close a film is to a reference: PSNR, SSIM and LPIPS, frame by frame, with the seconds of both runs beside it.",
            search_aliases=["psnr", "ssim", "lpips", "difference", "benchmark"],
            is_output_node=True,
            inputs=[
                io.Image.Input("film", tooltip="The film that is judged, such as the cached one."),
                io.Image.Input("reference", tooltip="The film that it should be like, such as the uncached one of the same prompt and seed."),
                io.String.Input("name", default="film", tooltip="What the film is called in text and picture."),
                io.Float.Input("difference", default=4.0, min=0.1, max=100.0, step=0.1, tooltip="How much the difference of the two is amplified."),
                io.String.Input("film_report", optional=True, force_input=True,
                                tooltip="The json output of the Cache Report of the film's run: adds its seconds."),
                io.String.Input("reference_report", optional=True, force_input=True,
                                tooltip="The json output of the Cache Report of the reference's run: adds its seconds, and the speed-up."),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="One paragraph: closeness, the furthest frame, and the seconds of both runs."),
                io.Image.Output(display_name="curve", tooltip="PSNR and SSIM over the frames."),
                io.Image.Output(display_name="side by side", tooltip="Film, reference, and their amplified difference."),
                io.String.Output(display_name="json", tooltip="All numbers, those of every frame too, for scripts."),
            ],
        )  # fmt: skip

    @classmethod
    @within_schema
    def execute(cls, film: torch.Tensor, reference: torch.Tensor, name: str, difference: float,
                film_report: str = "", reference_report: str = "") -> io.NodeOutput:  # fmt: skip
        runs = Spent.of(film_report, "film_report"), Spent.of(reference_report, "reference_report")
        a, b = film[..., :3].cpu(), reference[..., :3].cpu()
        close = closeness(a, b)
        text, curve = close.text(name, *runs), _image(close.curve()[None])
        shown = {**ui.PreviewImage(curve, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(text, curve, _image(difference_film(a, b, difference, name)), close.as_json(name, *runs), ui=shown)


def _image(frames: np.ndarray) -> torch.Tensor:
    """uint8 [T, H, W, 3] -> IMAGE."""
    return torch.from_numpy(frames.astype(np.float32) / 255)
