"""Slots that move within their buffer, against lists of slots that are gathered anew."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from flowcache_core.kernels import slots as module
from flowcache_core.kernels.slots import keep, move_up, pool
from tests.ledger import Peak

B, H, D = 2, 3, 4
DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
SLOT = H * D
"""Numbers of a slot of one film."""


def buffer_of(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """No two slots alike, and in storage that is larger than the buffer."""
    return torch.randint(-100, 100, (B + 1, H, n + 2, D)).to(dtype)[1:, :, 1 : n + 1]


def slots_of(buffer: Tensor, film: int) -> list[list[list[float]]]:
    return buffer[film].float().transpose(0, 1).tolist()  # type: ignore[no-any-return]


def chosen(rng: random.Random, count: int, kept: int, first: int = 0, last: int = 0) -> Tensor:
    """Of each film other slots, with the first and the last so many among them."""
    middle = range(first, count - last)
    return torch.tensor([[*range(first), *sorted(rng.sample(middle, kept - first - last)), *range(count - last, count)] for _ in range(B)])


@pytest.fixture(params=[1, SLOT * B * 3, 2**24])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "BLOCK", request.param)
    return int(request.param)


@pytest.mark.parametrize("seed", range(30))
def test_slots_that_move_up_are_those_that_were_there(block: int, seed: int) -> None:
    rng = random.Random(seed)
    start, count = rng.randint(0, 12), rng.randint(0, 20)
    to = rng.randint(0, start)
    buffer = buffer_of(start + count + 2, rng.choice(DTYPES))
    before = [slots_of(buffer, film) for film in range(B)]
    move_up(buffer, to, start, count)
    for film, old in enumerate(before):
        assert slots_of(buffer, film)[: to + count] == old[:to] + old[start : start + count]
        assert slots_of(buffer, film)[start + count :] == old[start + count :]


@pytest.mark.parametrize("seed", range(60))
def test_slots_that_are_kept_are_the_chosen_ones_in_order(block: int, seed: int) -> None:
    rng = random.Random(seed)
    count, behind = rng.randint(1, 25), rng.randint(0, 6)
    kept = rng.randint(0, count)
    first = rng.randint(0, kept)
    last = rng.randint(0, kept - first)
    buffer, index = buffer_of(count + behind, rng.choice(DTYPES)), chosen(rng, count, kept, first, last)
    before = [slots_of(buffer, film) for film in range(B)]
    keep(buffer, index, count, first, last, behind)
    for film, old in enumerate(before):
        assert slots_of(buffer, film)[: kept + behind] == [old[k] for k in index[film].tolist()] + old[count:]


def test_more_slots_than_there_are_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match=r"5 slots .* out of 4: give each slot at most once"):
        keep(buffer_of(6), torch.arange(5).expand(B, -1), 4)


def test_the_first_slots_are_not_touched_and_the_last_move_without_a_look_at_the_index() -> None:
    """Where they are promised, what stands in the index there is of no account."""
    buffer = buffer_of(9)
    old = buffer.clone()
    keep(buffer, torch.tensor([[8, 8, 3, 8, 8]] * B), 9, 2, 2)
    assert torch.equal(buffer[:, :, :5], old[:, :, [0, 1, 3, 7, 8]])


def scratch(buffer: Tensor, *known: Tensor) -> Peak:
    return Peak(buffer, *known)


def test_slots_that_move_by_a_chunk_need_no_scratch_and_others_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, numbers = torch.zeros(B, H, 500, D), B * SLOT * 10
    monkeypatch.setattr(module, "BLOCK", numbers)
    for way, most in ((100, 0), (10, 0), (9, numbers)):
        with scratch(buffer) as peak:
            move_up(buffer, 0, way, 500 - way)
        assert peak.most == most * buffer.element_size()


def test_keeping_needs_the_scratch_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, index = torch.zeros(B, H, 500, D), torch.arange(400).expand(B, -1) + 40
    monkeypatch.setattr(module, "BLOCK", SLOT * 20)
    with scratch(buffer, index) as peak:
        keep(buffer, index, 480, 0, 0, 20)
    assert 0 < peak.most <= SLOT * 20 * buffer.element_size() < buffer.nbytes / 40


def test_means_are_the_same_in_blocks_and_need_the_scratch_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, groups = torch.randn(B, H, 400, D), torch.arange(399).view(1, 133, 3).expand(B, -1, -1)
    old, whole = buffer.clone(), buffer.clone()
    pool(whole, groups)
    torch.testing.assert_close(whole[:, :, 1::3], old[:, :, :399].unflatten(2, (-1, 3)).mean(3))
    assert torch.equal(whole[:, :, 0::3], old[:, :, 0::3])
    monkeypatch.setattr(module, "BLOCK", SLOT * 3 * 5)
    with scratch(buffer, groups) as peak:
        pool(buffer, groups)
    assert torch.equal(buffer, whole)
    assert peak.most <= 3 * SLOT * 3 * 5 * buffer.element_size() < buffer.nbytes / 10
