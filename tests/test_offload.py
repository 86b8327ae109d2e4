"""History in the computer's memory: what is copied, in which order, and what waits for what.

`LateSide` is a side stream that does nothing until it has to: a copy that nobody waits for has not happened when its data are read. It
also holds every copy against what the computation has done with the page on the device by then, so that none may begin too early.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache_core.kernels import transfer
from flowcache_core.kernels.transfer import Fetched, Mark, Side
from flowcache_core.kv import stored
from flowcache_core.kv.cache import CachedAttention
from flowcache_core.kv.codec import CODECS, Codec
from flowcache_core.kv.stored import OnDevice, Pages, StoredSizes
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.schedule import ChunkSchedule
from tests.ledger import Ledger
from tests.recorded import FRAME, LAYERS, RecordedFilm, budget, exactly

ROLLING = ChunkSchedule(20, 3, 4, 2)


@dataclass
class Copy:
    """`layer`: of the page in the computer's memory; `slots`: of it; `out`: towards the computer."""

    layer: int
    slots: int
    out: bool
    do: Callable[[], object]


@dataclass
class At:
    """A mark: the computation's `time`, or the end of so many `copies`."""

    side: LateSide
    time: int = 0
    copies: int = 0

    def synchronize(self) -> None:
        self.side.waits_of_host += 1
        self.side.wait(self)


