"""Procedural video: sprites that move over a soft background, with a caption and the true motion mask.

Everything is drawn from a seed, so a data set is a range of integers. Shapes are signed distances with one pixel
of antialiasing, backgrounds are sums of long waves, and a panning camera moves both by sub-pixel steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 10_000_000
"""Seeds from here on are never trained on."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 220, 40),
    "magenta": (230, 50, 210),
    "cyan": (40, 215, 225),
    "orange": (245, 135, 25),
    "purple": (125, 45, 190),
}
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS: dict[str, tuple[float, float]] = {"slowly": (0.4, 0.6), "": (0.8, 1.1), "quickly": (1.3, 1.6)}
"""Pixels per frame at 24 frames per second, for a picture 128 pixels wide."""

RADII = (12.0, 20.0)
"""Pixels, for a picture 128 pixels wide."""
WIDEST = 1.1
"""No part of a shape is farther from its centre, in radii."""
WIDE_BARS = 0.4
"""Share of the bars that are wider than sprites, if none begins behind them."""


@dataclass(frozen=True, slots=True)
class Sprite:
    """One object. `x`, `y`: centre at frame 0; `vx`, `vy`: pixels per frame. At a border `verb` says what it does (`_path`)."""

    colour: str
    shape: str
    radius: float
    x: float
    y: float
    vx: float
    vy: float
    verb: str
    direction: str = ""
    pace: str = ""

    @property
    def clause(self) -> str:
        return " ".join(w for w in (self.colour, self.shape, self.verb, self.direction, self.pace) if w)


@dataclass(frozen=True, slots=True)
class Scene:
    """A clip before it is drawn. `pan`: camera velocity in pixels per frame; `occluder`: x, width of a grey bar or None; `late`: frames that have
    passed when it begins."""

    size: int
    frames: int
    seed: int
    sprites: tuple[Sprite, ...]
    pan: tuple[float, float]
    pan_word: str
    occluder: tuple[float, float] | None
    late: int = 0

    @property
    def caption(self) -> str:
        clauses = [s.clause for s in self.sprites]
        if self.pan_word:
            clauses.append(f"camera pans {self.pan_word}")
        if self.occluder:
            clauses.append("grey bar stands still")
        return ", ".join(clauses)


def _mover(rng: np.random.Generator, size: int, frames: int, colour: str, still: bool, hurry: float) -> Sprite:
    scale = size / 128
    radius = float(rng.uniform(*RADII)) * scale
    low, high = radius + 1, size - radius - 1
    shape = str(rng.choice(SHAPES))
    x, y = (float(rng.uniform(low, high)) for _ in range(2))
    kind = "stands" if still else str(rng.choice(["moves", "bounces", "enters", "leaves", "stands"], p=[0.56, 0.12, 0.1, 0.1, 0.12]))
    if kind == "stands":
        return Sprite(colour, shape, radius, x, y, 0.0, 0.0, "stands still")

    word = str(rng.choice(list(DIRECTIONS)))
    dx, dy = DIRECTIONS[word]
    pace = str(rng.choice(list(SPEEDS), p=[0.25, 0.5, 0.25]))
    if kind in ("bounces", "leaves", "enters") and pace == "slowly":
        pace = ""
    speed = float(rng.uniform(*SPEEDS[pace])) * scale * hurry
    way = speed * (frames - 1)
    forward = (dx + dy) > 0

    def along() -> float:
        """Where to start on the axis of motion so that the verb is true of the whole clip."""
        if kind == "moves":
            return float(rng.uniform(low, high))
        if kind == "bounces":
            hit = float(rng.uniform(0.35, 0.6)) * way
            return max(high - hit, low) if forward else min(low + hit, high)
        if kind == "leaves":
            out = float(rng.uniform(0.5, 0.9)) * way
            return size - out if forward else out
        depth = float(rng.uniform(0.05, 0.3)) * way
        return -radius - depth if forward else size + radius + depth

    if dx:
        x = along()
    else:
        y = along()
    return Sprite(colour, shape, radius, x, y, dx * speed, dy * speed, kind, word, pace)


def make_scene(seed: int, frames: int = 57, size: int = 128, fps: int = 24) -> Scene:
    """Draw a scene: one to three sprites; 12 % of the clips are still, 22 % pan, 12 % have a bar that hides what passes behind, some of it wholly.

    Verbs are true of its first `frames` frames, and of as many more as are drawn: what enters or leaves has done so by then.
    """
    rng = np.random.default_rng(seed)
    still = rng.random() < 0.12
    count = int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
    colours = rng.permutation(list(COLOURS))[:count]
    sprites = tuple(_mover(rng, size, frames, str(c), still, 24 / fps) for c in colours)
    pan, word = (0.0, 0.0), ""
    if not still and rng.random() < 0.22:
        word = str(rng.choice(list(DIRECTIONS)))
        speed = float(rng.uniform(0.4, 0.9)) * size / 128 * 24 / fps
        pan = (DIRECTIONS[word][0] * speed, DIRECTIONS[word][1] * speed)
    occluder = None
    if rng.random() < 0.12:
        left, width = float(rng.uniform(0.2, 0.65)) * size, float(rng.uniform(0.1, 0.18)) * size
        wide = float(rng.uniform(0.15, 0.5)) * size, float(rng.uniform(0.3, 0.45)) * size
        seen = all(not wide[0] < s.x < sum(wide) for s in sprites)
        occluder = wide if rng.random() < WIDE_BARS and seen else (left, width)
    return Scene(size, frames, seed, sprites, pan, word, occluder)


