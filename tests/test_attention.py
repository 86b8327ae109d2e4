"""Attention by the kernel in force, and how that is chosen: against float64, for whatever runs here, and for cards that are pretended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowcache_core.kernels import attention as module
from flowcache_core.kernels.attention import PYTORCH, Kernel, attending, attention, by_pytorch, in_force, kernel_for, products, runs

FLASH, CUDNN, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
CARD = torch.device("cuda", 0)
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of outputs that are means of normal values, in which 16-bit products round their scores."""
EDGES = ((1, 1), (1, 65), (7, 64), (63, 129), (129, 63), (65, 7))
"""Queries and keys."""


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float64, every query head with a copy of its key head."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    return (q.double() @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def qkv(queries: int, keys: int, dtype: torch.dtype = torch.float32, heads: int = 2, d: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Views as networks and caches make them: heads beside channels, and slots out of a longer buffer."""
    torch.manual_seed(queries * 1000 + keys)
    buffers = torch.randn(2, 2, heads, keys + 9, d).to(dtype)
    return torch.randn(2, queries, heads, d).to(dtype).transpose(1, 2), *(x[:, :, 4 : 4 + keys] for x in buffers)  # type: ignore[return-value]


def pinned(backend: SDPBackend) -> Kernel:
    return Kernel(backend.name, torch.nn.functional.scaled_dot_product_attention, lambda: sdpa_kernel(backend))


KERNELS = (PYTORCH, Kernel("products", products), pinned(FLASH), pinned(SDPBackend.MATH))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(("queries", "keys"), EDGES)
def test_every_kernel_equals_float64(kernel: Kernel, dtype: torch.dtype, queries: int, keys: int) -> None:
    q, k, v = qkv(queries, keys, dtype)
    with attending(kernel):
        out = attention(q, k, v)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    torch.testing.assert_close(out.double(), exact(q, k, v), rtol=0, atol=CLOSE[dtype])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_zero_keys_and_large_magnitudes_neither_overflow_nor_vanish(kernel: Kernel, dtype: torch.dtype) -> None:
    q, k, v = qkv(9, 12, dtype)
    with attending(kernel):
        even = attention(q, torch.zeros_like(k), v)
        sharp = attention(100 * q, 30 * k, v)
    torch.testing.assert_close(even.double(), v.double().mean(2, keepdim=True).expand(-1, -1, 9, -1), rtol=0, atol=CLOSE[dtype])
    assert sharp.isfinite().all()
    if dtype.itemsize > 2:  # 16-bit scores of this size are too coarse to tell the largest
        torch.testing.assert_close(sharp.double(), exact(100 * q, 30 * k, v), rtol=0, atol=5e-3)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_query_heads_share_a_key_head_under_every_kernel(heads: int) -> None:
    q, (_, k, v) = torch.randn(2, 9, 6, 16).transpose(1, 2), qkv(1, 30, heads=heads, d=16)
    seen: list[tuple[int, ...]] = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.shape[1], k.shape[1]))
        return by_pytorch(q, k, v)

    with attending(Kernel("counted", counted)):
        torch.testing.assert_close(attention(q, k, v).double(), exact(q, k, v), rtol=0, atol=2e-6)
    assert seen == [(heads, heads)]


def test_a_kernel_is_in_force_in_its_block_and_thread_alone() -> None:
    one, other = (Kernel(name, by_pytorch) for name in "ab")
    names: list[str] = []
    with attending(one):
        with attending(other):
            names.append(in_force().name)
        thread = threading.Thread(target=lambda: names.append(in_force().name))
        thread.start()
        thread.join()
        names.append(in_force().name)
    assert [*names, in_force().name] == ["b", PYTORCH.name, "a", PYTORCH.name]


def test_an_error_takes_the_kernel_out_of_force() -> None:
    def fail(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise KeyError

    with pytest.raises(KeyError), attending(Kernel("a", fail)):
        attention(*qkv(1, 1))
    assert in_force() is PYTORCH


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Kernel]]:
    """What is chosen on a card of some compute capability, where these backends run."""

    def chosen(capability: tuple[int, int], *backends: SDPBackend, dtype: torch.dtype = torch.bfloat16, cudnn: int = 91501) -> Kernel:
        kernel_for.cache_clear()
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        monkeypatch.setattr(module, "capability_of", lambda device: capability)
        monkeypatch.setattr(module, "_runs", lambda backend, *more: backend in backends)
        return kernel_for(CARD, dtype, 128)

    yield chosen
    kernel_for.cache_clear()


def test_a_card_has_its_fastest_fused_kernel_first(card: Callable[..., Kernel]) -> None:
    every = FLASH, CUDNN, EFFICIENT
    assert card((9, 0), *every).name == card((10, 3), *every).name == "PyTorch, cuDNN or flash or memory-efficient"
    assert card((8, 6), *every).name == card((12, 0), *every).name == card((9, 0), *every, cudnn=91002).name == "PyTorch, flash or memory-efficient"
    assert card((9, 0), EFFICIENT, dtype=torch.float32).name == "PyTorch, memory-efficient"
    assert kernel_for(torch.device("cpu"), torch.bfloat16, 128) is PYTORCH


def test_whole_score_matrices_are_out_of_force_where_a_fused_kernel_runs(card: Callable[..., Kernel]) -> None:
    enabled = torch.backends.cuda.math_sdp_enabled
    with attending(card((8, 0), FLASH)):
        assert not enabled()
        torch.testing.assert_close(attention(*qkv(7, 9)).double(), exact(*qkv(7, 9)), rtol=0, atol=2e-6)
    assert enabled()


def test_a_card_without_a_fused_kernel_says_so_once(card: Callable[..., Kernel], caplog: pytest.LogCaptureFixture) -> None:
    kernel = card((7, 0), dtype=torch.float64)
    assert kernel_for(CARD, torch.float64, 128) is kernel
    assert kernel.name == "PyTorch, whole score matrices"
    (record,) = caplog.records
    assert "no fused attention for torch.float64 heads of 128" in record.getMessage()


def test_a_refusal_of_pytorch_is_no_kernel_and_a_lack_of_memory_is_the_callers() -> None:
    def refuse() -> None:
        torch.ones(2) @ torch.ones(3)

    def run_out() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert runs(lambda: None)
    assert not runs(refuse)
    with pytest.raises(torch.OutOfMemoryError):
        runs(run_out)


@pytest.mark.parametrize("backend", [FLASH, CUDNN, EFFICIENT])
def test_a_backend_is_tried_on_the_device_itself(backend: SDPBackend) -> None:
    assert module._runs(backend, torch.device("cpu"), torch.float32, 64) == (backend == FLASH)


def test_a_backend_is_tried_on_more_than_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's refuses one key, so it would never be chosen."""

    def as_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[2] == 1:
            raise RuntimeError("No available kernel. Aborting execution.")
        return v

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", as_cudnn)
    assert module._runs(CUDNN, torch.device("cpu"), torch.bfloat16, 128)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("queries", "keys"), EDGES)
def test_on_cuda_what_is_chosen_equals_float64(dtype: torch.dtype, queries: int, keys: int) -> None:
    q, k, v = (x.cuda() for x in qkv(queries, keys, dtype))
    with attending(kernel_for(torch.device("cuda"), dtype, 32)):
        torch.testing.assert_close(attention(q, k, v).double(), exact(q, k, v), rtol=0, atol=max(CLOSE[dtype], 2e-3))
