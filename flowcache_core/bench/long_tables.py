"""The tables that pages show of `bench long`, and what they share with those of `bench causal`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .long import NAME, WINDOW
from .measured import data, origin, table

ALL = NAME, f"{NAME}-sink", f"{NAME}-random"
"""Runs of their own, of the same films."""
ARMS = {
    WINDOW: "the window, 5 chunks",
    "shorter window": "a window of 4 chunks, as long as the budget",
    "even": "a budget of 3 chunks, `even`",
    "even, no sink": "the same without the first chunk",
    "random": "the same with it, `random`",
}
Row = dict[str, Any]


def with_error(value: Sequence[float | None], scale: float = 1.0, digits: int = 1) -> str:
    """A mean and, where there is one, its standard error."""
    mean, error = value
    assert mean is not None
    return f"{mean * scale:.{digits}f}" + ("" if error is None else f" ± {error * scale:.{digits}f}")


def by_arm(*names: str) -> dict[str, list[Row]]:
    """The rows of a bench of minute-long films, of several runs together: those of each arm, by stretch."""
    rows = [row for name in names for row in data(name)["rows"]]
    return {arm: [row for row in rows if row["arm"] == arm] for arm in dict.fromkeys(row["arm"] for row in rows)}


def by_stretch(names: Sequence[str], texts: Mapping[str, str], key: str, scale: float = 1.0, digits: int = 1, beside: Mapping[str, str] = {}) -> str:
    """A row for each arm of `texts`, a column for each stretch. `beside`: headings of further keys, of which the mean over the film stands."""
    arms = by_arm(*names)
    ends = [row["until"] for row in arms[WINDOW]]
    lines = []
    for arm, text in texts.items():
        cells = [with_error(row[key], scale, digits) for row in arms[arm]]
        means = [f"{sum(row[other][0] for row in arms[arm]) / len(ends) * scale:.{digits}f}" for other in beside]
        lines.append((text, *cells, *means))
    return table(["history", *(f"{end} s" for end in ends), *beside.values()], lines)


FIGURES: dict[str, Callable[[], str]] = {
    "long-colours": lambda: by_stretch(ALL, ARMS, "colour", 100, 0, {"chance": "other prompts", "ceiling": "true clips"}),
    "long-moved": lambda: by_stretch(ALL, ARMS, "moved"),
    "long-contrast": lambda: by_stretch(ALL, ARMS, "contrast", digits=2),
    "long-saturation": lambda: by_stretch(ALL, ARMS, "saturation", digits=2),
    "long-origin": lambda: "\n".join(map(origin, ALL)),
}
