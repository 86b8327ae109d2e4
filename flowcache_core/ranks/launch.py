"""The processes that torchrun has started: how they come together, and how each ends when another does."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from ..device import memory
from .group import Group
from .world import ONE, World, largest, timed_machine

TOGETHER = timedelta(seconds=60)
"""In which all processes have to be there."""
SILENT = timedelta(minutes=10)
"""After which a device that says nothing counts as lost; one that has ended is noticed at once."""


FSDP = ("auto", "on", "off")
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fsdp", choices=FSDP, default="auto", help="with several processes: each holds its share of the weights (FSDP2); auto: "
                        "where the network is larger than the memory of a device (default %(default)s)")  # fmt: skip
    parser.add_argument("--device-memory", type=float, help="GiB of a device for weights (default: what it has)")


def sharded(world: World, network: nn.Module, layers: str, args: argparse.Namespace) -> World:
    """The devices, each with its share of the weights where the arguments ask for that or, with `auto`, where the network fits one of them not.
    `layers`: how the names of the parameters of its layers begin. Raises ValueError."""
    if args.device_memory is not None and not 0 < args.device_memory <= 1e6:
        raise ValueError(f"--device-memory is in GiB and more than 0, and {args.device_memory:g} was given")
    if world.devices == 1 or args.fsdp == "off":
        return world
    weights = list(network.parameters())
    room = args.device_memory * GIB if args.device_memory else memory(weights[0].device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    too_large = largest(Group(dist.group.WORLD), float(sum(weight.nbytes for weight in weights) > room)) > 0
    return world.sharded(network, layers) if args.fsdp == "on" or too_large else world


def first() -> bool:
    """Whether this process is the one that prints."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def world(device: torch.device | str = "cpu") -> Iterator[World]:
    """All devices of the command; this one alone where torchrun has not started it. Raises ValueError where some are not there. `device`: where
    films are made.

    While it is open, an end by SIGTERM, which torchrun sends when another process has ended, is said in a sentence. When it is left by an
    error, the process has to end: that is how the others learn of it.
    """
    rank, devices = (int(os.environ.get(name, usual)) for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if devices == 1:
        yield ONE
        return
    with _end_announced(rank, devices):
        _come_together()
        yield World(devices, rank, timed_machine(device))
        dist.destroy_process_group()


def _come_together() -> None:
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo", timeout=SILENT)
        all_together()
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"the devices of this film did not come together within {TOGETHER.seconds} s ({why}): start the command anew") from error


def all_together() -> None:
    """Waits for all processes. Raises RuntimeError where one does not come: gloo alone can say which, so the barrier has a group of its own."""
    dist.monitored_barrier(dist.new_group(backend="gloo", timeout=TOGETHER), timeout=TOGETHER)


@contextmanager
def _end_announced(rank: int, devices: int) -> Iterator[None]:
    """A thread waits for the signal, since the main one may be inside a collective, where Python handles none."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before, woken = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(writing)
    threading.Thread(target=_announce, args=(reading, rank, devices), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGTERM, before)
        os.close(writing)


def _announce(reading: int, rank: int, devices: int) -> None:
    """Until the pipe is closed. Ends the process without cleaning up: whatever waits in a collective would wait on."""
    while number := os.read(reading, 1):
        if number[0] == signal.SIGTERM:
            print(f"flowcache: device {rank + 1} of {devices} stops: it was ended, as are all when one of them ends", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGTERM)
    os.close(reading)
