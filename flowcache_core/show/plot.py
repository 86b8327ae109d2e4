"""Pictures made of numbers, drawn with Pillow: the chunk x step map, what a budget kept of history, and a line plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..run.report import COMPUTED, NOT_RUN, REFRESHED, RunReport

PAPER, INK, GRID = (250, 250, 252), (30, 34, 44), (222, 226, 234)
SHADES = {COMPUTED: (38, 84, 164), NOT_RUN: (236, 238, 242)}
REUSED_SHADE = (247, 181, 84)
REFRESHED_SHADES = (196, 232, 204), (30, 120, 72)
KEPT_SHADES = (228, 232, 240), (22, 64, 140)
PLACES_AT_MOST = 48
"""Latent frames whose places are drawn one by one."""
LINES = ((38, 84, 164), (214, 96, 40), (40, 140, 90), (150, 70, 160), (120, 120, 120), (190, 30, 60), (0, 150, 170), (140, 100, 20), (90, 160, 30))
MANY = 4
"""Lines above which the legend stands beside the plot."""


def font(size: int = 13) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def chunk_map(report: RunReport, cell: int = 14) -> Image.Image:
    """A line per chunk, a column per step: blue was computed, orange was reused or, by a plan, skipped, green was computed in part, the
    darker the more."""
    chunks, steps = report.map.shape
    left, top = 74, 34
    width = max(left + steps * cell + 16, 460, _width(report.summary()) + 20)
    picture = Image.new("RGB", (width, top + chunks * (cell + 3) + 30), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((10, 9), report.summary(), INK, font(12))
    for k in range(chunks):
        y = top + k * (cell + 3)
        draw.text((10, y - 1), f"chunk {k + 1}", INK, font(12))
        for j in range(steps):
            shade = SHADES.get(int(report.map[k, j]), REUSED_SHADE)
            if report.map[k, j] == REFRESHED:
                shade = between(*REFRESHED_SHADES, float(report.shares[k, j]))
            draw.rectangle((left + j * cell, y, left + (j + 1) * cell - 2, y + cell - 1), shade)
    y = top + chunks * (cell + 3) + 6
    legend = [(left, SHADES[COMPUTED], "computed"), (left + 110, REUSED_SHADE, "skipped" if report.plans else "reused")]
    if report.chunk_steps_refreshed:
        legend.append((left + 200, between(*REFRESHED_SHADES, 0.5), "some tokens computed"))
    for x, shade, word in legend:
        draw.rectangle((x, y + 2, x + 11, y + 13), shade)
        draw.text((x + 17, y), word, INK, font(12))
    return picture


def history_map(report: RunReport) -> Image.Image:
    """What a budget kept of history: above over time, below place by place at the end.

    Above, a line per finished chunk and a column per latent frame, the darker the more of a frame's tokens are kept. Below, each
    little picture is a latent frame, the darker a place the more layers keep it.
    """
    if report.history.places is None or report.grid is None:
        picture = Image.new("RGB", (460, 34), PAPER)
        ImageDraw.Draw(picture).text((10, 9), "no budget was set, or no chunk was finished: nothing was given up", INK, font(12))
        return picture
    _, rows, columns = report.grid
    shares = np.zeros((len(report.history.frames), len(report.history.frames[-1])))
    for k, frames in enumerate(report.history.frames):
        shares[k, : len(frames)] = frames / (rows * columns)
    over_time = _over_time(shares, [len(frames) for frames in report.history.frames])
    at_the_end = _places(report.history.places.reshape(-1, rows, columns))
    picture = Image.new("RGB", (max(over_time.width, at_the_end.width), over_time.height + at_the_end.height), PAPER)
    picture.paste(over_time, (0, 0))
    picture.paste(at_the_end, (0, over_time.height))
    return picture


def _over_time(shares: np.ndarray, known: Sequence[int]) -> Image.Image:
    """shares: [chunks, frames], 0..1; `known`: for every chunk the frames that were there by then."""
    chunks, frames = shares.shape
    wide, high, left, top = min(max(720 // frames, 2), 16), min(max(480 // chunks, 2), 16), 74, 34
    title = f"rows: {chunks} finished chunks, columns: {frames} latent frames; the darker, the more of the frame is kept"
    picture = Image.new("RGB", (max(left + frames * wide + 16, _width(title) + 20), top + chunks * high + 30), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((10, 9), title, INK, font(12))
    every = -(-18 // high)
    cells = _shaded(shares)
    cells[np.arange(frames) >= np.array(known)[:, None]] = PAPER
    cells = cells.repeat(high, 0).repeat(wide, 1)
    if min(wide, high) > 3:
        cells[high - 1 :: high] = cells[:, wide - 1 :: wide] = PAPER
    picture.paste(Image.fromarray(cells), (left, top))
    for k in range(chunks):
        y = top + k * high
        if k % every == 0:
            draw.text((10, y + high // 2 - 8), f"chunk {k + 1}", INK, font(12))
    draw.text((left, top + chunks * high + 6), "frame 1", INK, font(12))
    last = f"{frames}"
    draw.text((left + frames * wide - _width(last), top + chunks * high + 6), last, INK, font(12))
    return picture


def _places(places: np.ndarray) -> Image.Image:
    """places: [frames, height, width] of tokens, the share of layers that keep each token, 0..1."""
    some = np.flatnonzero(places.any((1, 2)))
    most = some[np.argsort(-places[some].sum((1, 2)), kind="stable")[:PLACES_AT_MOST]]
    shown, rows, columns = np.sort(most), *places.shape[1:]
    scale = max(1, 48 // max(rows, columns))
    wide, high, across = columns * scale + 10, rows * scale + 24, 16
    which = (
        f"the {len(shown)} of {len(some)} latent frames of which most is kept" if len(shown) < len(some) else "latent frames of which some is kept"
    )
    title = f"kept at the end, place by place: {which}; the darker, the more layers keep it"
    size = (max(min(len(shown), across) * wide + 20, _width(title) + 20), 30 + -(-len(shown) // across) * high)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((10, 5), title, INK, font(12))
    for n, f in enumerate(shown):
        x, y = 10 + n % across * wide, 28 + n // across * high
        picture.paste(Image.fromarray(_shaded(places[f]).repeat(scale, 0).repeat(scale, 1)), (x, y))
        draw.text((x, y + rows * scale + 2), f"{f + 1}", INK, font(11))
    return picture


def _shaded(shares: np.ndarray) -> np.ndarray:
    """[...], 0..1 -> uint8 [..., 3]."""
    light, dark = (np.array(shade, np.float32) for shade in KEPT_SHADES)
    out: np.ndarray = (light + (dark - light) * shares[..., None].clip(0, 1)).round().astype(np.uint8)
    return out


def _width(text: str) -> int:
    return int(font(12).getlength(text))


Shade = tuple[int, int, int]


def between(a: Shade, b: Shade, share: float) -> Shade:
    """The colour `share` of the way from a to b."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def line_plot(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Image.Image:
    """Named lists of (x, y) -> a picture with axes, marks and a legend."""
    width, height, left, bottom = 640, 420, 62, 52
    many = len(series) > MANY
    points = [p for line in series.values() for p in line]
    (x0, x1), (y0, y1) = (_range([p[axis] for p in points]) for axis in (0, 1))
    picture = Image.new("RGB", (width + many * (20 + max(map(_width, series), default=0)), height), PAPER)
    draw = ImageDraw.Draw(picture)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (width - left - 24), height - bottom - (y - y0) / (y1 - y0) * (height - bottom - 24)

    for i in range(6):
        x, y = x0 + (x1 - x0) * i / 5, y0 + (y1 - y0) * i / 5
        draw.line((*place(x, y0), *place(x, y1)), GRID)
        draw.line((*place(x0, y), *place(x1, y)), GRID)
        draw.text((place(x, y0)[0] - 12, height - bottom + 8), f"{x:.{0 if x1 - x0 > 5 else 2}f}", INK, font(12))
        draw.text((16, place(x0, y)[1] - 8), f"{y:.{1 if y1 - y0 > 1 else 3}f}", INK, font(12))
    draw.text((width // 2 - 60, height - 24), x_label, INK, font())
    draw.text((left, 4), y_label, INK, font())
    for n, (name, line) in enumerate(series.items()):
        shade = LINES[n % len(LINES)]
        where = [place(*p) for p in sorted(line)]
        if len(where) > 1:
            draw.line(where, shade, 2)
        for x, y in where:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), shade)
        draw.text((width - 8, 30 + 20 * n) if many else (width - 230, height - bottom - 22 - 18 * n), name, shade, font())
    return picture


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or 0.5
    return low - pad, high + pad
