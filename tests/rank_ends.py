"""The commands on several devices, and of these one that ends in the middle; `rank_cases` runs it for `test_ranks`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flowcache_core.__main__ import main as command
from flowcache_core.demo import run as demo
from flowcache_core.models.bundle import load_bundle
from flowcache_core.ranks.group import Group
from tests.forked import forked

ARGUMENTS = ["flowcache_core", "demo", "--arms", "uncached", "--frames", "33", "--steps", "6"]
AFTER = 12
"""Collectives of the one that ends."""


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted() -> None:
    raise KeyboardInterrupt


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


ENDS = {"killed": (killed, 4, 3, "on"), "stopped": (stopped, 2, 0, "off"), "interrupted": (interrupted, 2, 1, "off")}
"""How it ends, of how many devices, and which; whether each has its share of the weights."""


def as_torchrun(rank: int, devices: int, port: int) -> None:
    """Tells a process, as torchrun does, which one it is."""
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{devices}", "MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def scaled(rank: int, port: int, folder: Path) -> None:
    """`bench scale` on two devices, which have no room for the weights."""
    as_torchrun(rank, 2, port)
    sys.argv = [
        "flowcache_core",
        "bench",
        "scale",
        "--size",
        "32",
        "--steps",
        "2",
        "--width",
        "256",
        "--layers",
        "1",
        "--device-memory",
        "0.0001",
        "--json",
        f"{folder}/scale.json",
    ]
    os.dup2(os.open(folder / f"scale-{rank}.txt", os.O_WRONLY | os.O_CREAT), 1)
    sys.exit(command())


def device(rank: int, name: str, port: int, folder: Path) -> None:
    end, devices, who, fsdp = ENDS[name]
    as_torchrun(rank, devices, port)
    os.dup2(os.open(folder / f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT), 2)
    calls, exchange = 0, Group.exchange

    def ending(self: Group, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == who and calls == AFTER:
            (folder / f"{name}-began").write_text(f"{time.time()}")
            end()
        return exchange(self, *args)

    sys.argv = [*ARGUMENTS, "--fsdp", fsdp, "--out", f"{folder / name}"]
    with patch.object(Group, "exchange", ending):
        sys.exit(command())


def ended(folder: Path) -> dict[str, Any]:
    """Per way to end: statuses of the devices, seconds until all had ended, what they printed, and whether a file was written."""
    out, bundle = {}, load_bundle()
    with patch.object(demo, "load_bundle", lambda *_, **__: bundle), patch.object(demo, "warm_up", lambda _: None):
        for name, (_, devices, _, _) in ENDS.items():
            statuses = forked(devices, partial(device, name=name, port=free_port(), folder=folder))
            took = time.time() - float((folder / f"{name}-began").read_text())
            texts = [(folder / f"{name}-{rank}.txt").read_text() for rank in range(devices)]
            out[name] = {"statuses": statuses, "seconds": took, "texts": texts, "files": (folder / name).exists()}
    return out
