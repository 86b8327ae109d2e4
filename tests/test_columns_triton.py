"""The Triton kernels against plain PyTorch, on the CPU: by Triton's interpreter, which has to be asked for before triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from flowcache_core.kernels import columns_triton

torch.manual_seed(0)
for films, heads, group, queries, keys, d in ((1, 1, 1, 1, 1, 16), (2, 2, 3, 65, 63, 16), (1, 2, 2, 7, 129, 32), (2, 1, 1, 70, 130, 128)):
    for dtype in (torch.float16, torch.bfloat16):
        cache = torch.randn(films, heads, keys + 9, d).to(dtype)
        q, k = (3 * torch.randn(films, queries, heads * group, d)).to(dtype).transpose(1, 2), cache[:, :, 4 : 4 + keys]
        assert columns_triton.serves(q, k)
        logits = q.double().unflatten(1, (heads, group)) @ k.double().mT.unsqueeze(2) / d**0.5
        for largest, exact in ((True, logits.amax(2).softmax(-1).sum(2)), (False, logits.softmax(-1).mean(2).sum(2))):
            sums = columns_triton.column_sums(q, k, largest)
            torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sums.sum(-1), torch.full((films, heads), float(queries)), rtol=1e-5, atol=1e-5)
print("agree")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernels_agree_with_pytorch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "agree\n", done.stderr
