"""Films as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flowcache_core.show.film import frames_of, side_by_side, write_film
from flowcache_core.show.overlay import overlay
from tests.films import read_film


def test_frames_are_rounded_and_clamped() -> None:
    film = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0]).view(5, 1, 1, 1).expand(5, 3, 2, 4)
    frames = frames_of(film)
    assert frames.shape == (5, 2, 4, 3)
    assert frames[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_film_comes_back_from_its_file(tmp_path: Path) -> None:
    frames = np.broadcast_to(np.linspace(30, 220, 5).astype(np.uint8)[:, None, None, None], (5, 32, 32, 3))
    write_film(tmp_path / "film.mp4", frames, 24)
    back = read_film(tmp_path / "film.mp4")
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).max() < 8
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_a_film_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 (which one depends on the system)
        write_film(tmp_path / "film.mp4", np.zeros((2, 32, 32, 3), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_films_stand_side_by_side_in_their_order() -> None:
    films = {"one": np.full((2, 8, 8, 3), 10, np.uint8), "two": np.full((2, 8, 8, 3), 200, np.uint8)}
    both = side_by_side(films, scale=2)
    assert both.shape == (2, 24 + 16, 32, 3)
    assert (both[:, 24:, :16] == 10).all()
    assert (both[:, 24:, 16:] == 200).all()


def test_an_overlay_is_bluest_where_most_was_computed_and_has_the_size_of_the_film() -> None:
    film = np.full((2 * 9, 16, 32, 3), 0.5, np.float32)
    visits = np.full((3, 2, 4), 5, np.int32)
    visits[1, 1, 3] = 20
    tinted, mask = overlay(film, visits, 20, 0.5)
    assert tinted.shape == mask.shape == film.shape
    assert tinted.dtype == mask.dtype == np.float32
    blue = tinted[..., 2] - tinted[..., 0]
    assert blue[1:5, 8:, 24:].min() > 0 > blue[5:9].max()
    assert blue[10:14, 8:, 24:].min() > 0, "the second film of the batch has the same tint"
    assert (mask[1:5, 8:, 24:] == 1).all()
    assert (mask[0] == 0.25).all()
    assert np.array_equal(overlay(film, visits, 20, 0.0)[0], film)


def test_an_overlay_over_another_film_is_refused() -> None:
    with pytest.raises(ValueError, match="8 images are not whole films of 3 latent frames, 9 images each: connect the film of this run"):
        overlay(np.zeros((8, 16, 16, 3), np.float32), np.zeros((3, 2, 2), np.int32), 20)
