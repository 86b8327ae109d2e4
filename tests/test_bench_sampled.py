"""Every n-th row: what ran is what it was, what was left out is counted as it would have been."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flowcache_core.bench import model
from flowcache_core.bench.geometries import GEOMETRIES, Geometry, sized
from flowcache_core.bench.model import Arm, arms_of

SKYREELS = replace(GEOMETRIES["smoke"], job=replace(GEOMETRIES["smoke"].job, steps=8, ar_step=2))
CASES: list[Any] = [
    (SKYREELS, "upstream", 3),
    (SKYREELS, "uncached", 100),
    (SKYREELS, "flowcache-slow", 3),
    (GEOMETRIES["smoke-magi"], "uncached", 3),
    (GEOMETRIES["smoke-causal"], "uncached", 3),
]


def counted(geometry: Geometry, arm: Arm, every: int) -> tuple[float, float]:
    return model._counted(sized(geometry, 1, torch.float32, "cpu"), geometry.job, arm, every)


@pytest.mark.parametrize(("geometry", "name", "every"), CASES)
def test_all_rows_are_counted_whether_they_ran_or_not(geometry: Geometry, name: str, every: int) -> None:
    arm = arms_of(geometry.family)[name]
    ran, whole = counted(geometry, arm, every)
    assert ran < whole == pytest.approx(counted(geometry, arm, 1)[0], rel=1e-3)


def test_under_a_budget_the_count_is_near() -> None:
    arm = arms_of(SKYREELS.family)["kv-quarter"]
    ran, whole = counted(SKYREELS, arm, 3)
    assert ran < whole == pytest.approx(counted(SKYREELS, arm, 1)[0], rel=0.05)


@pytest.mark.parametrize("name", ["safe", "flowcache-slow"])
def test_decisions_and_memory_are_those_of_the_whole_run(name: str) -> None:
    arm, bundle = arms_of(SKYREELS.family)[name], sized(SKYREELS, 1, torch.float32, "cpu")
    whole, some = arm.run(bundle, SKYREELS.job), arm.run(bundle, SKYREELS.job, arm.sampling(bundle, SKYREELS.job, 3))
    assert (whole.map == some.map).all()
    assert (whole.kv_peak_bytes, whole.host_syncs) == (some.kv_peak_bytes, some.host_syncs)


def test_where_tokens_wait_all_rows_run() -> None:
    arms = arms_of(SKYREELS.family)
    assert arms["motion"].apart(5) == 1
    assert arms["safe"].apart(5) == 5
