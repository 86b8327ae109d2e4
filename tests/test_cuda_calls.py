"""Every call of torch.cuda that is for one device says for which: without it is for the current one, on which a run need not be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from flowcache_core.bench import kernels, model
from flowcache_core.device import device_name
from flowcache_core.run.clock import Clock

PACK = Path(__file__).parent.parent
FOR_ALL = {"is_available", "device_count", "current_device", "empty_cache", "Event"}
"""Of the machine, of this process, or of no device before they are recorded."""
SECOND = torch.device("cuda:1")


def without_device(source: str) -> Iterator[str]:
    """Calls of torch.cuda without an argument, events that are recorded on whatever stream is current, and tensors on whatever card is."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, bare = ast.unparse(node.func), not node.args and not node.keywords
        of_cuda = name == f"torch.cuda.{node.func.attr}" and node.func.attr not in FOR_ALL
        somewhere = any(word.arg == "device" and isinstance(word.value, ast.Constant) and word.value.value == "cuda" for word in node.keywords)
        if (bare and (of_cuda or node.func.attr == "record")) or somewhere:
            yield f"{name} in line {node.lineno}"


def test_no_call_is_for_whatever_device_is_current() -> None:
    files = [file for folder in ("flowcache_core", "nodes") for file in (PACK / folder).rglob("*.py")]
    assert {f"{file.relative_to(PACK)}": found for file in files if (found := list(without_device(file.read_text())))} == {}
    seen = "torch.cuda.synchronize()\nevent.record()\ntorch.empty(3, device='cuda')\ntorch.cuda.is_available()\ntorch.cuda.synchronize(device)"
    assert len(list(without_device(seen))) == 3


class Recorded:
    """An event, and its stream, of a card that is not there."""

    on: ClassVar[list[Any]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.on.append(stream)

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Recorded) -> float:
        return 2000.0


def test_a_bench_times_the_card_that_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    empty = torch.empty
    Recorded.on.clear()

    def here(*sizes: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        Recorded.on.append(device)
        return empty(*sizes, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"card {device}")
    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    monkeypatch.setattr(kernels, "COLD", 1)
    monkeypatch.setattr(torch, "empty", here)
    assert model.clocked(lambda: "out", SECOND)[1] == "out"
    assert kernels.timings(lambda: None, SECOND, 0.0)[0] == 2.0
    clock = Clock()
    with clock.measure("network", SECOND):
        pass
    assert clock.spent["network"] == 2.0
    assert set(waited) == set(Recorded.on) == {SECOND}
    assert (len(waited), device_name(SECOND)) == (3, "card cuda:1")
    assert "card" not in device_name(torch.device("cpu"))
