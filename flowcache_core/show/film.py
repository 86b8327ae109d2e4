"""Films as files: frames of a tensor, an mp4, several films side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .plot import INK, PAPER, font


def frames_of(film: Tensor) -> np.ndarray:
    """[T, 3, H, W] in 0..1 -> uint8 [T, H, W, 3]."""
    return (film.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def write_film(path: Path, frames: np.ndarray, fps: int = 24) -> None:
    """uint8 [T, H, W, 3] -> H.264 mp4. Written beside its place and moved there, so no half film is left behind."""
    partial = path.with_name(f".{path.name}.partial.mp4")
    try:
        iio.imwrite(partial, frames, plugin="pyav", codec="libx264", fps=fps, out_pixel_format="yuv420p")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def side_by_side(films: Mapping[str, np.ndarray], scale: int = 2) -> np.ndarray:
    """Named films uint8 [T, H, W, 3] -> one film [T, H', W', 3] with a caption over each."""
    panels = []
    for name, frames in films.items():
        big = frames.repeat(scale, 1).repeat(scale, 2)
        strip = Image.new("RGB", (big.shape[2], 24), PAPER)
        ImageDraw.Draw(strip).text((6, 4), name, INK, font())
        panels.append(np.concatenate([np.broadcast_to(np.asarray(strip), (len(big), *np.asarray(strip).shape)), big], 1))
    return np.concatenate(panels, 2)
