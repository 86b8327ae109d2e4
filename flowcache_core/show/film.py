"""Films as files: frames of a tensor, an mp4, several films side by side."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from ..files import whole
from .plot import INK, PAPER, font

QUALITIES = (80, 50, 20)
"""Of a JPEG, the first that is small enough."""


def frames_of(film: Tensor) -> np.ndarray:
    """[T, 3, H, W] in 0..1 -> uint8 [T, H, W, 3]."""
    return (film.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def film_bytes(frames: np.ndarray, fps: int = 24) -> bytes:
    """uint8 [T, H, W, 3] -> an H.264 mp4. Made in memory: an encoder that cannot write does not close its file well."""
    made = BytesIO()
    with av.open(made, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    return made.getvalue()


def write_film(path: Path, frames: np.ndarray, fps: int = 24) -> None:
    """uint8 [T, H, W, 3] -> H.264 mp4, whole or not at all."""
    made = film_bytes(frames, fps)
    with whole(path) as partial:
        partial.write_bytes(made)


def write_picture(path: Path, picture: Image.Image, **more: Any) -> None:
    """Whole or not at all; `more`: as `Image.save` takes it."""
    with whole(path) as partial:
        picture.save(partial, **more)


def shrunk(film: Tensor, side: int) -> Tensor:
    """[T, H, W, 3] -> [T, 3, h, w], neither height nor width above `side`; smaller films stay as they are."""
    pictures = film.movedim(-1, 1)
    scale = min(1.0, side / max(pictures.shape[2:]))
    height, width = (max(1, round(length * scale)) for length in pictures.shape[2:])
    return pictures if scale == 1 else interpolate(pictures.float(), (height, width), mode="area")


def strip_of(frames: np.ndarray, most: int) -> bytes | None:
    """uint8 [T, H, W, 3] -> the frames beside one another, from left to right, as a JPEG of at most so many bytes; None where there is none."""
    picture = Image.fromarray(np.concatenate(list(frames), 1))
    for quality in QUALITIES:
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality)
        if file.tell() <= most:
            return file.getvalue()
    return None


def side_by_side(films: Mapping[str, np.ndarray], scale: int = 2) -> np.ndarray:
    """Named films uint8 [T, H, W, 3] -> one film [T, H', W', 3] with a caption over each."""
    panels = []
    for name, frames in films.items():
        big = frames.repeat(scale, 1).repeat(scale, 2)
        strip = Image.new("RGB", (big.shape[2], 24), PAPER)
        ImageDraw.Draw(strip).text((6, 4), name, INK, font())
        panels.append(np.concatenate([np.broadcast_to(np.asarray(strip), (len(big), *np.asarray(strip).shape)), big], 1))
    return np.concatenate(panels, 2)
