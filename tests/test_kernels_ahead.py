"""Every Triton kernel, compiled ahead of time for a card that need not be there, as its launcher launches it.

A launcher is given tensors without storage, and what it would launch is compiled with Triton's own compiler and assembler. For sm_90 (H100, H200):
heads of 128 channels in float32, float16 and bfloat16, as far as the kernel serves them, and of 64 in bfloat16, with and without positions; keys
and values to a range of slots and to listed ones; widths of 1536 and 5120; column sums where the largest of six query heads counts, and the mean
of two. For sm_86, whose blocks have less than half of that shared memory, the column sums alone, in bfloat16 with 128 channels.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, bfloat16, complex64, float16, float32

from flowcache_core.kernels import choice
from tests.interpreted import NEEDS_TRITON
from tests.test_columns_triton import LIMITS

Sizes = tuple[tuple[int, torch.dtype], ...]
Launch = Callable[[Any, int, torch.dtype], None]
"""(module of the kernels, channels of a head, dtype): every launcher of the module, once in each of its forms."""

FILES = sorted(Path(choice.__file__).parent.glob("*_triton.py"))
FILMS, TOKENS, SLOTS, HEADS = 2, 4680, 9360, 12
SIZES = ((128, float32), (128, float16), (128, bfloat16), (64, bfloat16))
HALVES = SIZES[1:]


def empty(*shape: int, dtype: torch.dtype = bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rotation(module: Any, d: int, dtype: torch.dtype) -> None:
    k, weight, slots = empty(FILMS, TOKENS, HEADS * d, dtype=dtype), empty(HEADS * d, dtype=dtype), empty(FILMS, HEADS, SLOTS, d, dtype=dtype)
    rope, index = empty(TOKENS, d // 2, dtype=complex64), empty(TOKENS, dtype=torch.int64)
    module.normed_rotated(k, weight, 1e-6, None, d)
    for which, first in ((None, TOKENS), (index, 0)):
        assert module.serves_write(slots, slots, which, first, k, k, weight, rope)
        module.write_normed_rotated(slots, slots, which, first, k, k, weight, 1e-6, rope)


def head_rotation(module: Any, d: int, dtype: torch.dtype) -> None:
    k, weight, slots = empty(FILMS, TOKENS, HEADS * d, dtype=dtype), empty(d, dtype=float32), empty(FILMS, HEADS, SLOTS, d, dtype=dtype)
    rope, index = empty(TOKENS, 3 * (d // 6), dtype=complex64), empty(TOKENS, dtype=torch.int64)
    module.heads_normed(k, weight, weight, 1e-6, None, d)
    for which, first in ((None, TOKENS), (index, 0)):
        assert module.serves_write(slots, slots, which, first, k, k, weight, weight, rope)
        module.write_heads_normed(slots, slots, which, first, k, k, weight, weight, 1e-6, rope)


def modulation(module: Any, d: int, dtype: torch.dtype) -> None:
    width = {128: 5120, 64: 1536}[d]
    x, row, weight = empty(FILMS, TOKENS, width, dtype=dtype), empty(1, 3, 6, width, dtype=dtype)[:, :, 0], empty(width, dtype=float32)
    assert module.serves(x, row, row)
    assert module.serves_post_norm(x, x, row, weight, weight)
    module.normed_modulated(x, row, row, 1e-6)
    module.gated(x, x, row)
    module.gated_normed(x, x, row, weight, weight, 1e-6)


def swiglu(module: Any, d: int, dtype: torch.dtype) -> None:
    x = empty(FILMS, TOKENS, 2 * 107 * d, dtype=dtype)
    assert module.serves(x)
    module.swiglu(x)


def segments(module: Any, d: int, dtype: torch.dtype) -> None:
    part = empty(FILMS, TOKENS, HEADS, d, dtype=dtype).transpose(1, 2), empty(FILMS, HEADS, TOKENS, dtype=float32)
    for count in (2, module.MOST):
        assert module.serves([part] * count)
        module.merge([part] * count)


def columns(module: Any, d: int, dtype: torch.dtype) -> None:
    k = empty(FILMS, HEADS, SLOTS, d, dtype=dtype)
    for group, largest in ((6, True), (2, False)):
        q = empty(FILMS, TOKENS, group * HEADS, d, dtype=dtype).transpose(1, 2)
        assert module.serves(q, k)
        module.column_sums(q, k, largest)


CASES: dict[str, tuple[Launch, Sizes]] = {
    "columns_triton": (columns, HALVES),
    "head_rotation_triton": (head_rotation, SIZES),
    "modulation_triton": (modulation, SIZES),
    "rotation_triton": (rotation, SIZES),
    "segments_triton": (segments, HALVES),
    "swiglu_triton": (swiglu, SIZES[:3]),
}


def kernels_in_files() -> dict[str, set[str]]:
    """By file, the functions of Triton that no other one calls, there or in another file: those that are launched."""
    functions, parts = {}, set()
    for file in FILES:
        tree = ast.parse(file.read_text())
        mine = {one.name: one for one in tree.body if isinstance(one, ast.FunctionDef) and "triton.jit" in map(ast.unparse, one.decorator_list)}
        home = {name.name: one.module for one in tree.body if isinstance(one, ast.ImportFrom) for name in one.names}
        calls = (node.func.id for one in mine.values() for node in ast.walk(one) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
        parts |= {(home.get(name, file.stem), name) for name in calls}
        functions[file.stem] = mine.keys()
    kernels = {file: {name for name in names if (file, name) not in parts} for file, names in functions.items()}
    return {file: names for file, names in kernels.items() if names}


class Card:
    """As much of a driver of Triton as a compiler asks for."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.number = 10 * capability[0] + capability[1]

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(name: str, card: tuple[int, int], sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Kernels that the launchers of a module launch at all sizes -> bytes of shared memory of the form that takes most."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    shared: dict[str, int] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **form: Any) -> None:
        assert self.fn.__module__.endswith(name)
        kernel = run(self, *args, grid=grid, warmup=True, **form)
        assert kernel.asm["cubin"]
        shared[self.fn.__name__] = max(shared.get(self.fn.__name__, 0), kernel.metadata.shared)

    monkeypatch.setattr(driver, "_active", Card(card))
    monkeypatch.setattr(choice, "capability_of", lambda device: card)
    monkeypatch.setattr(JITFunction, "run", compile_only)
    module = importlib.import_module(f"flowcache_core.kernels.{name}")
    for d, dtype in sizes:
        CASES[name][0](module, d, dtype)
    return shared


def test_every_kernel_has_a_case() -> None:
    assert kernels_in_files().keys() == CASES.keys()


@NEEDS_TRITON
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_compiles_and_fits_the_shared_memory_of_a_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = compiled(name, (9, 0), CASES[name][1], monkeypatch)
    assert shared.keys() == kernels_in_files()[name], "every kernel of the file is launched"
    assert max(shared.values()) <= LIMITS[9, 0] * 1024, shared


@NEEDS_TRITON
def test_the_column_sums_fit_a_card_with_less_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(compiled("columns_triton", (8, 6), ((128, bfloat16),), monkeypatch).values()) <= LIMITS[8, 6] * 1024
