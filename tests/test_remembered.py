"""What a state holds: every attribute that a run changes, and values as they were."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores import Even
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import Motion
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.target import Target
from flowcache_core.run.remembered import Reader, Writer, kinds_of
from flowcache_core.run.states import States
from flowcache_core.sampling.solvers import SOLVERS
from tests.resuming import Setup, Stopped, same


def test_what_no_run_remembers_is_refused_when_it_is_written_and_the_run_goes_on(resumable: Callable[..., Setup], tmp_path: Path) -> None:
    class Foreign:
        pass

    class Odd(type(SOLVERS[1]())):  # type: ignore[misc]
        name: ClassVar[str] = "odd"

        def start(self, rng: torch.Generator) -> Any:
            return Foreign()

    made = resumable(solver=Odd())
    film, report = made.make(States(tmp_path / "states"))
    same(made.make(), (film, report))
    assert "loop.walk_of[1].memory is of type test_what_no" in " ".join(report.notes)
    with pytest.raises(TypeError, match="run is of type int64, which cannot be written down"):
        Writer(kinds_of()).write(np.int64(3))


def test_values_come_back_as_they_were() -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    value = {
        "numbers": [0, -1.5, float("inf"), True, None, "text"],
        ("a", 1): (shared, shared.mT, shared[:, 1:]),
        3: {torch.bfloat16: None}.get(torch.float, np.arange(4, dtype=np.int32)[::2]),
        "set": {1, 2},
        "empty": torch.empty(2, 0, 3),
        "one": torch.tensor(7, dtype=torch.int64),
        "code": torch.ones(3).to(torch.float8_e4m3fn),
    }
    writer = Writer(kinds_of())
    tree = writer.write(value)
    back = Reader(kinds_of(), lambda place: writer.tensors[place].clone(), torch.device("cpu")).read(tree)
    assert list(back) == list(value)
    assert back["numbers"] == value["numbers"]
    assert back["set"] == {1, 2}
    first, turned, part = back["a", 1]
    assert torch.equal(first, shared)
    assert torch.equal(turned, shared.mT)
    assert turned.stride() == shared.mT.stride(), "sums depend on the order in memory"
    assert torch.equal(part, shared[:, 1:])
    assert back[3].tolist() == [0, 2]
    assert back["empty"].shape == (2, 0, 3)
    assert back["one"].item() == 7
    assert back["code"].float().tolist() == [1, 1, 1]


def test_random_numbers_go_on_where_they_stopped() -> None:
    rng = torch.Generator().manual_seed(3)
    torch.randn(5, generator=rng)
    writer = Writer(kinds_of())
    tree = writer.write(rng)
    again = Reader(kinds_of(), lambda place: writer.tensors[place].clone(), torch.device("cpu")).read(tree)
    assert torch.equal(torch.randn(5, generator=rng), torch.randn(5, generator=again))


def test_every_attribute_that_a_run_changes_is_remembered(resumable: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the objects that are there before a run: what differs after some rows is remembered, or follows from what is."""
    from flowcache_core.run.session import Session

    follows = {"_text", "_last", "_chunk_text", "_time_changes", "_caches", "_segments", "_lengths", "_shifts", "seconds", "_started", "_events",
               "told", "_closed", "visits", "_row", "_decisions", "kernels"}  # fmt: skip
    opened: list[tuple[Session, dict[str, set[str]]]] = []

    def parts(session: Session) -> dict[str, Any]:
        kv = session._kv
        report = session.report
        return {"session": session, "state": session.state, "report": report, "clock": report.clock, "history": report.history, "kv": kv,
                "layout": kv.layout, "keeper": kv.keeper}  # fmt: skip

    def seen(one: Any) -> dict[str, str]:
        return {key: repr(value) if not isinstance(value, dict) else repr(list(value)) for key, value in vars(one).items()}

    before: dict[str, dict[str, str]] = {}
    enter = Session.__enter__

    def entering(self: Session) -> Session:
        before.update({name: seen(one) for name, one in parts(self).items()})
        opened.append((self, {}))
        return enter(self)

    monkeypatch.setattr(Session, "__enter__", entering)
    monkeypatch.setattr(Session, "close", lambda self, error=None: None)
    with pytest.raises(Stopped):
        resumable(policy=Motion(0.6, base=Chunkwise(0.6, 2, signature="latent"), coarse=0.3, min_refresh=0.0), kv=Compressor(Even(), 1.5)).make(
            None, 14
        )
    (session, _), changed = opened[0], {}
    for name, one in parts(session).items():
        changed[name] = {key for key, value in seen(one).items() if value != before[name][key]} - set(one.remembers) - follows
    assert not any(changed.values()), changed


def test_dataclasses_of_a_solver_are_known_by_its_file() -> None:
    assert {"UniPCMemory", "MultistepMemory", "ChunkState"} <= kinds_of(SOLVERS[0]()).keys()
    assert "Pace" in kinds_of(Target())
    assert "Pace" not in kinds_of(Planned())
    assert all(dataclasses.is_dataclass(kind) for kind in kinds_of(Target()).values())


class Buffers:
    remembers: ClassVar[tuple[str, ...]] = ("slots", "rest")
    copied: ClassVar[str] = "slots"

    def __init__(self, device: str) -> None:
        self.slots, self.rest = [torch.zeros(2, device=device)], torch.zeros(3, device=device)

    def take_in(self, value: list[torch.Tensor], device: torch.device) -> None:
        self.taken = weakref.ref(value[0]), value[0].device, device


def test_what_is_copied_into_place_comes_through_the_computers_memory_and_is_let_go() -> None:
    """A device holds history once, in the run's own buffers."""
    writer = Writer(kinds_of())
    tree, there, back = writer.write(Buffers("meta")), torch.device("meta"), Buffers("cpu")
    reader = Reader(kinds_of(), lambda place: torch.zeros(writer.tensors[place].shape), there)
    reader.put(back, tree)
    held, came, device = back.taken
    assert (came.type, device, back.rest.device) == ("cpu", there, there)
    assert held() is None
