"""`bench reuse`: how good a film stays when chunks reuse their predictions, over a sweep of settings, and at equal computed shares."""

from __future__ import annotations

import argparse
from typing import Any

from ..policies.chunkwise import Chunkwise
from ..policies.target import Target
from . import sweep
from .sweep import Rule

NAME = "reuse"
THRESHOLDS = (0.05, 0.1, 0.15, 0.2)
LATENT_THRESHOLDS = (0.02, 0.03, 0.06)
SHARES = (0.38, 0.6)
"""Where the rule published for SkyReels-V2 is measured: its decisions are known in advance, so its threshold is found for a share."""
EQUAL_SHARES = (0.55, 0.40)


def rules() -> list[Rule]:
    """The default rule along its threshold, one change of it at a time, and the published rules.

    `published-increment` is the rule of MAGI-1: the drift of the latent, and the latent increment replayed; it sets no limit
    to reused steps in a row and is stepped with Euler, as published. `euler` is the default rule with that solver.
    `published-residual` is the rule of SkyReels-V2: the time signature, and the residual of the block stack replayed; no
    polynomial was published for the bundled model.
    """
    out = [Rule("default", t, Chunkwise(threshold=t)) for t in THRESHOLDS]
    out += [Rule("order-0", t, Chunkwise(threshold=t, order=0)) for t in THRESHOLDS[::2]]
    out += [Rule("latent", t, Chunkwise(threshold=t, signature="latent")) for t in LATENT_THRESHOLDS]
    out += [Rule("published-residual", s, Target(share=s, replay="residual", order=0, max_reuse=1000)) for s in SHARES]
    increment = {"signature": "latent", "replay": "residual", "order": 0, "max_reuse": 1000}
    out += [Rule("published-increment", t, Chunkwise(threshold=t, **increment), "euler", True) for t in LATENT_THRESHOLDS]  # type: ignore[arg-type]
    return out + [Rule("euler", t, Chunkwise(threshold=t), "euler") for t in THRESHOLDS[::2]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sweep.add_arguments(parser, rules(), "", frames=33)


def run(args: argparse.Namespace) -> dict[str, Any]:
    return sweep.run(args, rules(), EQUAL_SHARES)