HIDDEN_CHUNK = 4
"""The chunk of three latent frames in which the hidden sprite comes out; the one before it does not show it at all."""


def hidden_scene(seed: int) -> Scene:
    """A sprite crosses the picture from left to right, for some two chunks wholly behind a bar; no word of it is in a prompt."""
    rng = np.random.default_rng(HELD_OUT + 900_000 + seed)
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    sprite = Sprite(colour, shape, 12.0, 16.0, float(rng.uniform(24, 104)), 1.3, 0.0, "moves", "right", "quickly")
    return Scene(128, 57, HELD_OUT + 900_000 + seed, (sprite,), (0.0, 0.0), "", (36.0, 56.0))


def outline(shape: str, dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    """Signed distance (approximate for the star) to the outline, negative inside. Same shape as `dx`."""
    if shape == "circle":
        return (dx * dx + dy * dy).sqrt() - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.86 * radius
    if shape == "triangle":
        return torch.maximum(0.866 * dx.abs() + 0.5 * -dy, dy) - 0.55 * radius
    angle = torch.atan2(dx, -dy)
    wave = 0.72 + 0.28 * torch.cos(5 * angle)
    return ((dx * dx + dy * dy).sqrt() - 1.1 * radius * wave) * 0.75


def _path(start: float, speed: float, sprite: Sprite, size: int, time: Tensor) -> Tensor:
    """Of the centre along one axis. What bounces turns round at a border; what moves, or has entered, goes out and comes in again on the other
    side, for ever; what leaves is gone."""
    where = start + speed * time
    if speed == 0 or sprite.verb == "leaves":
        return where
    if sprite.verb == "bounces":
        low, high = sprite.radius, size - sprite.radius
        span = max(high - low, 1.0)
        folded = torch.remainder(where - low, 2 * span)
        return low + torch.where(folded > span, 2 * span - folded, folded)
    low, high = -WIDEST * sprite.radius, size + WIDEST * sprite.radius
    out = where > high if speed > 0 else where < low
    return torch.where(out, low + torch.remainder(where - low, high - low), where)


def _reached(path: Tensor, radius: float, size: int) -> slice:
    """The pixels along one axis that a sprite whose centre goes along `path` can cover."""
    margin = WIDEST * radius + 2
    return slice(max(int(path.min() - margin), 0), max(min(int(path.max() + margin), size), 0))


def _background(scene: Scene, gx: Tensor, gy: Tensor) -> Tensor:
    """[T, H, W] coordinates -> [T, 3, H, W] in 0..1: a muted colour and long waves, so that a small network can spend itself on what moves."""
    rng = np.random.default_rng(scene.seed + 77_000_000)
    base = rng.uniform(0.3, 0.7) + rng.uniform(-0.07, 0.07, 3)
    field = torch.zeros(*gx.shape, 3)
    for _ in range(3):
        angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(70, 180) * scene.size / 128
        wave = torch.sin((gx * np.cos(angle) + gy * np.sin(angle)) * (2 * np.pi / period) + rng.uniform(0, 2 * np.pi))
        tint = rng.uniform(0.03, 0.07) + rng.uniform(-0.02, 0.02, 3)
        field += wave[..., None] * torch.tensor(tint, dtype=torch.float32)
    return (field + torch.tensor(base, dtype=torch.float32)).permute(0, 3, 1, 2)


def render(scene: Scene, start: int = 0, frames: int | None = None) -> Tensor:
    """Frames `start` .. `start + frames` (default: all) -> float32 [T, 3, H, W] in 0..1."""
    frames = scene.frames - start if frames is None else frames
    size, time = scene.size, torch.arange(start, start + frames, dtype=torch.float32) + scene.late
    ys, xs = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    moving = scene.pan != (0.0, 0.0)
    shift = time if moving else time[:1]
    camera_x, camera_y = shift[:, None, None] * scene.pan[0], shift[:, None, None] * scene.pan[1]
    film = _background(scene, xs + camera_x, ys + camera_y).expand(frames, -1, -1, -1).clone()
    for s in scene.sprites:
        px = _path(s.x, s.vx, s, size, time)[:, None, None]
        py = _path(s.y, s.vy, s, size, time)[:, None, None]
        rows, columns = _reached(py, s.radius, size), _reached(px, s.radius, size)
        cover = (0.5 - outline(s.shape, xs[rows, columns] - px, ys[rows, columns] - py, s.radius)).clamp(0, 1)[:, None]
        colour = torch.tensor(COLOURS[s.colour], dtype=torch.float32).view(1, 3, 1, 1) / 255
        film[:, :, rows, columns] = film[:, :, rows, columns] * (1 - cover) + colour * cover
    if scene.occluder:
        left, width = scene.occluder
        cover = (0.5 - ((xs - left - width / 2).abs() - width / 2)).clamp(0, 1)
        film = film * (1 - cover) + 0.22 * cover
    return film.clamp_(0, 1)


def motion_mask(film: Tensor, threshold: float = 1e-4) -> Tensor:
    """[T=4n+1, 3, H, W] in 0..1 -> bool [n+1, H/8, W/8]: cells of the latent in which any pixel changed.

    Clips are drawn in float32 and what stands still is drawn alike in every frame, so the threshold can be tiny.

    Latent frame 0 is pixel frame 0 and never moves; latent frame f covers pixel frames 4f-3 .. 4f.
    """
    change = (film[1:] - film[:-1]).abs().amax(1)
    cells = torch.nn.functional.max_pool2d(change[:, None], 8)[:, 0]
    moved = cells.unflatten(0, (-1, 4)).amax(1) > threshold
    return torch.cat([torch.zeros_like(moved[:1]), moved])
