"""`bench kernels`: its inputs have the sizes that it says, its ceilings are measured, and its slow and fast forms agree."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache_core.bench import kernels
from flowcache_core.bench.geometries import GEOMETRIES
from flowcache_core.bench.kernels import OPERATIONS, Operation, Sizes
from flowcache_core.kernels.attention import products

SMALL = Sizes(12, 48, 3, (2, 2), 2, 2, 512)


def new(*shape: int) -> Tensor:
    return torch.randn(shape)


def called(name: str) -> tuple[tuple[Any, ...], Tensor]:
    operation = next(one for one in OPERATIONS if one.name == name)
    inputs = operation.inputs(SMALL, new)
    return inputs, operation.call(*inputs)


@pytest.mark.parametrize(
    "name",
    ["attention to the window", "norm of queries", "rotary positions", "norm and rotary positions", "gate and residual", "gate, norm and residual",
     "norm of heads and rotary positions", "swiglu", "gelu"],
)  # fmt: skip
def test_bytes_are_those_of_inputs_and_output(name: str) -> None:
    """But for what is small beside them: weights of norms, phases, gates."""
    inputs, out = called(name)
    large = [x for x in (*inputs, out) if isinstance(x, Tensor) and x.numel() >= SMALL.tokens * SMALL.dim]
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
    assert Sizes.of(GEOMETRIES["skyreels-1.3b"]) == Sizes(10200, 51000, 5, (34, 60), 12, 12, 8960)


def test_query_heads_share_key_heads_where_the_released_model_has_it_so() -> None:
    """MAGI-1 4.5B: six latent frames a chunk, five chunks a window, three query heads a key head."""
    assert Sizes.of(GEOMETRIES["magi-4.5b"]) == Sizes(12240, 61200, 6, (34, 60), 24, 8, 12288)
    q, k, v = next(one for one in OPERATIONS if one.name == "attention to the window").inputs(replace(SMALL, heads=6), new)
    assert (q.shape[1], k.shape[1], v.shape[1]) == (6, 2, 2)


@pytest.mark.parametrize("operation", [one for one in OPERATIONS if one.eager], ids=lambda one: one.name)
def test_a_kernel_and_plain_pytorch_agree(operation: Operation) -> None:
    inputs = operation.inputs(SMALL, new)
    assert operation.eager
    torch.testing.assert_close(operation.call(*inputs), operation.eager(*inputs))


def test_what_a_refresh_moves_is_a_quarter_of_the_chunk() -> None:
    (x, at, fresh), out = called("scattering refreshed rows")
    assert len(at) == 3
    assert torch.equal(out[:, at], fresh)
    (x, at), rows = called("gathering tokens to refresh")
    assert torch.equal(rows, x[:, at])


def test_every_operation_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ceiling", lambda *_: 1e12)
    monkeypatch.setattr(kernels, "copying", lambda *_: 1e9)
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    args = parser.parse_args(["--seconds", "0", "--dtype", "float32", "--device", "cpu"])
    rows = kernels.run(args)["rows"]
    assert [row["operation"] for row in rows] == [operation.name for operation in OPERATIONS if operation.is_of(GEOMETRIES["smoke"])]
    assert all(0 < row["us_p20"] <= row["us"] <= row["us_p80"] for row in rows)
    own = {one.name for one in OPERATIONS if one.eager and one.is_of(GEOMETRIES["smoke"])}
    assert {row["operation"] for row in rows if row["us_eager"] is not None} == own
    args.geometry, args.operations = "smoke,smoke-magi", "positions, into the cache"
    assert [(row["geometry"], row["operation"]) for row in kernels.run(args)["rows"]] == [
        ("smoke", "norm and rotary positions, into the cache"),
        ("smoke-magi", "norm of heads and rotary positions, into the cache"),
    ]
    args.geometry, args.operations = "smoke", "swiglu"
    with pytest.raises(ValueError, match="smoke has no operation with 'swiglu' in its name: choose a geometry of skyreels"):
        kernels.run(args)
    args.operations, args.geometry = "gelu", "smoke,smoke-magi"
    assert [(row["geometry"], row["operation"]) for row in kernels.run(args)["rows"]] == [("smoke", "gelu"), ("smoke-magi", "gelu")]
    args.operations = "no such"
    with pytest.raises(ValueError, match="no operation has 'no such' in its name: there are attention to the window, "):
        kernels.run(args)


def test_geometries_are_chosen_by_name() -> None:
    assert kernels.geometries("all") == [name for name in GEOMETRIES if "smoke" not in name]
    with pytest.raises(ValueError, match=r"there is no geometry x: choose from all, skyreels-1\.3b, "):
        kernels.geometries("smoke,x")


def test_the_floor_is_the_larger_of_the_two_times() -> None:
    args = argparse.Namespace(device="cpu", dtype="float32", seconds=0.0, compile=False)
    bytes_bound = Operation("x", lambda s, n: (), lambda: None, lambda s: 1000, lambda s: 1000)
    assert kernels._row(bytes_bound, SMALL, (), args, product=1e12, copy=1e9)["bound"] == "copy"
    assert kernels._row(bytes_bound, SMALL, (), args, product=1e6, copy=1e9)["bound"] == "product"


def test_a_copy_has_a_rate() -> None:
    assert kernels.copying(torch.device("cpu"), 2**20) > 0
