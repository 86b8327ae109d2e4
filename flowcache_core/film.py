"""Films as files: frames of a tensor, an mp4, several films side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .models.wan_vae import TEMPORAL, pixel_frames
from .plot import INK, PAPER, REUSED_SHADE, SHADES, font
from .report import COMPUTED


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


def overlay(film: np.ndarray, visits: np.ndarray, steps: int, opacity: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """How often each place was computed, laid over the film -> tinted film and grey mask, both float32 of the film's shape.

    film: [n * T, H, W, 3] in 0..1, n films of a batch one after the other; visits: [F, rows, columns], at how many of the
    `steps` a token was computed. The tint goes from orange, where fewest were, to blue, where most were; the mask is
    visits / steps. Raises ValueError when the film is not that of F latent frames.
    """
    length = pixel_frames(len(visits))
    if len(film) % length:
        raise ValueError(f"{len(film)} images are not whole films of {len(visits)} latent frames, {length} images each: connect the film of this run")
    spread = max(int(visits.max() - visits.min()), 1)
    often = ((visits - visits.min()) / spread)[..., None]
    few, most = (np.asarray(shade) / 255 for shade in (REUSED_SHADE, SHADES[COMPUTED]))
    tint, mask = (_over_film(part, film, length) for part in (few + often * (most - few), np.repeat((visits / steps)[..., None], 3, -1)))
    return film + np.float32(opacity) * (tint - film), mask


def _over_film(cells: np.ndarray, film: np.ndarray, length: int) -> np.ndarray:
    """[F, rows, columns, 3] -> the film's frames and size, nearest cell; the first latent frame is one frame, the others four."""
    _, height, width, _ = film.shape
    frames = np.concatenate([cells[:1], cells[1:].repeat(TEMPORAL, 0)])
    rows, columns = (np.arange(size) * count // size for size, count in ((height, cells.shape[1]), (width, cells.shape[2])))
    return np.tile(frames[:, rows][:, :, columns], (len(film) // length, 1, 1, 1)).astype(np.float32)
