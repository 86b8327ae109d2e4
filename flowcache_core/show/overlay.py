"""Where the network ran, shown on the film itself."""

from __future__ import annotations

import numpy as np

from ..models.wan_vae import TEMPORAL, pixel_frames
from ..run.report import COMPUTED
from .plot import REUSED_SHADE, SHADES


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
