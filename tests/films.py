"""Films that tests made, read back."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def read_film(path: Path) -> np.ndarray:
    """uint8 [T, H, W, 3] of the first video stream."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
