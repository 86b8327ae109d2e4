"""Two films beside each other."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flowcache_core.show import metrics
from flowcache_core.show.compare import Spent, closeness, difference_film
from flowcache_core.show.metrics import psnr, ssim

CACHED, UNCACHED = Spent(4.2, 101), Spent(11.9, 254)


@pytest.fixture
def films() -> tuple[Tensor, Tensor]:
    """A film and its reference, [5, 16, 24, 3]; the third frame is the furthest, the first the same."""
    reference = torch.rand(5, 16, 24, 3) * 0.8 + 0.1
    far = torch.tensor([0, 0.01, 0.1, 0.02, 0.01]).view(5, 1, 1, 1)
    return reference + far, reference


def test_of_the_whole_film_the_numbers_are_those_of_the_metrics(films: tuple[Tensor, Tensor]) -> None:
    close = closeness(*films)
    planes = [film.movedim(-1, 1) for film in films]
    assert close.psnr == pytest.approx(psnr(planes[0], planes[1]))
    assert close.ssim == pytest.approx(ssim(planes[0], planes[1]))
    assert close.psnr_of_frames == pytest.approx([100, 40, 20, 33.9794, 40], abs=1e-3)


def test_the_paragraph_names_the_furthest_frame_and_the_speed(films: tuple[Tensor, Tensor]) -> None:
    said = closeness(*films).text("cached", CACHED, UNCACHED)
    assert "cached against the reference: PSNR 26.7 dB" in said
    assert "5 frames of 24 x 16" in said
    assert "The nearest frame is 1 (100.0 dB), the furthest 3 (20.0 dB)." in said
    assert "It took 4.2 s and the reference 11.9 s: 2.83 times as fast, with 39.8% of the reference's network tokens." in said
    assert "\n" not in said


def test_of_one_report_only_its_seconds_are_said(films: tuple[Tensor, Tensor]) -> None:
    close = closeness(*films)
    assert "It took 4.2 s." in close.text("film", CACHED, None)
    assert "The reference took 11.9 s." in close.text("film", None, UNCACHED)
    assert "took" not in close.text("film", None, None)


def test_equal_films_are_said_to_be_equal(films: tuple[Tensor, Tensor]) -> None:
    close = closeness(films[1], films[1])
    assert close.psnr == 100
    assert close.text("cached", None, None).startswith("cached is equal to the reference in every pixel of 5 frames of 24 x 16.")


def test_no_frame_is_nearer_than_one_that_is_equal(films: tuple[Tensor, Tensor]) -> None:
    reference = films[1]
    close = closeness(reference + torch.tensor([1e-6, 0, 1e-6, 1e-6, 1e-3]).view(5, 1, 1, 1), reference)
    assert close.psnr_of_frames == pytest.approx([100, 100, 100, 100, 60], abs=0.01)
    rounded = closeness(reference + 1e-6, reference)
    assert (rounded.psnr, rounded.equal) == (100, False)
    assert rounded.text("film", None, None).startswith("film against the reference: PSNR 100.0 dB")


def test_the_json_has_every_frame_and_both_runs(films: tuple[Tensor, Tensor]) -> None:
    said = json.loads(closeness(*films).as_json("cached", CACHED, UNCACHED))
    assert said["name"] == "cached"
    assert len(said["psnr_of_frames"]) == len(said["ssim_of_frames"]) == 5
    assert said["speedup"] == pytest.approx(11.9 / 4.2)
    assert said["token_share"] == pytest.approx(101 / 254)
    assert said["film"] == {"seconds": 4.2, "tokens": 101}
    assert json.loads(closeness(*films).as_json("cached", CACHED, None))["speedup"] is None


def test_films_of_another_size_are_refused_with_both_sizes(films: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="the film is 4 frames of 24 x 16 and the reference 5 frames of 24 x 16: compare films of the same"):
        closeness(films[0][:4], films[1])
    with pytest.raises(ValueError, match="the films are 5 frames of 24 x 10: SSIM needs 11 x 11"):
        closeness(films[0][:, :10], films[1][:, :10])


def test_values_that_are_no_numbers_are_refused(films: tuple[Tensor, Tensor]) -> None:
    films[0][3, 2, 2, 1] = float("nan")
    with pytest.raises(ValueError, match="1 of 5 frames, frame 4 first, have values that are no numbers"):
        closeness(*films)


@pytest.mark.parametrize("report", ["{", "[]", '{"wall_s": 0, "tokens_computed": 5}', '{"wall_s": "4", "tokens_computed": 5}', '{"wall_s": true}'])
def test_what_is_no_report_is_refused_by_name(report: str) -> None:
    with pytest.raises(ValueError, match="film_report is not the json of Cache Report: "):
        Spent.of(report, "film_report")
    assert Spent.of(" ", "film_report") is None


def test_the_difference_is_amplified_and_cut(films: tuple[Tensor, Tensor]) -> None:
    shown = difference_film(*films, gain=4, name="cached")
    assert shown.shape == (5, 24 + 32, 3 * 48, 3)
    apart = shown[:, 24:, 96:].astype(int)
    assert (apart[0] == 0).all()
    assert (abs(apart[2] - 102) <= 1).all()
    assert difference_film(*films, gain=100, name="cached")[2, 24:, 96:].min() == 255


def test_the_curve_has_two_plots(films: tuple[Tensor, Tensor]) -> None:
    curve = closeness(*films).curve()
    assert curve.shape == (840, 640, 3)
    assert len({tuple(shade) for shade in curve[:420].reshape(-1, 3)} & {(38, 84, 164)}) == 1


def test_without_its_package_lpips_is_left_out_by_name(films: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    metrics._lpips.cache_clear()
    close = closeness(*films)
    assert close.lpips is None
    assert "LPIPS was left out: its package lpips is not installed" in close.text("film", None, None)
    metrics._lpips.cache_clear()


def test_with_its_package_but_no_weights_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "the weights of its AlexNet are not on this machine" in metrics.without_perceptual()


def test_lpips_is_the_mean_over_the_frames(films: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: the distance is the mean absolute difference of values in -1..1."""

    class Network:
        def __init__(self, net: str, verbose: bool) -> None: ...

        def eval(self) -> Network:
            return self

        def __call__(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).abs().mean((1, 2, 3))

    monkeypatch.setattr(metrics, "without_perceptual", lambda: "")
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Network))
    metrics._lpips.cache_clear()
    assert closeness(*films).lpips == pytest.approx(2 * (0.01 + 0.1 + 0.02 + 0.01) / 5, rel=1e-4)
    metrics._lpips.cache_clear()
