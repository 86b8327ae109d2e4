"""Scripts whose Triton kernels run on the CPU, in Triton's interpreter. It has to be asked for before triton is imported: in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def agrees(script: str) -> None:
    """The script has to come to its end and print "agree"."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "FLOWCACHE_KERNELS": "triton"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "agree\n", done.stderr
