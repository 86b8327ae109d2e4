"""`bench motion`: reuse by token against reuse by chunk, over a sweep of thresholds, and at equal shares of computed tokens."""

from __future__ import annotations

import argparse
from typing import Any

from ..policies.chunkwise import Chunkwise
from ..policies.motion import Motion
from . import sweep
from .sweep import Rule

NAME = "motion"
SHARES = (0.40, 0.30)
"""Shares of computed tokens at which the rules are compared."""
CHUNK_THRESHOLDS, TOKEN_THRESHOLDS = (0.1, 0.15, 0.25), (0.05, 0.09, 0.14)
USUAL = "chunkwise,motion,chunkwise-hold,motion-hold"


def rules() -> list[Rule]:
    """The two rules, extrapolated and held as published, then changes of Motion, one at a time; `setting` is the threshold."""
    out = []
    for name, order in (("", 1), ("-hold", 0)):
        bases = {t: Chunkwise(threshold=t, order=order) for t in (*CHUNK_THRESHOLDS, *TOKEN_THRESHOLDS)}
        out += [Rule(f"chunkwise{name}", t, bases[t]) for t in CHUNK_THRESHOLDS]
        out += [Rule(f"motion{name}", t, Motion(threshold=t, base=bases[t])) for t in TOKEN_THRESHOLDS]
    for name, changes in VARIANTS.items():
        out += [Rule(name, t, Motion(threshold=t, **changes)) for t in TOKEN_THRESHOLDS]
    return out


VARIANTS: dict[str, dict[str, Any]] = {
    "motion-noisy": {"measure": "noisy"},
    "motion-output": {"measure": "output"},
    "motion-change": {"measure": "change"},
    "motion-alpha-0.1": {"alpha": 0.1},
    "motion-alpha-0.3": {"alpha": 0.3},
    "motion-early": {"coarse": 0.2},
    "motion-chunk-scale": {"scale": "chunk"},
    "motion-quantile": {"quantile": 0.9},
    "motion-widen": {"vote": "widen"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sweep.add_arguments(parser, rules(), USUAL, frames=57)


def run(args: argparse.Namespace) -> dict[str, Any]:
    return sweep.run(args, rules(), SHARES)
