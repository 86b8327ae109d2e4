"""By which path operations go, when Triton kernels are given up, and when an error is the caller's: on kernels that are pretended."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from flowcache_core.kernels import choice
from flowcache_core.kernels.choice import VARIABLE, Path, by_triton, path_for, tile_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class CompilationError(Exception):
    """As Triton has one."""


CompilationError.__module__ = "triton.compiler.errors"

CANNOT = [
    CompilationError("at 3:5: dot wants a shape of at least 16"),
    ImportError("libtriton.so: undefined symbol"),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."),
    subprocess.CalledProcessError(1, ["gcc"]),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "ptxas"),
    PermissionError(errno.EACCES, "Permission denied", "/.triton"),
    RuntimeError("0 active drivers ([]). There should only be one."),
    AssertionError("libcuda.so cannot found!"),
    RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"),
    RuntimeError("PassManager::run failed"),
]
OTHERS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ValueError("a wrong argument"),
    AssertionError("shapes differ"),
    KeyboardInterrupt(),
]


class Kernels:
    """Raises its errors one after the other, then serves. In place of every module of kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: BaseException) -> None:
        self.errors, self.asked = list(errors), 0
        monkeypatch.setattr(choice.importlib, "import_module", lambda name, package: self)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    def double(self, x: Tensor) -> Tensor:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        return 2 * x


def doubled(x: Tensor, operation: str = "doubling", device: torch.device = CUDA) -> Tensor | None:
    """Through a kernel that says that it is on CUDA, for a tensor of the processor."""
    return by_triton(operation, "doubling_triton", device, lambda kernels: kernels.double(x))


@pytest.fixture(autouse=True)
def nothing_is_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice._off.clear()
    yield
    choice._off.clear()


@pytest.mark.parametrize("error", CANNOT, ids=str)
def test_kernels_that_cannot_be_made_are_off_from_then_on_and_one_line_says_why(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = Kernels(monkeypatch, error)
    assert [doubled(torch.ones(1)) for _ in range(3)] == [None, None, None]
    assert kernels.asked == 1
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.endswith(str(error))
    assert path_for(CUDA, "doubling") == Path("torch", f"Triton kernels cannot be made here: {error}")


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_are_the_callers_and_the_kernels_stay(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = Kernels(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        doubled(torch.ones(1))
    assert caught.value is error
    assert doubled(torch.ones(1)) == 2
    assert kernels.asked == 2
    assert not caplog.records
    assert path_for(CUDA) == Path("triton")


def test_a_machine_without_triton_falls_back_once_for_all_operations(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def absent(name: str, package: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(choice.importlib, "import_module", absent)
    assert [doubled(torch.ones(1), operation) for operation in ("doubling", "tripling")] == [None, None]
    assert len(caplog.records) == 1


def test_a_fault_of_one_kernel_ends_its_operation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    Kernels(monkeypatch, CompilationError("out of resource: shared memory, Required: 163840, Hardware limit: 101376"))
    assert doubled(torch.ones(1), "tripling") is None
    assert doubled(torch.ones(1)) == 2
    assert path_for(CUDA, "tripling").name == "torch"
    assert path_for(CUDA) == Path("triton")


def test_what_failed_holds_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is kept keeps its traceback, and with it the tensors of the call."""
    Kernels(monkeypatch, CANNOT[2])
    doubled(torch.ones(1))
    assert list(map(type, choice._off.values())) == [str]


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels(monkeypatch)
    for word, device, expected in (("auto", CPU, None), ("torch", CUDA, None), ("triton", CPU, None), ("triton", CUDA, 2), ("", CUDA, 2)):
        monkeypatch.setenv(VARIABLE, word)
        assert doubled(torch.ones(1), device=device) == expected
    assert kernels.asked == 2
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match="FLOWCACHE_KERNELS is 'cuda': set it to one of auto, triton, torch"):
        doubled(torch.ones(1))


def test_triton_by_name_is_no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    Kernels(monkeypatch, CANNOT[1])
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=r"FLOWCACHE_KERNELS is triton, and the kernel for doubling cannot be made here .*: set it to auto"):
        doubled(torch.ones(1))
    assert path_for(CUDA) == Path("triton")


def test_the_interpreter_serves_the_processor_where_triton_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Kernels(monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doubled(torch.ones(1), device=CPU) is None
    monkeypatch.setenv(VARIABLE, "triton")
    assert doubled(torch.ones(1), device=CPU) == 2


def test_a_card_has_the_tile_of_the_nearest_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {(8, 0): "large", (8, 6): "small", (9, 0): "larger", (12, 0): "small too"}
    for card, expected in (((7, 5), "large"), ((8, 0), "large"), ((8, 9), "small"), ((9, 0), "larger"), ((10, 3), "larger"), ((12, 1), "small too")):
        monkeypatch.setattr(choice, "capability_of", lambda device, card=card: card)
        assert tile_for(tiles, CUDA) == expected
    monkeypatch.undo()
    assert tile_for(tiles, CPU) == "large"
