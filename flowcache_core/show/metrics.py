"""Fidelity of one film to another: PSNR over the whole film, SSIM averaged over its frames, LPIPS where its package and weights are there."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def psnr(film: Tensor, reference: Tensor) -> float:
    """Two films [T, 3, H, W] in 0..1 -> dB, from the mean squared error of all pixels; 100 at most, which equal films have."""
    return decibels(squared_error(film, reference))


def squared_error(film: Tensor, reference: Tensor) -> float:
    """Two tensors of one shape -> the mean of their squared difference, summed in float64."""
    return float((film.double() - reference.double()).square().mean())


def decibels(error: float) -> float:
    """Mean squared error of values in 0..1 -> PSNR in dB; 100 at most, as where there is none: nothing is nearer than what is equal."""
    return 100.0 if error == 0 else min(float(-10 * torch.tensor(error).log10()), 100.0)


def ssim(film: Tensor, reference: Tensor) -> float:
    """Two films [T, 3, H, W] in 0..1 -> 0..1; Wang et al. 2004, Gaussian window of 11 pixels, sigma 1.5, per channel."""
    at = torch.arange(11, dtype=torch.float32) - 5
    line = torch.exp(-at.square() / (2 * 1.5**2))
    line = line / line.sum()
    kernel = torch.outer(line, line).expand(3, 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=3)

    a, b = film.float().cpu(), reference.float().cpu()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))
    return float(score.mean())


def perceptual(film: Tensor, reference: Tensor) -> float | None:
    """LPIPS (Zhang et al. 2018, AlexNet), mean over the frames; None where the lpips package or its weights are not installed."""
    network = _lpips()
    if network is None:
        return None
    with torch.inference_mode():
        return float(network(film.float().cpu() * 2 - 1, reference.float().cpu() * 2 - 1).mean())


def without_perceptual() -> str:
    """Why there is no LPIPS here, as a sentence; "" where there is."""
    if importlib.util.find_spec("lpips") is None:
        return "LPIPS was left out: its package lpips is not installed (pip install lpips)."
    if not list(Path(torch.hub.get_dir()).glob("checkpoints/alexnet-*.pth")):
        return "LPIPS was left out: the weights of its AlexNet are not on this machine; python -c 'import lpips; lpips.LPIPS()' fetches them."
    return ""


@lru_cache(maxsize=1)
def _lpips() -> Any:
    if without_perceptual():
        return None
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval()


def mean_and_error(values: Any) -> tuple[float, float | None]:
    """Of numbers, one a prompt: their mean, and its standard error (None of a single one)."""
    return round(float(np.mean(values)), 2), round(float(np.std(values, ddof=1)) / len(values) ** 0.5, 2) if len(values) > 1 else None
