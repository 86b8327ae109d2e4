"""Attention without a mask: by the kernel that is in force, which whoever evaluates a network puts there, once for all of its layers.

Self-attention, attention to text and attention to a KV cache all go through `attention`. Without ComfyUI `kernel_for` chooses; in ComfyUI it is the
host's, which this file does not know. What needs the log-sum-exp, or weights, is in `segments.py`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .choice import capability_of

SCORES_AT_MOST = 2**26
"""Elements of the score matrix that the product form may hold in memory."""
FEW_KEYS = 64
CUDNN_CARDS = (9, 10)
"""Major compute capabilities where cuDNN's attention comes before PyTorch's own flash attention, as PyTorch itself has it."""
CUDNN_FROM = 91501
"""The version from which PyTorch does so there: older ones lack a fix for lengths that are no multiple of 128."""
TRIED = 64
"""Tokens on which a backend is tried: cuDNN refuses a single key, whatever else it serves."""

FUSED = {SDPBackend.FLASH_ATTENTION: "flash", SDPBackend.CUDNN_ATTENTION: "cuDNN", SDPBackend.EFFICIENT_ATTENTION: "memory-efficient"}
"""Backends of `scaled_dot_product_attention` that never hold the score matrix, and their names."""

log = logging.getLogger(__name__)

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[B, heads, T, D], [B, heads, L, D] twice -> [B, heads, T, D]; views that are not contiguous, too."""


@dataclass(frozen=True)
class Kernel:
    """What attends. `name`: in the report; `around`: what has to be entered while it is in force."""

    name: str
    call: Call
    around: Callable[[], AbstractContextManager[object]] = nullcontext


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, G * heads, T, D], [B, heads, L, D] twice -> [B, G * heads, T, D], by the kernel in force.

    `G` neighbouring query heads share a key head (grouped-query attention). What torch.compile traces is PyTorch's.
    """
    if q.shape[1] != k.shape[1]:
        return heads_apart(attention(heads_together(q, k.shape[1]), k, v), q.shape[1])
    kernel = PYTORCH if torch.compiler.is_compiling() else _in_force.get()
    return kernel.call(q, k, v)


def by_pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused CPU kernel is slow in bfloat16 on processors without AMX; there two matrix products win as long as the scores are small."""
    if as_products(q, k):
        return products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def as_products(q: Tensor, k: Tensor) -> bool:
    """Whether two matrix products are the faster form."""
    small = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= SCORES_AT_MOST
    return q.device.type == "cpu" and q.element_size() == 2 and small


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The textbook form: softmax(q k^T / sqrt(D)) v. Queries are scaled, of which there are fewer than scores.

    A head at a time: its scores stay in the processor's cache, and keys that are a part of a longer buffer are not copied. A few keys, such as
    those of a short text, are not worth that.
    """
    q = q * q.shape[-1] ** -0.5
    if k.shape[2] <= FEW_KEYS:
        return (q @ k.mT).softmax(-1) @ v
    heads = zip(*(x.flatten(0, 1).unbind() for x in (q, k, v)), strict=True)
    return torch.stack([mine.mm(keys.mT).softmax(-1).mm(values) for mine, keys, values in heads]).unflatten(0, q.shape[:2])


PYTORCH = Kernel("PyTorch", by_pytorch)
_in_force: ContextVar[Kernel] = ContextVar("attention", default=PYTORCH)


def in_force() -> Kernel:
    """The kernel by which `attention` attends now."""
    return _in_force.get()


@contextmanager
def attending(kernel: Kernel) -> Iterator[None]:
    """Until the block ends, in this thread, `attention` is by this kernel."""
    with kernel.around():
        before = _in_force.set(kernel)
        try:
            yield
        finally:
            _in_force.reset(before)


@cache
def kernel_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """What attends to heads of this size without ComfyUI: PyTorch, on CUDA by its fused kernels alone, the fastest first.

    The form that holds the whole score matrix is left to cards and dtypes for which there is no other, and one line says so.
    """
    if device.type != "cuda":
        return PYTORCH
    flash, cudnn, efficient = FUSED
    order = (cudnn, flash, efficient) if prefers_cudnn(device) else (flash, efficient)
    if not (there := [backend for backend in order if _runs(backend, device, dtype, head_dim)]):
        log.warning(
            "FlowCache: PyTorch has no fused attention for %s heads of %d on this device: whole score matrices are held, so larger pictures may run "
            "out of memory", dtype, head_dim,
        )  # fmt: skip
        return Kernel("PyTorch, whole score matrices", F.scaled_dot_product_attention)
    names = " or ".join(FUSED[backend] for backend in there)
    return Kernel(f"PyTorch, {names}", F.scaled_dot_product_attention, partial(sdpa_kernel, there, set_priority=True))


def prefers_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's attention comes first on this card, in this version; elsewhere it is not used."""
    return capability_of(device)[0] in CUDNN_CARDS and (torch.backends.cudnn.version() or 0) >= CUDNN_FROM


def _runs(backend: SDPBackend, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a backend attends to such heads here. Tried on few tokens; a lack of memory is the caller's."""
    x = torch.zeros(1, 1, TRIED, head_dim, dtype=dtype, device=device)
    return runs(lambda: _pinned([backend], x))


def _pinned(backends: Sequence[SDPBackend], x: Tensor) -> None:
    with sdpa_kernel(list(backends)):
        F.scaled_dot_product_attention(x, x, x)


def runs(call: Callable[[], object]) -> bool:
    """Whether a call comes to its end; PyTorch refuses with a RuntimeError, after warnings. OutOfMemoryError is raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def heads_together(q: Tensor, heads: int) -> Tensor:
    """[B, G * heads, T, D] -> [B, heads, G * T, D]: the query heads that share a key head become more queries of that head.

    Without a mask no query knows of another, so this is exact; no key is repeated, and every kernel serves it.
    """
    if q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} query heads cannot share {heads} key heads evenly: their number must be a multiple of {heads}")
    return q.unflatten(1, (heads, -1)).flatten(2, 3)


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """Back again, of anything that there is per query: [B, key heads, G * T, ...] -> [B, heads, T, ...]."""
    return x.unflatten(2, (heads // x.shape[1], -1)).flatten(1, 2)
