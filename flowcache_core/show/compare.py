"""Two films beside each other: how close, frame by frame, and what the runs that made them took. How they were made is unknown here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..untrusted import parsed, short
from .film import frames_of, side_by_side
from .metrics import decibels, perceptual, squared_error, ssim, without_perceptual
from .plot import line_plot

SMALLEST = 11
"""Pixels: the window of SSIM."""
WIDE = 256
"""Pixels above which films stand side by side in their own size; smaller ones are doubled."""


@dataclass(frozen=True)
class Spent:
    """What a run took, as its report says."""

    seconds: float
    tokens: int
    """Tokens that the network computed."""

    @classmethod
    def of(cls, report: str, which: str) -> Spent | None:
        """The JSON of Cache Report -> what the run took; None of an empty text. Raises ValueError for a text that is no report; `which`
        names it."""
        if not report.strip():
            return None
        try:
            values = parsed(report)
        except ValueError as error:
            raise ValueError(f"{which} is not the json of Cache Report: {error}") from None
        if not isinstance(values, dict) or not all(_counts(values.get(key)) for key in ("wall_s", "tokens_computed")):
            raise ValueError(f"{which} is not the json of Cache Report: it has no wall_s and tokens_computed above 0 ({short(report, 60)})")
        return cls(float(values["wall_s"]), int(values["tokens_computed"]))


def _counts(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


@dataclass(frozen=True)
class Closeness:
    """How close a film is to its reference. LPIPS is None where it cannot be measured."""

    frames: int
    height: int
    width: int
    equal: bool
    """In every pixel."""
    psnr: float
    """Of the whole film, in dB; 100 at most."""
    ssim: float
    lpips: float | None
    psnr_of_frames: tuple[float, ...]
    ssim_of_frames: tuple[float, ...]

    def curve(self) -> np.ndarray:
        """-> uint8 [H, W, 3]: PSNR above, SSIM below, over the frames of the film."""
        plots = ((self.psnr_of_frames, "PSNR to the reference, dB"), (self.ssim_of_frames, "SSIM to the reference"))
        return np.concatenate([np.asarray(line_plot({"": list(enumerate(line, 1))}, "frame", label)) for line, label in plots])

    def text(self, name: str, film: Spent | None, reference: Spent | None) -> str:
        """One paragraph: closeness, the nearest and furthest frame, and what the two runs took as far as it is known."""
        return " ".join((*self._closeness(name), *([] if self.lpips is not None else [without_perceptual()]), *_effort(film, reference)))

    def _closeness(self, name: str) -> list[str]:
        size = f"{self.frames} frames of {self.width} x {self.height}"
        if self.equal:
            return [f"{name} is equal to the reference in every pixel of {size}."]
        lpips = "" if self.lpips is None else f", LPIPS {self.lpips:.4f}"
        near, far = (pick(range(self.frames), key=self.psnr_of_frames.__getitem__) for pick in (max, min))
        return [
            f"{name} against the reference: PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.4f}{lpips}, over {size}.",
            f"The nearest frame is {near + 1} ({self.psnr_of_frames[near]:.1f} dB), the furthest {far + 1} ({self.psnr_of_frames[far]:.1f} dB).",
        ]

    def as_json(self, name: str, film: Spent | None, reference: Spent | None) -> str:
        """Numbers for scripts; `film` and `reference` are null where no report was given, `speedup` where one is missing."""
        both = film and reference and {"speedup": film_speed(film, reference), "token_share": film.tokens / reference.tokens}
        runs = {key: run and asdict(run) for key, run in (("film", film), ("reference", reference))}
        return json.dumps({"name": name, **asdict(self), **runs, **(both or {"speedup": None, "token_share": None})})


def film_speed(film: Spent, reference: Spent) -> float:
    """How many times as fast as the reference the film was made."""
    return reference.seconds / film.seconds


def _effort(film: Spent | None, reference: Spent | None) -> list[str]:
    if film and reference:
        speed, share = film_speed(film, reference), film.tokens / reference.tokens
        return [f"It took {film.seconds:.1f} s and the reference {reference.seconds:.1f} s: {speed:.2f} times as fast, "
                f"with {share:.1%} of the reference's network tokens."]  # fmt: skip
    return [f"{which} took {run.seconds:.1f} s." for which, run in (("It", film), ("The reference", reference)) if run]


def closeness(film: Tensor, reference: Tensor) -> Closeness:
    """Two films [T, H, W, 3] in 0..1, measured a frame at a time.

    Raises ValueError for films of unequal length or size, of less than 11 x 11 pixels, and with values that are no numbers.
    """
    if film.shape != reference.shape:
        raise ValueError(f"the film is {_size(film)} and the reference {_size(reference)}: compare films of the same length and size")
    frames, height, width, _ = film.shape
    if min(height, width) < SMALLEST:
        raise ValueError(f"the films are {_size(film)}: SSIM needs {SMALLEST} x {SMALLEST} pixels at least")
    errors, likeness, distances = [], [], []
    for a, b in zip(_planes(film), _planes(reference), strict=True):
        errors.append(squared_error(a, b))
        likeness.append(ssim(a, b))
        distances.append(perceptual(a, b))
    if wrong := [t + 1 for t, error in enumerate(errors) if not math.isfinite(error)]:
        raise ValueError(f"{len(wrong)} of {frames} frames, frame {wrong[0]} first, have values that are no numbers in the film or the reference")
    lpips = [d for d in distances if d is not None]
    return Closeness(frames, height, width, not any(errors), decibels(_mean(errors)), _mean(likeness), _mean(lpips) if lpips else None,
                     tuple(map(decibels, errors)), tuple(likeness))  # fmt: skip


def difference_film(film: Tensor, reference: Tensor, gain: float, name: str) -> np.ndarray:
    """Two films [T, H, W, 3] in 0..1 -> uint8 [T, H', W', 3]: the film, the reference, and their absolute difference times `gain`."""
    apart = (film - reference).abs() * gain
    films = {name: film, "reference": reference, f"difference x {gain:g}": apart}
    return side_by_side({caption: frames_of(one.movedim(-1, 1)) for caption, one in films.items()}, 1 if film.shape[2] > WIDE else 2)


def _planes(film: Tensor) -> Sequence[Tensor]:
    """[T, H, W, 3] -> T times [1, 3, H, W]."""
    return film.movedim(-1, 1).split(1)


def _size(film: Tensor) -> str:
    return f"{film.shape[0]} frames of {film.shape[2]} x {film.shape[1]}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