@dataclass
class LateSide(Side):
    device: torch.device
    waits: int = 0
    waits_of_host: int = 0
    time: int = 0
    done: int = 0
    log: list[Copy] = field(default_factory=list)
    homes: list[int] = field(default_factory=list)
    touched: dict[int, int] = field(default_factory=dict)
    """By page on the device, when the computation has touched it last."""

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty(shape, dtype=dtype)
        self.homes.append(made.untyped_storage().data_ptr())
        return made

    def copy(self, to: Tensor, source: Tensor, after: Mark) -> Mark:
        assert to.is_contiguous()
        assert source.is_contiguous()
        out = to.untyped_storage().data_ptr() in self.homes
        home, near = (to, source) if out else (source, to)
        last = self.touched.get(near.untyped_storage().data_ptr(), 0)
        assert last <= (after.time if isinstance(after, At) else 0), "it may begin while the page is still used"
        self.log.append(Copy(self.homes.index(home.untyped_storage().data_ptr()), len(to), out, lambda: to.copy_(source)))
        return At(self, copies=len(self.log))

    def mark(self) -> Mark:
        return At(self, self.time)

    def wait(self, mark: Mark) -> None:
        """The copies are done in order, as those of one stream."""
        while isinstance(mark, At) and self.done < mark.copies:
            self.log[self.done].do()
            self.done += 1

    def fetch(self, tensor: Tensor) -> Fetched:
        return Fetched(tensor.cpu(), At(self, self.time))

    def touch(self, page: Tensor) -> None:
        self.time += 1
        self.touched[page.untyped_storage().data_ptr()] = self.time


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> list[LateSide]:
    """Those that pages are given from now on; all that uses a page on the device is noted."""
    made: list[LateSide] = []

    def side_of(device: torch.device) -> Side:
        made.append(LateSide(device))
        return made[-1]

    def touching(name: str, owner: Any, page_of: Callable[..., Tensor]) -> None:
        real = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            for side in made:
                side.touch(page_of(*args))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    monkeypatch.setattr(stored, "side_of", side_of)
    touching("read", Codec, lambda codec, state, which, *_: state[f"{which}.{next(iter(codec.parts(128)))}"])
    touching("write", Codec, lambda codec, state, which, *_: state[f"{which}.{next(iter(codec.parts(128)))}"])
    touching("keep", stored, lambda data, *_: data)
    return made


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_a_film_needs_no_copy_sooner_than_it_waits_for_it(sides: list[LateSide], codec: Codec) -> None:
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    for offload, each in seen.items():
        torch.manual_seed(3)
        film = RecordedFilm(ROLLING, budget(5, dtype=codec.name, offload=offload))
        film.run(lambda one, written, each=each: each.append(one))  # type: ignore[misc]
    assert len(sides) == 1
    assert any(copy.out for copy in sides[0].log)
    assert all(torch.equal(*pair) for pair in zip(*seen.values(), strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_branches_that_are_batched_anew_find_their_history(sides: list[LateSide], seed: int) -> None:
    RecordedFilm(ROLLING, budget(5, offload=True), regrouped=seed).run(exactly)


def test_the_host_waits_for_no_copy(sides: list[LateSide]) -> None:
    film = RecordedFilm(ROLLING, budget(5, offload=True)).run(exactly)
    assert len(sides[0].log) > 100
    assert sides[0].waits_of_host == film.store.syncs == 0


def test_an_evaluation_copies_every_layer_once_each_ahead_of_its_turn(sides: list[LateSide], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece, of what is in use and no more."""
    order: list[int] = []
    real = CachedAttention._bounded

    def attended(*args: Any) -> Tensor:
        order.append(len(sides[0].log) if sides else 0)
        return real(*args)

    monkeypatch.setattr(CachedAttention, "_bounded", attended)
    counts: list[tuple[int, int]] = []
    film = RecordedFilm(ChunkSchedule(12, 3, 2, 2), budget(5, offload=True))

    def settled(chunk: Chunk) -> None:
        film.store.settle(chunk)
        counts.append((len(sides[0].log), len(order)))

    film.run(exactly, settled)
    first, attended_before = counts[-1]
    copies = sides[0].log[first:]
    assert [(copy.layer, copy.slots, copy.out) for copy in copies] == [(layer, 5 * FRAME, False) for layer in (1, 2, 0, 1, 2, 0)]
    assert order[attended_before:] == [first + k for k in range(1, 7)], "attention begins when the next copy has been asked for"


def test_a_commit_takes_a_page_here_and_back_and_leaves_the_sink(sides: list[LateSide]) -> None:
    film = RecordedFilm(ChunkSchedule(12, 3, 2, 2), budget(5, offload=True))
    spans: list[int] = []

    def settled(chunk: Chunk) -> None:
        spans.append(len(sides[0].log))
        film.store.settle(chunk)
        spans.append(len(sides[0].log))

    film.run(exactly, settled)
    copies = sides[0].log[spans[-2] : spans[-1]]
    joined, moved = copies[:LAYERS], copies[LAYERS:]
    assert [(copy.layer, copy.slots, copy.out) for copy in joined] == [(layer, 3 * FRAME, True) for layer in range(LAYERS)]
    assert [(copy.layer, copy.slots) for copy in moved if copy.out] == [(layer, 4 * FRAME) for layer in range(LAYERS)]
    assert [copy.layer for copy in moved if not copy.out] == [0, 1, 2, 0]


def pages_of(codec: Codec, dtype: torch.dtype = torch.bfloat16, layers: int = 4) -> Pages:
    return Pages(codec, StoredSizes(layers, 2, 3, 20, 16, dtype), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_a_page_holds_the_bytes_of_its_slots_and_one_is_on_the_device(codec: Codec, dtype: torch.dtype) -> None:
    pages, there = pages_of(codec, dtype), OnDevice(codec, StoredSizes(4, 2, 3, 20, 16, dtype), torch.device("cpu"))
    slots, channels = 2 * 20 * codec.bytes_per_token(3, 16, dtype.itemsize), 4 * 2 * codec.bytes_per_layer(3, 16)
    assert pages.whole == there.whole == there.bytes == 4 * slots + channels
    assert pages.bytes == slots + channels


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_what_pages_hold_on_the_device_is_counted(codec: Codec) -> None:
    with Ledger() as ledger:
        pages = pages_of(codec)
    assert ledger.held(*pages._home) == pages.bytes
    assert ledger.held() == pages.bytes + sum(home.nbytes for home in pages._home)


@pytest.mark.parametrize("size", [2**20, 2**20 + 1, 3 * 2**19 + 1, 2**21 - 1])
@pytest.mark.parametrize("layers", [30, 34, 40, 48])
def test_pinned_pages_take_hardly_more_than_their_bytes(size: int, layers: int) -> None:
    """PyTorch rounds each piece of pinned memory up to a power of two."""
    pieces = transfer.pieces(layers, size)
    assert sum(pieces) == layers
    assert sum(transfer.power_of_two(some * size) for some in pieces) <= 1.1 * layers * size


def test_pages_of_one_piece_are_pages_all_the_same() -> None:
    class Unpinned(transfer.CudaSide):
        def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype)

    pages = Unpinned(torch.device("cuda")).pages(5, (3, 2, 7))
    for number, page in enumerate(pages):
        page.fill_(number)
    assert [page.unique().tolist() for page in pages] == [[0], [1], [2], [3], [4]]
    assert {(page.shape, page.dtype, page.is_contiguous()) for page in pages} == {((3, 2, 7), torch.uint8, True)}


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_the_parts_of_a_page_lie_side_by_side_and_do_not_overlap(codec: Codec) -> None:
    pages = pages_of(codec)
    for state in pages.states():
        parts = [part for name, part in state.items() if name in dict.fromkeys(f"{k}.{one}" for k in "kv" for one in codec.parts(16))]
        for number, part in enumerate(parts):
            part.view(torch.uint8).fill_(number)
        assert [sorted(set(part.reshape(-1).view(torch.uint8).tolist())) for part in parts] == [[number] for number in range(len(parts))]


@pytest.mark.parametrize("slots", [12, 20])
def test_a_page_that_another_layer_has_written_into_is_fetched_anew(slots: int) -> None:
    pages, fresh = written(2)
    with pages.at_hand(1, 20):
        pass
    pages.write(1, slice(12, 15), (fresh[0, 0, :, :, :3], fresh[0, 1, :, :, :3]))
    with pages.at_hand(0, slots) as state:
        assert torch.equal(state["v.plain"][:, :, :slots], fresh[0, 1, :, :, :slots])


def test_what_the_host_has_written_is_fetched_anew() -> None:
    pages, fresh = written(1)
    for new in (fresh[0, 0], fresh[0, 1]):
        pages.states()[0]["k.plain"].copy_(new)
        with pages.at_hand(0, 20) as state:
            assert torch.equal(state["k.plain"], new)


def written(layers: int) -> tuple[Pages, Tensor]:
    """All slots of all layers are, with these keys and values."""
    pages, fresh = pages_of(CODECS[0], layers=layers), torch.randn(layers, 2, 2, 3, 20, 16).bfloat16()
    for layer, (k, v) in enumerate(fresh):
        pages.write(layer, slice(0, 20), (k, v))
    return pages, fresh


def test_where_copies_cannot_run_beside_the_computation_each_is_counted() -> None:
    here, far = Side(torch.device("cpu")), Side(torch.device("meta"))
    for side in (here, far):
        side.copy(torch.empty(3), torch.ones(3), side.mark()).synchronize()
    assert (here.waits, far.waits) == (0, 1)
    assert here.fetch(torch.ones(2)).tensor.tolist() == [1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_on_cuda_pages_come_back_as_they_went(codec: Codec) -> None:
    device, x = torch.device("cuda"), torch.randn(6, 2, 2, 3, 20, 16).bfloat16()
    near, far = (kind(codec, StoredSizes(6, 2, 3, 20, 16, torch.bfloat16), device) for kind in (OnDevice, Pages))
    assert isinstance(transfer.side_of(device), transfer.CudaSide)
    for history in (near, far):
        for layer, (k, v) in enumerate(x.to(device)):
            history.write(layer, slice(0, 20), (k, v))
    for _ in range(3):
        for layer in range(6):
            with near.at_hand(layer, 20) as one, far.at_hand(layer, 20) as other:
                assert all(torch.equal(one[name].view(torch.uint8), other[name].contiguous().view(torch.uint8)) for name in one)
    assert far.waits == 0
