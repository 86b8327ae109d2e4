"""How much attention every key is given: the column sums of a softmax that is never held whole.

The scores are made for a block of queries at a time, so their memory is bounded whatever the length of the film.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import logging
import os
import re
import subprocess
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

SCORES_AT_MOST = 2**25
"""Scores (query x key pairs) that are in memory at a time; at least those of one query."""

Grouped = Literal["mean", "max"]

CANNOT = re.compile(
    "C compiler|C[+][+] compiler|newly compiled|cache dir|active drivers|libcuda|kernel image|unsupported toolchain|PassManager|CUDA 10"
)
"""What Triton says, in errors of no kind of its own, where there is no compiler, no driver, or a card that it does not know."""

log = logging.getLogger(__name__)
_off: list[str] = []
"""Why there are no kernels in this process; empty as long as there are."""


def column_sums(q: Tensor, k: Tensor, grouped: Grouped = "mean", at_most: int = SCORES_AT_MOST) -> Tensor:
    """sum_i softmax_j(q_i . k_j / sqrt(D)): [R, G * H, Q, D], [R, H, N, D] -> float32 [R, H, N], which add up to Q along N.

    Where `G` query heads share a key head, "mean" takes the mean of their attention; "max" takes, before the softmax, the
    largest of their logits (R-KV, and FlowCache after it). Whatever the dtypes, sums and softmax are in float32. Triton
    kernels do it on CUDA where triton is installed, `in_blocks` elsewhere.
    """
    sums = _by_triton(q, k, grouped == "max") if q.is_cuda and not _off else None
    return in_blocks(q, k, grouped, at_most) if sums is None else sums


def _by_triton(q: Tensor, k: Tensor, largest: bool) -> Tensor | None:
    """None where the kernels are not for such tensors, or cannot be made on this machine, which is found once. Other errors are the caller's."""
    try:
        kernels = _triton()
        if kernels is None or not kernels.serves(q, k):
            return None
        with torch.cuda.device(q.device):
            sums: Tensor = kernels.column_sums(q, k, largest)
            return sums
    except Exception as error:
        if not cannot_be_made(error):
            raise
        _off.append(str(error))
        log.warning("attention sums are made by PyTorch from now on, since the Triton kernels cannot be made here: %s", error)
        return None


def cannot_be_made(error: Exception) -> bool:
    """Whether an error means that kernels cannot be compiled or loaded on this machine: not a lack of memory, nor a fault in a call."""
    if isinstance(error, OSError):
        return error.errno != errno.ENOMEM
    if isinstance(error, ImportError | subprocess.CalledProcessError) or type(error).__module__.startswith("triton."):
        return True
    return isinstance(error, RuntimeError | AssertionError) and CANNOT.search(str(error)) is not None


def in_blocks(q: Tensor, k: Tensor, grouped: Grouped = "mean", at_most: int = SCORES_AT_MOST) -> Tensor:
    """`column_sums` in plain PyTorch, with at most `at_most` scores in memory, or those of one query."""
    batch, heads, n, d = k.shape
    count = q.shape[2]
    queries, keys = q.unflatten(1, (heads, -1)).flatten(0, 1), k.flatten(0, 1)
    group = queries.shape[1]
    heads_at_once = max(1, at_most // (group * count * n))
    queries_at_once = max(1, at_most // (group * n * heads_at_once))
    sums = []
    for some, mine in zip(queries.split(heads_at_once), keys.split(heads_at_once), strict=True):
        columns, wide = some.new_zeros(len(some), n, dtype=torch.float32), mine.float().mT
        for part in some.split(queries_at_once, 2):
            logits = (part.flatten(1, 2).float() * d**-0.5 @ wide).unflatten(1, (group, -1))
            if grouped == "max":
                columns += logits.amax(1).softmax(-1).sum(1)
            else:
                columns += logits.softmax(-1).sum((1, 2)) / group
        sums.append(columns)
    return torch.cat(sums).view(batch, heads, n)


@functools.cache
def _triton() -> ModuleType | None:
    """The kernels; None where triton is not installed or FLOWCACHE_KERNELS is torch."""
    if os.environ.get("FLOWCACHE_KERNELS") == "torch" or importlib.util.find_spec("triton") is None:
        return None
    from . import columns_triton

    return columns_triton
