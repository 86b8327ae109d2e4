"""By which path an operation is computed: Triton kernels or PyTorch. Every operation that has both asks `by_triton`, and nothing else decides.

The environment variable FLOWCACHE_KERNELS is `auto` (Triton on CUDA, where it is installed and works), `triton` (the same, and a machine on which it
does not work is an error; with TRITON_INTERPRET=1 tensors of the processor go through Triton's interpreter) or `torch`.

Kernels are in modules `kernels/*_triton.py`, which alone import triton and are imported here alone. A tile is looked up in a table by the card's
compute capability (`tile_for`): nothing is tuned while a film is made.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, get_args

import torch

Wanted = Literal["auto", "triton", "torch"]
WORDS: tuple[Wanted, ...] = get_args(Wanted)
T = TypeVar("T")
Capability = tuple[int, int]
"""Compute capability of an NVIDIA card, such as (9, 0)."""

VARIABLE = "FLOWCACHE_KERNELS"
EVERY = ""
"""In place of an operation: all of them."""

CANNOT = re.compile(
    "C compiler|C[+][+] compiler|newly compiled|cache dir|active drivers|libcuda|kernel image|unsupported toolchain|PassManager|CUDA 10"
)
"""What Triton says, in errors of no kind of its own, where there is no compiler, no driver, or a card that it does not know."""

log = logging.getLogger(__name__)
_off: dict[str, str] = {}
"""Operations without kernels in this process, and why. The reasons are texts: an error would keep the tensors of its call."""


@dataclass(frozen=True, slots=True)
class Path:
    """`name`: triton or torch; `why`: the reason, where it is not the first choice."""

    name: Literal["triton", "torch"]
    why: str = ""


def wanted() -> Wanted:
    """Raises ValueError for a word that is none of the three."""
    word = os.environ.get(VARIABLE, "") or "auto"
    if word not in WORDS:
        raise ValueError(f"{VARIABLE} is {word!r}: set it to one of {', '.join(WORDS)}, or leave it out")
    return word


def interpreted() -> bool:
    """Whether Triton interprets kernels on the processor, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def path_for(device: torch.device, operation: str = EVERY) -> Path:
    """The path of an operation on a device, as far as is known: that kernels cannot be made is found at their first call.

    Raises ValueError for a FLOWCACHE_KERNELS that is no choice.
    """
    match wanted():
        case "torch":
            return Path("torch", f"{VARIABLE} is torch")
        case "triton" if interpreted():
            pass
        case _ if device.type != "cuda":
            return _without_cuda(device.type)
    why = _off.get(EVERY) or _off.get(operation)
    return Path("torch", why) if why else Path("triton")


@cache
def _without_cuda(kind: str) -> Path:
    return Path("torch", f"Triton kernels are for CUDA, and the device is {kind}")


def by_triton(operation: str, module: str, device: torch.device, call: Callable[[Any], T | None]) -> T | None:
    """What `call` makes with the kernels of `kernels/<module>.py`; None where PyTorch has to: by choice, or since this machine cannot make them.

    That it cannot is found once and logged in one line; a fault of one kernel alone ends this `operation` alone. `call` may return None for
    tensors that the kernels are not written for. Every other error, a lack of memory among them, is the caller's. Raises RuntimeError where
    Triton was asked for by name and cannot be used.
    """
    if path_for(device, operation).name == "torch":
        return None
    try:
        kernels = importlib.import_module(f".{module}", __package__)
        with _on(device):
            return call(kernels)
    except Exception as error:
        if not cannot_be_made(error):
            raise
        if wanted() == "triton":
            raise RuntimeError(f"{VARIABLE} is triton, and the kernel for {operation} cannot be made here ({error}): set it to auto") from error
        _disable(operation, error)
        return None


def sentence(device: torch.device) -> str:
    """By what the kernels of this package have been computed on a device, for the report of a run."""
    path = path_for(device)
    if path.name == "torch":
        return f"PyTorch ({path.why})"
    return "; ".join(("Triton", *(f"PyTorch for {operation} ({why})" for operation, why in _off.items())))


def cannot_be_made(error: Exception) -> bool:
    """Whether an error means that kernels cannot be compiled or loaded on this machine: not a lack of memory, nor a fault in a call."""
    if isinstance(error, OSError):
        return error.errno != errno.ENOMEM
    if isinstance(error, ImportError | subprocess.CalledProcessError) or _of_triton(error):
        return True
    return isinstance(error, RuntimeError | AssertionError) and CANNOT.search(str(error)) is not None


@cache
def capability_of(device: torch.device) -> Capability:
    """(0, 0) for a device that is no CUDA card."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def tile_for(tiles: Mapping[Capability, T], device: torch.device) -> T:
    """Of a table by compute capability, the entry of this card or of the nearest one before it; the first one for any other device."""
    mine = capability_of(device)
    return tiles[max((known for known in tiles if known <= mine), default=min(tiles))]


def _disable(operation: str, error: Exception) -> None:
    which = operation if _of_triton(error) else EVERY
    _off[which] = f"Triton kernels cannot be made here: {error}"
    log.warning("FlowCache: PyTorch computes %s from now on, since the %s", which or "what Triton kernels are for", _off[which])


def _of_triton(error: Exception) -> bool:
    """An error in compiling or sizing one kernel."""
    return type(error).__module__.startswith("triton.")


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device, whatever the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
