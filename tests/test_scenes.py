"""Procedural video: what the caption says is what the film shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowcache_core.training.scenes import COLOURS, DIRECTIONS, HELD_OUT, Scene, Sprite, make_scene, motion_mask, render

SEEDS = range(HELD_OUT, HELD_OUT + 60)


def centroid(film: Tensor, colour: str) -> Tensor:
    """[T, 2]: x and y of the pixels that are this colour."""
    target = torch.tensor(COLOURS[colour]).view(1, 3, 1, 1) / 255
    near = (film - target).abs().amax(1) < 0.04
    where = torch.stack(torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="xy"), -1)
    return torch.stack([where[frame].mean(0) for frame in near])


def scenes(*verbs: str) -> list[Scene]:
    """Held-out scenes cut down to their first sprite, where that has one of these verbs; no camera, no bar."""
    found = [make_scene(seed) for seed in SEEDS]
    return [replace(s, sprites=s.sprites[:1], pan=(0.0, 0.0), pan_word="", occluder=None) for s in found if s.sprites[0].verb in verbs]


def test_the_same_seed_makes_the_same_film_and_another_seed_another() -> None:
    a, b, c = (render(make_scene(seed), 0, 3) for seed in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_part_of_a_film_equals_the_film_there() -> None:
    scene = make_scene(7, frames=13)
    film = render(scene)
    assert film.shape == (13, 3, 128, 128)
    assert 0 <= film.min() <= film.max() <= 1
    assert torch.equal(render(scene, 4, 5), film[4:9])


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_the_caption_names_every_sprite_and_only_these(seed: int) -> None:
    scene = make_scene(seed)
    words = scene.caption.replace(",", "").split()
    assert sorted(w for w in words if w in COLOURS) == sorted(s.colour for s in scene.sprites)
    assert all(s.clause in scene.caption for s in scene.sprites)
    assert ("camera pans" in scene.caption) == (scene.pan != (0.0, 0.0))
    assert ("grey bar" in scene.caption) == (scene.occluder is not None)


def test_nothing_moves_in_a_still_scene() -> None:
    still = [s for s in map(make_scene, SEEDS) if s.pan == (0.0, 0.0) and all(p.verb == "stands still" for p in s.sprites)]
    assert still
    for scene in still[:4]:
        assert not motion_mask(render(scene, 0, 9)).any()


def test_what_moves_is_marked_where_it_passes_and_nothing_else_is() -> None:
    sprite = Sprite("red", "circle", 12, 40, 64, 1.0, 0.0, "moves", "right")
    mask = motion_mask(render(Scene(128, 9, 1, (sprite,), (0.0, 0.0), "", None)))
    assert mask.shape == (3, 16, 16)
    assert not mask[0].any(), "the first latent frame is one pixel frame"
    assert mask[1:, 8, (40 + 12) // 8].all(), "the leading edge"
    rows, columns = mask.any(0).nonzero().T
    assert (rows.min() * 8, rows.max() * 8) >= (48, 72)
    assert rows.max() * 8 < 64 + 12 + 8
    assert columns.min() * 8 >= 24
    assert columns.max() * 8 < 40 + 8 + 12 + 8


def test_a_panning_camera_moves_the_background_and_a_resting_one_does_not() -> None:
    panning = replace(next(s for s in map(make_scene, SEEDS) if s.pan_word), sprites=())
    assert motion_mask(render(panning, 0, 9))[1:].any((1, 2)).all()
    assert not motion_mask(render(replace(panning, pan=(0.0, 0.0)), 0, 9)).any()


def test_moves_goes_one_way_out_and_in_again_on_the_other_side() -> None:
    moving = scenes("moves")
    assert len(moving) > 5
    returned = 0
    for scene in moving[:8]:
        sprite = scene.sprites[0]
        way = torch.tensor(DIRECTIONS[sprite.direction], dtype=torch.float32)
        path = centroid(torch.cat([render(scene, t, 1) for t in range(0, 480, 10)]), sprite.colour)
        steps = path[1:] - path[:-1]
        steps = steps[~steps.isnan().any(1)]
        ahead = steps @ way
        assert ((ahead > 0) | (ahead < -64)).all(), scene.caption
        assert (steps @ way.flip(0)).abs().max() < 16, scene.caption
        returned += int((ahead < -64).sum())
    assert returned > 2


@pytest.mark.parametrize(("verb", "stays"), [("moves", True), ("bounces", True), ("enters", True), ("leaves", False)])
def test_only_what_leaves_is_gone_after_a_minute(verb: str, stays: bool) -> None:
    for scene in scenes(verb)[:4]:
        target = torch.tensor(COLOURS[scene.sprites[0].colour]).view(1, 3, 1, 1) / 255
        late = render(replace(scene, late=1400), 0, 40)
        assert bool((late - target).abs().amax(1).lt(0.04).any()) == stays, scene.caption
        assert torch.equal(late[:2], render(scene, 1400, 2))


def test_no_sprite_begins_behind_a_bar_that_is_wider_than_sprites() -> None:
    bars = [scene for scene in map(make_scene, range(2000)) if scene.occluder]
    wide = [scene for scene in bars if scene.occluder[1] > 30]  # type: ignore[index]
    assert 0.05 < len(wide) / len(bars) < 0.4
    for scene in wide:
        left, width = scene.occluder or (0.0, 0.0)
        assert not any(left < sprite.x < left + width for sprite in scene.sprites)


def test_bounces_turns_round_at_the_border() -> None:
    for scene in scenes("bounces")[:3]:
        sprite = scene.sprites[0]
        path = centroid(render(scene)[::4], sprite.colour) @ torch.tensor(DIRECTIONS[sprite.direction], dtype=torch.float32)
        assert path[1] > path[0]
        assert path[-1] < path.max() - 2


def test_enters_starts_outside_and_leaves_ends_with_less() -> None:
    for verb in ("enters", "leaves"):
        for scene in scenes(verb)[:3]:
            target = torch.tensor(COLOURS[scene.sprites[0].colour]).view(1, 3, 1, 1) / 255
            first, last = ((render(scene, t, 1) - target).abs().amax(1).lt(0.04).sum() for t in (0, 56))
            assert (first == 0 and last > 0) if verb == "enters" else last < first, scene.caption


def test_slower_film_rates_show_the_same_way_in_fewer_frames() -> None:
    fast, slow = make_scene(HELD_OUT + 1, fps=24).sprites[0], make_scene(HELD_OUT + 1, fps=16).sprites[0]
    assert (slow.vx, slow.vy) == pytest.approx((fast.vx * 1.5, fast.vy * 1.5))
