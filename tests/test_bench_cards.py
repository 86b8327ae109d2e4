"""The figure of memory: what a run announces, and the smallest card that holds it."""

from __future__ import annotations

import pytest

from flowcache_core.bench import cards
from flowcache_core.bench.cards import CARDS, GIB, card, evaluation, held, ways
from flowcache_core.bench.geometries import GEOMETRIES
from flowcache_core.bench.model import Arm, arms_of


def test_what_is_held_is_what_a_run_announces() -> None:
    """SkyReels-V2 1.3B, 960 x 544, one chunk after the other: five chunks of 10200 tokens, two branches, 30 layers, 16 bits."""
    geometry = GEOMETRIES["skyreels-1.3b"]
    arms = arms_of(geometry.family)
    whole = held(geometry, 497, arms["uncached"], 50)
    assert whole.kv == 2 * 5 * 10200 * 2 * 1536 * 30 * 2
    quarter = held(geometry, 497, arms["kv-quarter"], 50)
    assert 2 / 5 * whole.kv < quarter.kv < 1 / 2 * whole.kv
    assert geometry.frames_of(20) == 497


@pytest.mark.parametrize(("name", "parameters"), [("magi-4.5b", 4.4599e9), ("magi-24b", 23.8993e9), ("self-forcing", 1.4190e9)])
def test_weights_are_those_of_the_release(name: str, parameters: float) -> None:
    geometry = GEOMETRIES[name]
    assert held(geometry, geometry.job.frames, Arm(), geometry.job.steps).weights == pytest.approx(2 * parameters, rel=1e-4)


def test_a_magi_chunk_keeps_keys_of_one_branch() -> None:
    """4.5B, guided by its text alone: at most five chunks of 12240 tokens, 8 key heads of 128, 34 layers, 16 bits."""
    geometry = GEOMETRIES["magi-4.5b"]
    assert held(geometry, 480, Arm(), 64).kv == 5 * 12240 * 2 * 8 * 128 * 34 * 2


def test_one_evaluation_holds_both_sides_of_an_activation() -> None:
    assert evaluation(GEOMETRIES["self-forcing"]) == 3 * 1560 * (3 * 1536 + 2 * 8960) * 2
    assert evaluation(GEOMETRIES["magi-24b"]) == 2 * 6 * 2040 * (3 * 6144 + 3 * 16384) * 2


@pytest.mark.parametrize(("size", "smallest"), [(1.0, "12 GiB"), (11.0, "12 GiB"), (11.1, "16 GiB"), (79.5, "141 GiB"), (200.0, "more than 141 GiB")])
def test_the_smallest_card_has_something_left(size: float, smallest: str) -> None:
    assert card(size * GIB) == smallest


def test_every_released_geometry_has_a_row_for_every_length() -> None:
    lines = cards.memory().splitlines()[2:]
    count = {name: len(ways(one)) * len(cards.LENGTHS) for name, one in GEOMETRIES.items() if not one.smoke}
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [name for name, n in count.items() for _ in range(n)]
    assert ways(GEOMETRIES["magi-4.5b"]) == {16: "up to 4 at once", 64: "one after the other"}
    assert ways(GEOMETRIES["krea-14b"]) == {4: "one after the other"}
    assert all(line.split(" | ")[-1].removesuffix(" |").removeprefix("more than ") in {f"{one} GiB" for one in CARDS} for line in lines)
