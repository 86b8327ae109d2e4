"""When the Triton kernels are given up for good, and when an error is the caller's, on kernels that are pretended."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flowcache_core.kernels import columns


class OnCuda(Tensor):
    """A tensor of the processor that says it is on CUDA."""

    is_cuda = True


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
    """Raises its errors one after the other, then serves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: BaseException) -> None:
        self.errors, self.asked = list(errors), 0
        monkeypatch.setattr(columns, "_triton", lambda: SimpleNamespace(serves=lambda q, k: True, column_sums=self.column_sums))
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    def column_sums(self, q: Tensor, k: Tensor, largest: bool) -> Tensor:
        self.asked += 1
        if self.errors:
            raise self.errors.pop(0)
        return torch.full(k.shape[:3], 7.0)


@pytest.fixture(autouse=True)
def kernels_are_on() -> Iterator[None]:
    columns._off.clear()
    yield
    columns._off.clear()


@pytest.fixture
def qk() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 2, 5, 16).as_subclass(OnCuda), torch.randn(1, 2, 9, 16).as_subclass(OnCuda)


@pytest.mark.parametrize("error", CANNOT, ids=str)
def test_kernels_that_cannot_be_made_are_given_up_once_and_it_is_said_why(
    error: Exception, qk: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = Kernels(monkeypatch, error)
    for _ in range(2):
        torch.testing.assert_close(columns.column_sums(*qk), columns.in_blocks(*qk))
    assert kernels.asked == 1
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("attention sums are made by PyTorch from now on")
    assert said.endswith(str(error))


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_are_the_callers_and_the_kernels_stay(
    error: BaseException, qk: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = Kernels(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        columns.column_sums(*qk)
    assert caught.value is error
    assert columns.column_sums(*qk).eq(7).all()
    assert kernels.asked == 2
    assert not caplog.records


def test_a_triton_that_cannot_be_imported_is_given_up_too(
    qk: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ImportError("No module named 'triton.language'")

    monkeypatch.setattr(columns, "_triton", broken)
    for _ in range(2):
        torch.testing.assert_close(columns.column_sums(*qk), columns.in_blocks(*qk))
    assert len(caplog.records) == 1


def test_what_failed_holds_no_tensors(qk: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is kept keeps its traceback, and with it the queries and keys of the call."""
    Kernels(monkeypatch, CANNOT[2])
    columns.column_sums(*qk)
    assert columns._off == [str(CANNOT[2])]
