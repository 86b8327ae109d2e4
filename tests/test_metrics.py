"""Fidelity of one film to another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowcache_core.bench.prompts import PROMPTS, seed_of
from flowcache_core.show.metrics import psnr, ssim


@pytest.fixture
def film() -> Tensor:
    return torch.rand(3, 3, 24, 24) * 0.8 + 0.1


def test_psnr_of_a_known_error(film: Tensor) -> None:
    assert psnr(film + 0.1, film) == pytest.approx(20.0, abs=1e-4)
    assert psnr(film + 0.01, film) == pytest.approx(40.0, abs=1e-3)


def test_equal_films_are_perfect(film: Tensor) -> None:
    assert psnr(film, film) == 100.0
    assert ssim(film, film) == pytest.approx(1.0)


def test_both_are_symmetric(film: Tensor) -> None:
    other = (film + 0.1 * torch.randn_like(film)).clamp(0, 1)
    assert psnr(film, other) == pytest.approx(psnr(other, film))
    assert ssim(film, other) == pytest.approx(ssim(other, film))


def test_more_noise_is_worse(film: Tensor) -> None:
    noise = torch.randn_like(film)
    scores = [(psnr(film + s * noise, film), ssim(film + s * noise, film)) for s in (0.02, 0.1, 0.3)]
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[2][1] < scores[1][1] < scores[0][1] < 1


def test_ssim_of_constant_pictures_is_the_formula() -> None:
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    assert ssim(a, b) == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), abs=1e-3)


def test_bench_prompts_differ_and_so_do_their_seeds() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) == 16
    assert len({seed_of(i) for i in range(16)}) == 16
