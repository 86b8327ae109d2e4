"""What machine this is, and what code."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch


def fast_dtype() -> torch.dtype:
    """The dtype for a small model on the processor: bfloat16 where it is multiplied natively, else float32."""
    return torch.bfloat16 if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def device_name(device: torch.device | None = None) -> str:
    """Of a device, or of the accelerator if there is one: its name, that of the processor with the number of threads torch uses."""
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        model = next(line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def memory(device: torch.device, processes: int = 1) -> float:
    """Bytes of an accelerator, or of the machine's memory for each of so many processes; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / processes


@cache
def commit() -> str:
    """The checkout's commit, with + when files are changed; unknown outside a checkout. As it was when this process asked first: in a fresh
    checkout git reads every file to answer."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "-C", str(here), "diff", "--quiet", "HEAD", "--", "."], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")
