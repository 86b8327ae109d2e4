"""The arithmetic of docs/scale.md: its formula, and the cost model from which its tables are made."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowcache_core.bench.film_cost import Production, Worker
from flowcache_core.bench.fleet_tables import production
from flowcache_core.bench.geometries import GEOMETRIES
from flowcache_core.bench.scale import LINKS, RATE

PAGE = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
TOKENS, WORDS, BRANCHES = 34 * 60, 512, 2


def seen(film: Production) -> float:
    """Latent frames that a chunk sees, on average over the frames of the film."""
    schedule = film.schedule
    spans = [schedule.span(k) for k in range(schedule.chunks)]
    return sum(size * (start + size - schedule.span(schedule.oldest(k))[0]) for k, (start, size) in enumerate(spans)) / schedule.frames


def operations(film: Production) -> float:
    """Of a latent frame, all branches."""
    c = film.geometry.config
    linear, attention = 2 * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim), 4 * c.dim * (seen(film) * TOKENS + WORDS)
    return c.layers * BRANCHES * TOKENS * (linear + attention)


@pytest.mark.parametrize("model", ["skyreels-1.3b", "skyreels-14b"])
def test_the_hours_of_a_thousand_films_follow_from_the_formula(model: str) -> None:
    """The cost model has every chunk on its own; on one card their sum is that of the formula, where all steps are computed. A plan computes
    more steps of some chunks than of others."""
    assert GEOMETRIES[model].job.picture == (544, 960)
    for arm, within in (("uncached", 1e-3), ("balanced", 0.02)):
        film = production(model, arm)
        by_formula = film.plan.frames_computed(film.schedule) * operations(film) / RATE
        assert sum(Worker.of(film, 1, LINKS["NVLink"]).chunks) == pytest.approx(by_formula, rel=within)


def test_what_the_page_assumes_is_what_the_tables_assume() -> None:
    for assumed in ("4·10¹⁴", "10¹⁴ per second", "17.7·10¹²", "13.9·10¹²", "100 frames per second", "2·10⁹ bytes", "30 s until"):
        assert assumed in PAGE
