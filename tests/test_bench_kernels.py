"""`bench kernels`: its inputs have the sizes that it says, its ceilings are measured, and its slow and fast forms agree."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache_core.bench import kernels
from flowcache_core.bench.kernels import OPERATIONS, Operation, Sizes
from flowcache_core.bench.model import GEOMETRIES
from flowcache_core.kernels.attention import products

SMALL = Sizes(12, 48, 3, (2, 2), 2)


def new(*shape: int) -> Tensor:
    return torch.randn(shape)


def called(name: str) -> tuple[tuple[Any, ...], Tensor]:
    operation = next(one for one in OPERATIONS if one.name == name)
    inputs = operation.inputs(SMALL, new)
    return inputs, operation.call(*inputs)


@pytest.mark.parametrize("name", ["attention to the window", "norm of queries", "rotary positions", "gate and residual", "gelu"])
def test_bytes_are_those_of_inputs_and_output(name: str) -> None:
    """But for what is small beside them: weights of norms, phases, gates."""
    inputs, out = called(name)
    large = [x for x in (*inputs, out) if x.numel() >= SMALL.tokens * SMALL.dim]
    operation = next(one for one in OPERATIONS if one.name == name)
    assert operation.moved(SMALL) == sum(x.numel() for x in large)


def test_two_segments_are_the_whole() -> None:
    (q, k, v), out = called("the same in two segments, merged")
    torch.testing.assert_close(out, products(q, k, v))


def test_both_forms_with_weights_are_four_copies_of_a_third() -> None:
    for name in ("attention with weights, in one call", "attention with weights, in segments"):
        (q, k, v), out = called(name)
        third = k.shape[2] // 3
        copies = torch.tensor([1] * third + [4] * third + [1] * (k.shape[2] - 2 * third))
        torch.testing.assert_close(out, products(q, k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2)))


def test_a_quarter_of_the_keys_stays() -> None:
    (keys, scores, _), kept = called("choice of a quarter, and moving it")
    order = scores[0].topk(12).indices.sort().values
    assert torch.equal(kept[0], keys[0][:, order])


def test_sizes_are_those_of_the_released_model() -> None:
    """SkyReels-V2 1.3B at 960 x 544: five latent frames of 34 x 60 tokens a chunk, five chunks a window."""
    assert Sizes.of(GEOMETRIES["skyreels-1.3b"]) == Sizes(10200, 51000, 5, (34, 60), 12)


def test_every_operation_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ceiling", lambda *_: 1e12)
    monkeypatch.setattr(kernels, "copying", lambda *_: 1e9)
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    args = parser.parse_args(["--seconds", "0", "--dtype", "float32", "--device", "cpu"])
    rows = kernels.run(args)["rows"]
    assert [row["operation"] for row in rows] == [operation.name for operation in OPERATIONS]
    assert all(0 < row["us_p20"] <= row["us"] <= row["us_p80"] for row in rows)
    args.operations = "gelu"
    assert [row["operation"] for row in kernels.run(args)["rows"]] == ["gelu"]
    args.operations = "no such"
    with pytest.raises(ValueError, match="no operation has 'no such' in its name: there are attention to the window, "):
        kernels.run(args)


def test_the_floor_is_the_larger_of_the_two_times() -> None:
    args = argparse.Namespace(device="cpu", dtype="float32", seconds=0.0, compile=False)
    bytes_bound = Operation("x", lambda s, n: (), lambda: None, lambda s: 1000, lambda s: 1000)
    assert kernels._row(bytes_bound, SMALL, (), args, product=1e12, copy=1e9)["bound"] == "copy"
    assert kernels._row(bytes_bound, SMALL, (), args, product=1e6, copy=1e9)["bound"] == "product"


def test_a_copy_has_a_rate() -> None:
    assert kernels.copying(torch.device("cpu"), 2**20) > 0
