"""Where the network ran, shown on the film itself."""

from __future__ import annotations

import numpy as np

from ..run.report import COMPUTED
from ..sampling.frames import FOUR_N_PLUS_1, Frames
from .plot import REUSED_SHADE, SHADES


def overlay(film: np.ndarray, visits: np.ndarray, steps: int, opacity: float = 0.5, pixels: Frames = FOUR_N_PLUS_1) -> tuple[np.ndarray, np.ndarray]:
    """How often each place was computed, laid over the film -> tinted film and grey mask, both float32 of the film's shape.

    film: [n * T, H, W, 3] in 0..1, n films of a batch one after the other; visits: [F, height, width] of tokens, at how many of the
    `steps` a token was computed. The tint goes from orange, where fewest were, to blue, where most were; the mask is
    visits / steps. `pixels`: how the model counts frames. Raises ValueError when the film is not that of F latent frames.
    """
    length = pixels.pixel(len(visits))
    if len(film) % length:
        raise ValueError(f"{len(film)} images are not whole films of {len(visits)} latent frames, {length} images each: connect the film of this run")
    spread = max(int(visits.max() - visits.min()), 1)
    often = ((visits - visits.min()) / spread)[..., None]
    few, most = (np.asarray(shade) / 255 for shade in (REUSED_SHADE, SHADES[COMPUTED]))
    tint, mask = (_over_film(part, film, pixels) for part in (few + often * (most - few), np.repeat((visits / steps)[..., None], 3, -1)))
    return film + np.float32(opacity) * (tint - film), mask


def _over_film(cells: np.ndarray, film: np.ndarray, pixels: Frames) -> np.ndarray:
    """[F, height, width, 3] -> the film's frames and size, nearest cell."""
    _, height, width, _ = film.shape
    frames = np.concatenate([cells[:1].repeat(pixels.first, 0), cells[1:].repeat(pixels.each, 0)])
    rows, columns = (np.arange(size) * count // size for size, count in ((height, cells.shape[1]), (width, cells.shape[2])))
    return np.tile(frames[:, rows][:, :, columns], (len(film) // len(frames), 1, 1, 1)).astype(np.float32)
