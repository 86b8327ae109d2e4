"""What is seen in a film of sprites: on true clips nearly all of it is right, and a wrong film is seen to be wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowcache_core.models.bundle import load_bundle
from flowcache_core.run.generate import Job
from flowcache_core.training.evaluate import SEEN_AGAIN, hidden
from flowcache_core.training.measures import Tally, blobs, came_out, colour_masks, number_of, score, shape_of, unit_area
from flowcache_core.training.scenes import COLOURS, SHAPES, Scene, Sprite, hidden_scene, make_scene, render

FRAMES = 21


def standing(*sprites: Sprite) -> Scene:
    return Scene(64, FRAMES, 3, sprites, (0.0, 0.0), "", None)


def sprite(colour: str, shape: str, x: float, y: float = 32.0, radius: float = 10.0) -> Sprite:
    return Sprite(colour, shape, radius, x, y, 0.0, 0.0, "stands still")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [6.0, 10.0, 18.0])
def test_a_shape_is_told_from_the_others(shape: str, radius: float) -> None:
    mask = colour_masks(render(standing(sprite("red", shape, 31.3, 30.2, radius))))["red"]
    assert shape_of(mask) == shape
    assert float(mask[0].sum()) == pytest.approx(unit_area(shape) * radius**2, rel=0.2)


def test_what_is_not_there_has_no_shape() -> None:
    assert shape_of(torch.zeros(4, 16, 16, dtype=torch.bool)) == ""


def test_regions_are_counted_in_every_frame_and_specks_are_not() -> None:
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0, 2:10, 2:10] = mask[0, 20:28, 2:10] = mask[1, 2:28, 2:5] = mask[1, 25:28, 2:28] = True
    mask[1, 2, 20:30] = True
    assert blobs(mask).tolist() == [2, 1]


def test_a_second_sprite_of_a_colour_is_one_too_many() -> None:
    right, tally = standing(sprite("red", "circle", 16), sprite("cyan", "square", 48)), Tally()
    double = replace(right, sprites=(*right.sprites, sprite("red", "circle", 44, 10, 8)))
    masks = colour_masks(render(right)), colour_masks(render(double))
    assert [number_of(one) for one in masks] == [2, 3]
    score(render(double), right, 4, tally)
    assert (tally.films, tally.number_right, tally.sprites, tally.colour_present) == (1, 0, 2, 2)


def test_true_clips_are_right_and_those_of_other_prompts_are_not() -> None:
    true, other = Tally(), Tally()
    for number in range(8):
        scene, film = make_scene(number), render(make_scene(number))
        score(film, scene, 12, true)
        score(film, make_scene(number + 8), 12, other)
    figures = true.figures()
    assert (figures["colour_present"], figures["direction_right"]) == (1.0, 1.0)
    assert min(figures["shape_right"], figures["number_right"]) >= 0.8
    assert figures["background_drift_levels"] < 1
    assert max(other.figures()[name] for name in ("colour_present", "direction_right", "shape_right", "number_right")) < 0.6


def test_films_go_on_from_a_hidden_sprite_with_history_and_without() -> None:
    bundle = load_bundle()
    found = hidden(bundle, Job("", steps=2), clips=1)
    assert found.keys() == {"whole", "none", "ceiling"}
    assert found["ceiling"] == 1


def test_what_was_hidden_is_seen_where_it_comes_out_and_not_elsewhere() -> None:
    for seed in range(6):
        scene = hidden_scene(seed)
        film, (sprite,) = render(scene, frames=SEEN_AGAIN), scene.sprites
        assert came_out(film, scene)
        other = next(colour for colour in COLOURS if colour != sprite.colour)
        for wrong in (replace(sprite, colour=other), replace(sprite, y=128 - sprite.y if abs(sprite.y - 64) > 8 else 20.0), replace(sprite, vx=0.2)):
            assert not came_out(render(replace(scene, sprites=(wrong,)), frames=SEEN_AGAIN), scene)
