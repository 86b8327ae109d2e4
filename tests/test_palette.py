"""The live map's colours: each kind of step is lighter, or darker, than the one before it, so that no colour vision is needed."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from tests.host import PACK

ORDER = ["none", "planned", "reused", "part", "computed"]
"""From what has not run to what was computed."""


def linear(channel: float) -> float:
    """Of an sRGB channel 0..255."""
    share = channel / 255
    return share / 12.92 if share <= 0.04045 else float(((share + 0.055) / 1.055) ** 2.4)


def luminance(red: float, green: float, blue: float) -> float:
    """WCAG 2."""
    return 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue)


def contrast(one: list[float], other: list[float]) -> float:
    """WCAG 2, of two sRGB colours: 1 to 21."""
    dark, light = sorted((luminance(*one), luminance(*other)))
    return (light + 0.05) / (dark + 0.05)


def palette(theme: str) -> list[list[float]]:
    """In the order of `ORDER`."""
    (line,) = re.findall(rf"^  {theme}: {{(.*)}},$", (PACK / "web" / "live_map.js").read_text(), re.MULTILINE)
    colours = dict(re.findall(r'(\w+): "#(\w{6})"', line))
    return [[float(channel) for channel in bytes.fromhex(colours[kind])] for kind in ORDER]


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_kinds_of_steps_differ_in_brightness_in_their_order(theme: str) -> None:
    levels = [luminance(*colour) for colour in palette(theme)]
    assert levels == sorted(levels, reverse=theme == "light")
    assert min(contrast(one, other) for one, other in pairwise(palette(theme))) > 1.25


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert contrast([119, 119, 119], [255, 255, 255]) == pytest.approx(4.48, abs=0.01)
