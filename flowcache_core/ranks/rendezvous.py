"""How the processes of a film come together for its time, on this machine alone, and part again: no socket outlives a film.

The store listens on the loopback address, at a port that is free, and gloo is told to use that interface.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .cost import Machine, Mesh
from .group import Group, Traffic
from .launch import SILENT, TOGETHER
from .world import World

LOOPBACK = "127.0.0.1"
INTERFACE, WATCHDOG = "GLOO_SOCKET_IFNAME", "TORCH_NCCL_ASYNC_ERROR_HANDLING"
GIVES_UP = "2"
"""Of the watchdog: it aborts the collectives; by default it ends the process."""
ASSUMED = Machine(1e12, 1e12, 1e11, 1e10, 1e-4)
"""Of a machine that was not timed yet: by it is found whether the devices can share a film at all."""
Handles = dict[tuple[int, ...], dist.ProcessGroup]
"""By the ranks of a group."""


class LateGroup(Group):
    """A group whose size is known before its processes come together. When they part it has no handle any more, whoever still holds it: only
    then are its sockets closed, by which the others learn of it."""

    def __init__(self, ranks: Sequence[int], rank: int, handles: Handles, traffic: Traffic | None = None) -> None:
        vars(self).update(ranks=tuple(ranks), own=tuple(ranks).index(rank), handles=handles, traffic=traffic or Traffic())

    ranks: tuple[int, ...]
    own: int
    handles: Handles

    @property
    def handle(self) -> dist.ProcessGroup | None:
        return self.handles.get(self.ranks)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def rank(self) -> int:
        return self.own

    def from_first(self, x: Tensor) -> Tensor:
        """In place: what the first device of the group has. Raises DeviceLost."""
        sent = 0 if self.own else x.nbytes * (self.size - 1)
        self._count(sent, lambda: dist.broadcast(x, self.ranks[0], group=self.handle))
        return x


@dataclass(frozen=True)
class LateWorld(World):
    """Devices that come together for a film. `together`: whether they have."""

    handles: Handles = field(default_factory=dict)
    together: bool = False

    def groups(self, mesh: Mesh) -> dict[str, Group]:
        rows = [tuple(range(first, first + mesh.heads)) for first in range(0, self.devices, mesh.heads)]
        columns = [tuple(range(first, self.devices, mesh.heads)) for first in range(mesh.heads)]
        if self.together:
            for ranks in dict.fromkeys(one for one in (*rows, *columns) if len(one) > 1):
                self._make(ranks)
        place, column = divmod(self.rank, mesh.heads)
        named = {"branches": columns[column], "heads": rows[place]}
        return {name: LateGroup(ranks, self.rank, self.handles) for name, ranks in named.items() if len(ranks) > 1}

    def _make(self, ranks: tuple[int, ...]) -> None:
        """All processes of the film make every group, in the same order."""
        handle = dist.new_group(list(ranks), timeout=SILENT)
        if self.rank in ranks:
            self.handles[ranks] = handle

    def everyone(self, traffic: Traffic) -> LateGroup:
        """`traffic`: where what is sent counts."""
        return LateGroup(range(self.devices), self.rank, self.handles, traffic)


def planned(devices: int, machine: Machine | None = None) -> LateWorld:
    """The first of so many devices, before they come together: a run can be settled for it, and not be made."""
    return LateWorld(devices, 0, machine or ASSUMED)


@dataclass(frozen=True)
class Meeting:
    """Where the processes of one film find each other."""

    listener: socket.socket = field(default_factory=lambda: socket.create_server((LOOPBACK, 0)))

    @property
    def port(self) -> int:
        port: int = self.listener.getsockname()[1]
        return port

    @contextmanager
    def led(self, devices: int) -> Iterator[LateWorld]:
        """For rank 0, until the block is left."""
        with _together(0, devices, self.port, self.listener.detach()) as world:
            yield world


@contextmanager
def met(rank: int, devices: int, port: int) -> Iterator[LateWorld]:
    """The same for the other ranks."""
    with _together(rank, devices, port) as world:
        yield world


def require_unused() -> None:
    """Raises ValueError where this process already shares something with others."""
    if dist.is_initialized():
        raise ValueError("torch.distributed is in use in this process, by another node pack: it has to end what it runs on several devices first")


@contextmanager
def _together(rank: int, devices: int, port: int, listening: int | None = None) -> Iterator[LateWorld]:
    world, hook = LateWorld(devices, rank, None, handles={}, together=True), sys.excepthook
    with surroundings():
        store = dist.TCPStore(  # type: ignore[attr-defined]
            LOOPBACK, port, devices, rank == 0, TOGETHER, wait_for_workers=False, master_listen_fd=listening
        )
        try:
            cuda = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=devices, timeout=TOGETHER)
            assert dist.group.WORLD is not None
            world.handles[tuple(range(devices))] = dist.group.WORLD
            yield world
        finally:
            world.handles.clear()
            if dist.is_initialized():
                dist.destroy_process_group()
            sys.excepthook = hook  # torch.distributed has put its own in place


@contextmanager
def surroundings() -> Iterator[None]:
    """Until the block is left gloo's sockets are of the loopback interface, where it is known by name, and NCCL's watchdog, when another process
    has gone, gives up what was under way without ending this process, which may be ComfyUI's."""
    name = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    wanted = {WATCHDOG: GIVES_UP, **({INTERFACE: name} if name else {})}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
