"""Pictures made of numbers, drawn with Pillow: the chunk x step map and a line plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from .report import COMPUTED, NOT_RUN, REFRESHED, RunReport

PAPER, INK, GRID = (250, 250, 252), (30, 34, 44), (222, 226, 234)
SHADES = {COMPUTED: (38, 84, 164), NOT_RUN: (236, 238, 242)}
REUSED_SHADE = (247, 181, 84)
REFRESHED_SHADES = (196, 232, 204), (30, 120, 72)
LINES = ((38, 84, 164), (214, 96, 40), (40, 140, 90), (150, 70, 160), (120, 120, 120), (190, 30, 60), (0, 150, 170))


def font(size: int = 13) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def chunk_map(report: RunReport, cell: int = 14) -> Image.Image:
    """Rows are chunks, columns are steps: blue was computed, orange was reused, green was computed in part, the darker the more."""
    chunks, steps = report.map.shape
    left, top = 74, 34
    width = max(left + steps * cell + 16, 460, int(font(12).getlength(report.summary())) + 20)
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
    legend = [(left, SHADES[COMPUTED], "computed"), (left + 110, REUSED_SHADE, "reused")]
    if report.chunk_steps_refreshed:
        legend.append((left + 200, between(*REFRESHED_SHADES, 0.5), "some tokens computed"))
    for x, shade, word in legend:
        draw.rectangle((x, y + 2, x + 11, y + 13), shade)
        draw.text((x + 17, y), word, INK, font(12))
    return picture


Shade = tuple[int, int, int]


def between(a: Shade, b: Shade, share: float) -> Shade:
    """The colour `share` of the way from a to b."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def line_plot(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> Image.Image:
    """Named lists of (x, y) -> a picture with axes, marks and a legend."""
    width, height, left, bottom = 640, 420, 62, 52
    points = [p for line in series.values() for p in line]
    (x0, x1), (y0, y1) = (_range([p[axis] for p in points]) for axis in (0, 1))
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (width - left - 24), height - bottom - (y - y0) / (y1 - y0) * (height - bottom - 24)

    for i in range(6):
        x, y = x0 + (x1 - x0) * i / 5, y0 + (y1 - y0) * i / 5
        draw.line((*place(x, y0), *place(x, y1)), GRID)
        draw.line((*place(x0, y), *place(x1, y)), GRID)
        draw.text((place(x, y0)[0] - 12, height - bottom + 8), f"{x:.2f}", INK, font(12))
        draw.text((16, place(x0, y)[1] - 8), f"{y:.1f}", INK, font(12))
    draw.text((width // 2 - 60, height - 24), x_label, INK, font())
    draw.text((left, 4), y_label, INK, font())
    for n, (name, line) in enumerate(series.items()):
        shade = LINES[n % len(LINES)]
        where = [place(*p) for p in sorted(line)]
        if len(where) > 1:
            draw.line(where, shade, 2)
        for x, y in where:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), shade)
        draw.text((width - 230, height - bottom - 22 - 18 * n), name, shade, font())
    return picture


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or 0.5
    return low - pad, high + pad
