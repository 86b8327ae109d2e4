"""A worker: a process that holds the network of a film, and evaluates what another one asks for. `ranks/workers.py` starts it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention import attending, kernel_for
from ..models.checkpoint import load_network_file
from ..ranks.cost import Machine
from ..ranks.group import DeviceLost, Traffic
from ..ranks.rendezvous import LateGroup, LateWorld, met
from ..ranks.workers import FAILED, IDLE, Commands, Message
from ..ranks.world import timed_machine
from .run import Run
from .shared import Evaluation, FilmSettings, family_named, shared
from .states import States
from .turn import Turn

STOPPING = 10.0
"""Seconds in which the order to stop has to follow the loss of a connection."""


class Stopped(Exception):
    """The film is not to be finished."""


@dataclass
class Network:
    """What a worker keeps between films. `source`: what it was loaded from."""

    source: Message
    network: Any
    dtype: torch.dtype


@dataclass(frozen=True)
class Follower:
    """Of one film."""

    commands: Commands
    everyone: LateGroup
    device: torch.device
    contexts: dict[tuple[str, ...], Tensor]

    def follow(self, run: Run, settings: FilmSettings) -> None:
        """Makes the film along with the leader, and saves this device's share where the leader saves its own."""
        message = self._next("begin")
        states = States.from_json(message["states"]) if message["states"] else None
        run.sample(self.received(message)["x"], lambda turn, part: self._evaluated(turn, part, run, settings), states=states)

    def received(self, message: Message) -> dict[str, Tensor]:
        made = {name: torch.empty(one["shape"], dtype=getattr(torch, one["dtype"]), device=self.device) for name, one in message["tensors"].items()}
        return {name: self.everyone.from_first(one) for name, one in made.items()}

    def _evaluated(self, turn: Turn, part: Tensor, run: Run, settings: FilmSettings) -> Tensor:
        """What the leader's guider makes of its evaluations: the same on all devices."""
        while True:
            message = self._next("evaluate", "move")
            tensors = self.received(message)
            if message["do"] == "move":
                return tensors.get("x", part)
            if message["at"] != [turn.index, turn.step, turn.committing]:
                raise RuntimeError(f"it is at chunk {turn.index + 1}, step {turn.step + 1}, where the first device is elsewhere: {message['at']}")
            branches = tuple(message["branches"])
            context = self.contexts[branches] = tensors.get("context", self.contexts.get(branches, part))
            Evaluation(tensors["x"], context, branches, message["texts"]).by(turn, run, settings.branches)

    def _next(self, *wanted: str) -> Message:
        message = self.commands.next()
        if message is None or message["do"] not in wanted:
            raise Stopped
        return message


@dataclass
class FilmWorker:
    """`rank` of so many devices."""

    commands: Commands
    rank: int
    devices: int
    device: torch.device
    kept: Network | None = None

    def serve(self) -> None:
        """Until there is nothing to do for a while."""
        self.commands.answer(started=True)
        while (message := self.commands.next(IDLE)) is not None:
            if message["do"] == "load":
                self.commands.answer(loaded=self._load(message["source"]))
            elif message["do"] == "meet":
                self._meet(message)

    def _load(self, source: Mapping[str, Any]) -> float:
        """Seconds; 0 where the network is here already."""
        if self.kept is not None and self.kept.source == source:
            return 0.0
        began, self.kept = time.perf_counter(), None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        dtype, family = getattr(torch, source["dtype"]), family_named(source["family"])
        network = load_network_file(source["path"], dtype, self.device, family.name, (family,))
        self.kept = Network(source, network, dtype)
        return time.perf_counter() - began

    def _meet(self, message: Message) -> None:
        """Comes together with the other devices for one film."""
        try:
            with met(self.rank, self.devices, message["port"]) as world:
                self._film(world, message["machine"])
        except Stopped:
            pass
        except DeviceLost:
            if not self._stopped():
                raise
        self.commands.answer(idle=True)

    def _film(self, world: LateWorld, machine: list[float] | None) -> None:
        timed = Machine(*machine) if machine else timed_machine(self.device)
        message = self.commands.next()
        if message is None or message["do"] != "film":
            raise Stopped
        assert self.kept is not None
        settings, first = FilmSettings.from_json(message["settings"]), world.everyone(Traffic())
        durations = Follower(self.commands, first, self.device, {}).received(message).get("durations")
        run = settings.run(self.kept.network, self.kept.dtype, self.device, durations)
        run = shared(run, replace(world, machine=timed, branches=message["branches"]))
        with attending(kernel_for(self.device, self.kept.dtype, run.adapter.head_dim)):
            Follower(self.commands, first, self.device, {}).follow(run, settings)

    def _stopped(self) -> bool:
        """Whether the loss of a connection is the end of a film that was stopped."""
        end = time.monotonic() + STOPPING
        while (left := end - time.monotonic()) > 0:
            message = self.commands.next(left)
            if message is not None and message["do"] == "stop":
                return True
        return False


def main() -> None:
    """RANK DEVICES PARENT DEVICE THREADS."""
    _, _, rank, devices, parent, device, threads = sys.argv
    commands = Commands(int(parent))
    torch.set_num_threads(int(threads))
    with suppress(BrokenPipeError):
        try:
            if device != "cpu":
                torch.cuda.set_device(device)
            with torch.inference_mode():
                FilmWorker(commands, int(rank), int(devices), torch.device(device)).serve()
        except Exception as error:
            commands.answer(**{FAILED: f"{type(error).__name__}: {error}"})
            sys.stderr.flush()
            os._exit(1)
    os._exit(0)
