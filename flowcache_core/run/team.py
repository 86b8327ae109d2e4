"""Several devices as one process of them sees the others: started with the first film, kept between films with their weights, ended together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.adapter import DurationTexts
from ..ranks.cost import Machine
from ..ranks.group import Traffic
from ..ranks.rendezvous import LateWorld, Meeting, planned, require_unused
from ..ranks.workers import WorkerLost, Workers
from ..ranks.world import timed_machine
from .identity import film_of
from .lead import Leader, described
from .run import Run
from .shared import FilmSettings, shared
from .states import States

PROGRAM = "flowcache_core.run.follow"
START, LOAD, PART, NOTICED = 120.0, 3600.0, 10.0, 1.0
"""Seconds that a worker may take to start, to load its network, to leave a film; and after which its end is known."""
Check = Callable[[], object]
"""Called while workers are waited for; it may raise."""


@dataclass(frozen=True)
class Source:
    """A checkpoint, and how it is computed: what a worker loads. `path`: of a file, or of any file of a set; `files`: of all of them, by which
    a change is noticed."""

    path: Path
    files: tuple[Path, ...]
    family: str
    dtype: torch.dtype

    def as_json(self) -> dict[str, Any]:
        stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in self.files]
        return {"path": f"{self.path}", "files": stats, "family": self.family, "dtype": str(self.dtype).removeprefix("torch.")}


class Team:
    """`devices`: by rank, as torch names them; this process is the first of them."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices = tuple(devices)
        self.machine: Machine | None = None
        """As timed with the first film."""
        self.workers: Workers | None = None
        self.loaded: list[float] = []
        """Seconds that the workers took for the network of the latest film; 0 where they had it."""
        self.busy = False
        """Whether a film is being made."""

    def plan(self, run: Run, split_branches: bool, states: States | None = None) -> Run:
        """The run of this device, with the mesh of the film's state where one was saved, else with the fastest. Raises ValueError, before a process
        is started, for a film that the devices cannot share."""
        world = planned(len(self.devices), self.machine)
        fastest = shared(run, world, split_branches)
        if states is None or not (there := states.films):
            return fastest
        for branches in (count for count in range(1, world.devices + 1) if world.devices % count == 0):
            with suppress(ValueError):
                mine = shared(run, replace(world, branches=branches), split_branches)
                if any(film_of(mine, None, states.film).items() <= film.items() for film in there):
                    return mine
        return fastest

    @contextmanager
    def sharing(self, run: Run, source: Source, branches: Sequence[str], split_branches: bool, check: Check,
                states: States | None = None) -> Iterator[Leader]:  # fmt: skip
        """Until the block ends all devices make this film. `run`: of the whole film; `branches`: its texts, in order; `split_branches`: as in
        `shared`; `states`: where it will be saved, if it is.

        Raises WorkerLost, with a sentence, where a worker fails or ends; then all are ended, and the next film starts others.
        """
        require_unused()
        self.plan(run, split_branches)
        settings = FilmSettings.of(run, branches)
        written, wanted, self.busy = settings.as_json(), source.as_json(), True
        try:
            workers = self._ready(wanted, check)
            try:
                with self._met(workers) as world:
                    mine = self._part(workers, world, run, self.plan(run, split_branches, states).spread.mesh.branches, written)
                    yield Leader(mine, settings.branches, world.everyone(mine.spread.heads.traffic), workers.send)
            except BaseException as error:
                self._failed(error)
                raise
            self._finished()
        finally:
            self.busy = False

    def _ready(self, source: Mapping[str, Any], check: Check) -> Workers:
        """With their networks loaded. Workers that do not come so far are ended."""
        try:
            if self.workers is None or not self.workers.alive:
                self.end()
                threads = max(1, (os.cpu_count() or 1) // len(self.devices))
                self.workers = Workers(self.devices, PROGRAM, f"{threads}")
                self.workers.wait("started", START, check)
            self.workers.send(do="load", source=source)
            self.loaded = self.workers.wait("loaded", LOAD, check)
        except BaseException:
            self.end()
            raise
        return self.workers

    @contextmanager
    def _met(self, workers: Workers) -> Iterator[LateWorld]:
        """All devices, together until the block ends, and timed when they are for the first time."""
        meeting = Meeting()
        workers.send(do="meet", port=meeting.port, machine=list(asdict(self.machine).values()) if self.machine else None)
        with meeting.led(len(self.devices)) as world:
            self.machine = self.machine or timed_machine(self.devices[0])
            yield world

    def _part(self, workers: Workers, world: LateWorld, run: Run, branches: int, settings: Any) -> Run:
        """The run of this device, of which the others now have theirs. `branches`: along how many devices they are shared."""
        durations = _durations(run)
        workers.send(do="film", settings=settings, branches=branches, tensors={name: described(one) for name, one in durations.items()})
        everyone = world.everyone(Traffic())
        for one in durations.values():
            everyone.from_first(one.to(self.devices[0]).contiguous())
        return shared(run, replace(world, machine=self.machine, branches=branches))

    def _finished(self) -> None:
        """Workers that do not leave a film that is there are of no use for the next."""
        try:
            assert self.workers is not None
            self.workers.wait("idle", PART)
        except WorkerLost:
            self.end()

    def _failed(self, error: BaseException) -> None:
        """The film has ended in an error: in a worker, or here. Workers that had no part in it stop, and stay."""
        if self.workers is None:
            return
        lost = f"{error}" if isinstance(error, WorkerLost) else self.workers.loss(NOTICED if isinstance(error, RuntimeError) else 0.0)
        if not lost:
            self.workers.send(do="stop")
            self._finished()
        elif isinstance(error, RuntimeError):
            self.end()
            raise WorkerLost(f"{lost}: all devices of this film have stopped, and the next film starts new processes") from error
        else:
            self.end()

    def end(self) -> None:
        """Ends the workers, and waits for it."""
        workers, self.workers = self.workers, None
        if workers is not None:
            workers.end()


def _durations(run: Run) -> Mapping[str, Tensor]:
    """What hangs on a text of this film and is in no checkpoint."""
    durations = getattr(run.adapter, "durations", None) if isinstance(run.adapter, DurationTexts) else None
    return {} if durations is None else {"durations": durations}
