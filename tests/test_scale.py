"""The arithmetic of docs/scale.md."""

from __future__ import annotations

from pathlib import Path

from flowcache_core.bench.geometries import GEOMETRIES, Geometry
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.policies.presets import PLANS
from flowcache_core.sampling.plan import Plan
from flowcache_core.sampling.planner import plan_for
from flowcache_core.sampling.schedule import ChunkSchedule

PAGE = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
MINUTE = ChunkSchedule(SKYREELS.frames.latent(1441), SKYREELS.layout.chunk_frames, 50, 50, SKYREELS.layout.window)
TOKENS, WORDS, BRANCHES, RATE = 34 * 60, 512, 2, 4e14


def seen() -> float:
    """Latent frames that a chunk sees, on average over the frames of the film."""
    spans = [MINUTE.span(k) for k in range(MINUTE.chunks)]
    return sum(size * (start + size - MINUTE.span(MINUTE.oldest(k))[0]) for k, (start, size) in enumerate(spans)) / MINUTE.frames


def operations(geometry: Geometry) -> float:
    """Of a latent frame, all branches."""
    c = geometry.config
    linear, attention = 2 * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim), 4 * c.dim * (seen() * TOKENS + WORDS)
    return c.layers * BRANCHES * TOKENS * (linear + attention)


def test_the_hours_of_a_thousand_films_follow_from_the_formula() -> None:
    full, planned = (plan.frames_computed(MINUTE) for plan in (Plan.full(MINUTE), plan_for(MINUTE, PLANS["balanced"].share)))
    assert f"{full:,.0f} frames" in PAGE
    assert f"{planned:,.0f} frames" in PAGE
    assert f"`s` = {seen():.1f}" in PAGE
    for name, row in (("skyreels-1.3b", "1.3B"), ("skyreels-14b", "14B")):
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| SkyReels-V2 {row} "))
        each = operations(GEOMETRIES[name])
        for frames in (full, planned):
            assert f"{1000 * frames * each / RATE / 3600:.0f} GPU hours" in line
