"""`bench rendered`: films that `render` makes here by one and by two workers, one of them killed, beside what the simulation says of them.

The simulation is given what a film of one worker took, how long a new worker takes to load, and when one was killed; nothing else. The estimate of
`render --dry-run` is beside it.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from statistics import fmean
from typing import Any

import torch

from ..fleet.dispatch import Dispatch, Outcome
from ..fleet.estimate import estimate, kinds_of
from ..fleet.film_line import FilmLines
from ..fleet.ray_fleet import ray_fleet
from ..fleet.renderer import Renderer
from ..fleet.simulation import FilmTime, Fleet, Simulation, simulate
from ..fleet.tasks import FilmTask, Made
from .measured import data, origin, table

NAME = "rendered"
DTYPE = torch.float32
PROCESS = re.compile(r"process (\d+)$")
PART = 0.6
"""Of the first film's sampling, after which its worker is killed."""


@dataclass(frozen=True)
class Measured:
    """Seconds: from the first film given out to the last one there; `films`: of each; `sampling`: that part of each; `load`: until a new worker
    has its model in memory; `estimated`: of all, before they were made. `tries`: of all films."""

    seconds: float
    films: tuple[float, ...]
    sampling: tuple[float, ...]
    load: float
    estimated: float
    tries: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--films", type=int, default=8, help="how many (default %(default)s)")
    parser.add_argument("--frames", type=int, default=97, help="pixel frames of each (default %(default)s: five chunks)")
    parser.add_argument("--steps", type=int, default=6, help="steps per chunk (default %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels (default %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows"}: for one worker, two, and two of which one is killed, the seconds that came beside those that were simulated and estimated.
    Raises ValueError for what cannot work."""
    lines = FilmLines(DTYPE)
    asked = {"prompt": "red circle moves right", "frames": args.frames, "steps": args.steps, "ar_step": args.steps, "size": args.size}
    tasks = [lines.task(k + 1, {**asked, "seed": k}) for k in range(args.films)]
    one = made(lines, tasks, 1)
    film, sampling = fmean(one.films), fmean(one.sampling)
    two, killed = made(lines, tasks, 2), made(lines, tasks, 2, kill_after=PART * sampling)
    chunks = tasks[0].job.schedule(lines.bundle_of(tasks[0].model)).chunks
    whole = [FilmTime((film,))] * len(tasks)
    saved = [FilmTime((sampling / chunks,) * chunks, film - sampling)] * len(tasks)
    return {"rows": [
        row("1 worker", one, simulate(whole, Fleet(1)).seconds),
        row("2 workers", two, simulate(whole, Fleet(2)).seconds),
        row("2 workers, 1 killed", killed, one_killed(saved, PART * sampling, killed.load)),
    ]}  # fmt: skip


def one_killed(films: Sequence[FilmTime], after: float, load: float) -> float:
    """Seconds of the films by two workers. The first is lost so many seconds after it was given its first film; another one can be used `load`
    seconds later."""
    lives = chain((math.inf, math.inf, after), repeat(math.inf))
    return Simulation(films, Fleet(2, load), lives).run().seconds - load


def made(lines: FilmLines, tasks: Sequence[FilmTask], workers: int, kill_after: float = 0.0) -> Measured:
    """The films, by workers that have their model in memory."""
    kinds = kinds_of(tasks)
    with tempfile.TemporaryDirectory() as states, ray_fleet(Renderer(str(DTYPE).removeprefix("torch."), states=states), "", workers, 1) as fleet:
        began = time.perf_counter()
        processes = [_process(future.result()) for future in [worker.start() for worker in fleet.workers]]
        fleet.paces(kinds)
        loaded = time.perf_counter()
        bundles = {task.model: lines.bundle_of(task.model) for task in tasks}
        expected = estimate(bundles, tasks, kinds, fleet.paces(kinds)).hours * 3600
        given = time.perf_counter()
        killer = threading.Timer(kill_after, os.kill, (processes[0], signal.SIGKILL))
        if kill_after:
            killer.start()
        outcomes = list(Dispatch(tasks, fleet.workers, fleet.lost).outcomes())
        seconds, films = time.perf_counter() - given, _made(outcomes)
    sampling = tuple(film.report["run"]["wall_s"] for film in films)
    load = max(loaded - began - (given - loaded), 0.0)
    return Measured(seconds, tuple(film.seconds for film in films), sampling, load, expected, sum(one.tries for one in outcomes))


def _process(where: str) -> int:
    found = PROCESS.search(where)
    assert found is not None
    return int(found[1])


def _made(outcomes: Sequence[Outcome[FilmTask]]) -> list[Made]:
    """Raises ValueError, with the reason, for a film that was not made."""
    if why := [one.result.why for one in outcomes if not isinstance(one.result, Made)]:
        raise ValueError(f"{len(why)} of {len(outcomes)} films were not made: {why[0]}")
    return [one.result for one in outcomes if isinstance(one.result, Made)]


def row(name: str, measured: Measured, simulated: float) -> dict[str, Any]:
    """Deviations are of what came from what was expected."""
    return {
        "fleet": name, "films": len(measured.films), "tries": measured.tries, "film_s": round(fmean(measured.films), 2),
        "load_s": round(measured.load, 2), "seconds": round(measured.seconds, 2), "simulated": round(simulated, 2),
        "deviation": round(measured.seconds / simulated - 1, 3), "estimated": round(measured.estimated, 2),
        "of_estimate": round(measured.seconds / measured.estimated - 1, 3),
    }  # fmt: skip


def shown() -> str:
    """Of more than one worker the estimate is that of a fleet that loses none."""
    lines = []
    for one in data(NAME)["rows"]:
        estimated = (f"{one['estimated']:.1f}", f"{one['of_estimate']:+.0%}") if "killed" not in one["fleet"] else ("", "")
        lines.append((one["fleet"], one["film_s"], one["seconds"], one["simulated"], f"{one['deviation']:+.0%}", *estimated))
    head = ["workers", "seconds of a film", "of all, as they came", "simulated", "deviation", "estimated by `--dry-run`", "deviation"]
    return table(head, lines) + "\n" + origin(NAME)


FIGURES: dict[str, Callable[[], str]] = {NAME: shown}
