"""The figure `gpu-memory`: what a film of a released model holds, and the smallest card that it fits, by the arithmetic that every run announces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import nn

from ..run.footprint import Footprint
from ..run.run import Place, Run
from .geometries import GEOMETRIES, Geometry, Sized
from .measured import table
from .model import UNCACHED, Arm, arms_of

GIB = 2**30
HALF = 2
"""Bytes of a number in 16 bits."""
LENGTHS = (5, 60)
"""Seconds of the films."""
CARDS = (12, 16, 24, 32, 48, 80, 141)
"""GiB that cards have."""
KEPT_BACK = 1.0
"""GiB that a card has not to give: its driver, the page on the screen, what PyTorch's allocator cannot join."""
QUARTER = "kv-quarter"


def held(geometry: Geometry, frames: int, arm: Arm, ar_step: int) -> Footprint:
    """What a film of so many frames holds in 16 bits, by the arithmetic that every run announces. Made on the meta device: no memory is needed."""
    run, weights = settled(geometry, frames, arm, ar_step)
    return replace(run.held, weights=weights)


def settled(geometry: Geometry, frames: int, arm: Arm, ar_step: int) -> tuple[Run, int]:
    """The run, settled, and the bytes of its network."""
    family, network = geometry.family, unallocated(geometry.family.network, geometry.config)
    bundle, job = Sized.of(geometry, network), replace(geometry.job, frames=frames, ar_step=ar_step)
    branches = 1 if family.guidance.inside else len(family.guidance.branches(job.cfg))
    noise, weights = job.noise_shape(bundle), sum(weight.numel() for weight in network.parameters()) * HALF
    place, compressor = Place(1, branches, branches * geometry.words, weights, HALF), arm.compressor(geometry.layout)
    adapter, schedule = bundle.adapter(), job.schedule(bundle)
    return Run(family, adapter, schedule, job.sigmas(bundle), (noise[1], *noise[3:]), place, arm.policy, compressor, scale=job.cfg), weights


@cache
def unallocated(network: Callable[..., nn.Module], config: Any) -> nn.Module:
    return network(config, device="meta", dtype=torch.bfloat16)


def evaluation(geometry: Geometry) -> int:
    """Bytes that one evaluation needs for a moment, in 16 bits, at the most: in a feed-forward layer, of all tokens of a chunk and all branches
    side by side, the stream, its normed copy and its result, and both sides of the activation; of a gated layer, both halves too. Not in it is
    what kernels of a card need for themselves."""
    family, config, job = geometry.family, geometry.config, geometry.job
    height, width = (side // family.latents.multiple for side in job.picture)
    tokens = geometry.layout.chunk_frames * height * width * len(family.guidance.branches(job.cfg))
    inner = (2 + getattr(config, "gated", False)) * config.ffn_dim
    return tokens * (3 * config.dim + inner) * HALF


def card(size: float) -> str:
    """The smallest card that holds so many bytes and has something left, in words."""
    enough = next((one for one in CARDS if size / GIB + KEPT_BACK <= one), None)
    return f"{enough} GiB" if enough else f"more than {CARDS[-1]} GiB"


def memory() -> str:
    """Weights, KV cache and everything held, in GiB: chunks as closely behind each other as the model allows, and one by one."""
    lines = []
    for name, geometry in GEOMETRIES.items():
        if geometry.smoke:
            continue
        arms, moment = arms_of(geometry.family), evaluation(geometry)
        for (ar_step, way), seconds in product(ways(geometry).items(), LENGTHS):
            whole, quarter = (held(geometry, geometry.frames_of(seconds), arms[arm], ar_step) for arm in (UNCACHED, QUARTER))
            totals = [one.weights + one.held for one in (whole, quarter)]
            values = (whole.weights, whole.kv, quarter.kv, moment, *totals)
            size = f"{geometry.job.width} x {geometry.job.size}"
            lines.append((name, size, f"{seconds} s", way, *(f"{value / GIB:.1f}" for value in values), *(card(one + moment) for one in totals)))
    head = ["model", "picture", "film", "chunks", "weights", "KV cache", "KV cache, a quarter", "one evaluation", "all that is held",
            "the same, a quarter", "which card", "which card, a quarter"]  # fmt: skip
    return table(head, lines)


def ways(geometry: Geometry) -> dict[int, str]:
    """By `ar_step`: as many chunks at once as fit the window, or as the model was trained with, and one after the other."""
    job, layout, published = geometry.job, geometry.layout, geometry.family.published.stagger(geometry.job.steps)
    closest = max(published, job.steps // layout.window)
    together = -(-job.steps // closest)
    return {**({closest: f"up to {together} at once"} if together > 1 else {}), job.steps: "one after the other"}


FIGURES: dict[str, Callable[[], str]] = {"gpu-memory": memory}
