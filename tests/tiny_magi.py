"""MAGI-1 networks small enough for tests, with random weights, and films of them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from flowcache_core.models.bundle import Bundle
from flowcache_core.models.family import Bundled, Family
from flowcache_core.models.magi import Magi, MagiConfig
from flowcache_core.models.magi_adapter import MagiAdapter
from flowcache_core.models.magi_family import MAGI, MAGI_DISTILLED
from flowcache_core.run.generate import Job, generate
from flowcache_core.run.report import RunReport
from tests.toy_family import no_vae, words

PLAIN = MagiConfig(64, 96, 2, 1, head_dim=32, text_dim=12, caption=60)
"""As 4.5B: two query heads share a key head."""
GATED = MagiConfig(128, 80, 2, 2, head_dim=32, channels=32, text_dim=12, caption=60, gated=True)
"""As 24B."""
JOB = Job("a toy", frames=96, steps=8, seed=5, size=64, cfg=7.5, ar_step=2, shift=3.0, solver="euler", addnoise=0)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
GRID, FRAME = (4, 4), 16
FAMILIES = pytest.mark.parametrize("family", [MAGI, MAGI_DISTILLED], ids=lambda family: family.name)


def tiny_magi(config: MagiConfig = PLAIN, seed: int = 0) -> Magi:
    torch.manual_seed(seed)
    network = Magi(config)
    for name, p in network.named_parameters():
        nn.init.normal_(p, std=0.5 if "norm" in name else 0.2)
    with torch.no_grad():
        network.rope.bands.copy_(10000 ** (-torch.arange(config.bands) / config.bands))
    return network.eval().requires_grad_(False)


def bundle_of(family: Family, network: Magi | None = None) -> Bundle:
    family = replace(family, bundled=Bundled("tiny", "tiny", no_vae, words))
    return Bundle(family, network or tiny_magi(PLAIN), nn.Identity(), family.layout)


class Noting(MagiAdapter):
    """Notes every evaluation: (chunk, step, time, branches, what each sees)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[int, int, float, tuple[Hashable, ...], tuple[int | None, ...]]] = []

    def forward(self, call, attend):  # type: ignore[no-untyped-def]
        seen = tuple(self.seen(call.chunk, branch) for branch in call.branches)
        self.calls.append((call.chunk.index, call.chunk.step, round(1 - call.sigma, 4), call.branches, seen))
        return super().forward(call, attend)


def noted(family: Family, job: Job) -> tuple[Noting, RunReport]:
    adapter = Noting(tiny_magi(PLAIN), distilled=family is MAGI_DISTILLED)
    _, report = generate(bundle_of(family), job, adapter=lambda _, sigmas: adapter)
    return adapter, report
