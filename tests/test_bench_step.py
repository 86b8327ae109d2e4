"""`bench step`: its operations are those of the shapes, its parts are parts, and products are timed beside every evaluation."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch.nn import functional as F

from flowcache_core.bench import step
from flowcache_core.bench.model import counter
from flowcache_core.kernels.linear import has_fused_product, linear
from flowcache_core.models.bundle import load_bundle
from flowcache_core.models.layers import plain


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    return parser.parse_args(words)


def test_a_film_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SIDE", 64)
    monkeypatch.setattr(step, "FILMS", 2)
    rows = step.run(arguments("--frames", "9", "--steps", "2", "--turns", "1"))["rows"]
    assert [row["arm"] for row in rows] == list(step.ARMS)
    assert rows[0]["gflop"] == rows[1]["gflop"] > 1
    for row in rows:
        assert row["evaluations"] == 2
        assert 0 < row["to_float32"][0] < 0.2
        assert 0 < row["of_product_p10"] <= row["of_product"] <= row["of_product_p90"]
        assert 0 < sum(row[kind] for kind in step.KINDS) <= 1
    assert torch.get_num_threads() == 1


def test_hooked_layers_are_called_and_the_hooks_go() -> None:
    bundle = load_bundle(torch.bfloat16)
    norm, x = bundle.network.blocks[0].norm1, torch.randn(1, 2, 256).bfloat16()
    with torch.inference_mode():
        assert plain(norm, x)
        with step.one_by_one(bundle):
            assert not plain(norm, x)
        assert plain(norm, x)


def test_the_rate_is_operations_over_seconds() -> None:
    product = 2.0 * step.SIDE**3
    row = step.row([4e9] * 5, [(2.0, 1.0)] * 5)
    assert row["gflops"] == 2.0
    assert row["product_gflops"] == round(product / 1e9, 1)
    assert row["of_product"] == round(2e9 / product, 3)


@pytest.mark.skipif(not has_fused_product(), reason="oneDNN does not multiply bfloat16 natively here")
def test_the_fused_product_counts_as_the_product_that_it_is() -> None:
    x, weight = torch.randn(2, 5, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    with counter() as fused:
        linear(x, weight, None, "gelu-tanh")
    with counter() as plain:
        F.linear(x, weight)
    assert fused.get_total_flops() == plain.get_total_flops() == 2 * 10 * 8 * 3
