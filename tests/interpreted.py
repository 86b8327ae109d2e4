"""Scripts whose Triton kernels run on the CPU, in Triton's interpreter, or on CUDA. Which has to be known before triton is imported: in a process of
their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ON_CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
DEVICES = pytest.mark.parametrize("device", ["cpu", ON_CUDA])

PREPARED = """
import mmap
import os
import tempfile

import torch
from torch.nn import functional as F

DEVICE = os.environ["TEST_DEVICE"]
torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_grad_enabled(False)
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

def close(out, exact, dtype, roundings=1):
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype and out.is_contiguous()
    rtol = roundings * (0.51 * eps if dtype != torch.float32 else 8 * eps)
    torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=4e-6 * max(1.0, float(exact.abs().max())) if dtype == torch.float32 else 8e-6)

def phases(tokens, pairs):
    angles = 50 * torch.randn(tokens, pairs, dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles)

def space(count):
    "So many numbers in float16; on the processor, pages of a file that has holes."
    if DEVICE == "cuda":
        return torch.empty(count, dtype=torch.float16)
    sparse = tempfile.TemporaryFile()
    sparse.truncate(2 * count + 4096)
    return torch.frombuffer(mmap.mmap(sparse.fileno(), 0), dtype=torch.float16)

def far_apart(films, tokens, width):
    "Float16 whose films begin 2^31 elements apart."
    rows = space(2**31 * (films - 1) + tokens * width).as_strided((films, tokens, width), (2**31, width, 1))
    return rows.copy_(torch.randn(films, tokens, width))

def written(fresh, v, write):
    "`write(keys, values, at)` has to put `fresh` [B, H, T, D] and v [B, T, H D] into slots, by range and by number, and to touch no others."
    films, heads, tokens, d = fresh.shape
    for at in (slice(2, 2 + tokens), torch.randperm(tokens + 5)[:tokens]):
        whole = torch.randn(2, films + 1, heads, tokens + 5, d).to(fresh.dtype)
        expected = whole.clone()
        for buffer, new in zip(expected[:, 1:], (fresh, v.unflatten(2, (heads, d)).transpose(1, 2))):
            buffer[:, :, at] = new
        write(whole[0, 1:], whole[1, 1:], at)
        assert torch.equal(whole, expected)
"""

FILM = """
from dataclasses import replace
from flowcache_core.bench.geometries import GEOMETRIES, sized
from flowcache_core.kernels import choice
from flowcache_core.run.generate import generate

def agree_on(name, modules, operations, steps=3):
    "Films of a small geometry by both paths: the kernels that `operations` name are asked under triton, and none under torch."
    called, by_triton = set(), choice.by_triton
    def noted(operation, module, device, call):
        called.add(operation)
        return by_triton(operation, module, device, call)
    for module in modules:
        module.by_triton = noted
    geometry = GEOMETRIES[name]
    job = replace(geometry.job, steps=steps, ar_step=1, size=16)
    for dtype, within in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        bundle = sized(geometry, 1, dtype, DEVICE)
        films = {}
        for path in ("torch", "triton"):
            os.environ["FLOWCACHE_KERNELS"] = path
            called.clear()
            films[path] = generate(bundle, job)[0]
            assert called == (operations if path == "triton" else set()), called
        change = (films["triton"] - films["torch"]).norm() / films["torch"].norm()
        assert change <= within and (change > 0 or dtype == torch.bfloat16), (dtype, change)
"""


def agrees(script: str, device: str = "cpu") -> None:
    """The script has to come to its end and print "agree"."""
    interpreter = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "FLOWCACHE_KERNELS": "triton", "TEST_DEVICE": device, **interpreter},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "agree\n", done.stderr
