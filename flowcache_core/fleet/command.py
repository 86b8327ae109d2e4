"""`render`: the films of a jobs file, over a fleet. Everything is checked before a worker starts; what is made there already is left alone."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..device import commit, fast_dtype
from .destination import Destination, Folder, destination_of
from .dispatch import Dispatch, Outcome
from .estimate import estimate, kinds_of
from .film_line import FilmLines
from .graph_line import GraphLines
from .here import HereFleet, here_fleet
from .hosts import host_fleet
from .jobs_file import read_tasks
from .manifest import FAILED, MADE, NAME, Manifest
from .ray_fleet import RayFleet, ray_fleet
from .renderer import Renderer
from .tasks import Failed, FilmTask, GraphTask

DTYPES = ("bfloat16", "float32")
STATES = "states"
SOME_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", type=Path, help="JSON lines, each of one film: prompt, seed, frames or seconds, model, steps, policy, history, name; "
                        "with --host: workflow, prompt, seed, set, name")  # fmt: skip
    parser.add_argument("--out", required=True, help=f"folder, or any URL that fsspec knows, for films, reports and {NAME}")
    parser.add_argument("--ray", default="", metavar="ADDRESS", help="HOST:PORT of a Ray cluster, or auto for the one of this machine "
                        "(default: Ray is started here, and ended with the command)")  # fmt: skip
    parser.add_argument("--here", action="store_true", help="without Ray: one worker in this process")
    parser.add_argument("--host", nargs="+", default=[], metavar="URL", help="running ComfyUI servers that make the films from workflows")
    parser.add_argument("--workers", type=int, default=0, help="films at a time (default: one for each GPU; without, as many as there are cores for)")
    parser.add_argument("--cores", type=int, default=1, help="processor cores and threads of a worker (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default=str(fast_dtype()).removeprefix("torch."),
                        help="of computation (default here: %(default)s)")  # fmt: skip
    parser.add_argument("--tries", type=int, default=3, help="a film with which so many workers were lost has failed (default %(default)s)")
    parser.add_argument("--states", default="", metavar="FOLDER", help="where states of films under way are saved, a folder that all workers share "
                        f"(default: {STATES} in --out, if that is a folder)")  # fmt: skip
    parser.add_argument("--save-every", type=int, default=1,
                        help="save the state of a film after so many finished chunks, 0 never (default %(default)s)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check every line, time an evaluation, and estimate the hours")


def main(args: argparse.Namespace) -> int:
    """-> exit status: 1 where films failed. Raises ValueError, before anything is made, for what cannot work."""
    _require_counts(args)
    destination = destination_of(args.out)
    return _by_hosts(args, destination) if args.host else _by_workers(args, destination)


def _by_hosts(args: argparse.Namespace, destination: Destination) -> int:
    if args.ray or args.here or args.dry_run:
        raise ValueError("--host sends films to ComfyUI, which has its own model: leave --ray, --here and --dry-run out")
    tasks = read_tasks(args.jobs, GraphLines(args.jobs.parent).task)
    manifest = Manifest(destination, tasks, _made_with(args))
    todo = [task for task in manifest.unfinished if isinstance(task, GraphTask)]
    if not todo:
        return _nothing_to_make(manifest, destination, args.dry_run)
    with host_fleet(args.host, todo) as fleet:
        _make(Dispatch(todo, fleet.workers, fleet.lost, args.tries, tqdm.write), manifest, str(fleet))
    return _summary(manifest, destination)


def _by_workers(args: argparse.Namespace, destination: Destination) -> int:
    if args.here and (args.ray or args.workers > 1):
        raise ValueError("--here is one worker in this process: leave --ray and --workers out")
    lines = FilmLines(getattr(torch, args.dtype))
    tasks = read_tasks(args.jobs, lines.task)
    manifest = Manifest(destination, tasks, {**_made_with(args), "dtype": args.dtype})
    todo = [task for task in manifest.unfinished if isinstance(task, FilmTask)]
    if not todo:
        return _nothing_to_make(manifest, destination, args.dry_run)
    states = _states(args, destination)
    with _fleet(args, states) as fleet:
        if args.dry_run:
            kinds = kinds_of(todo)
            print(f"{manifest.count(MADE)} of {len(tasks)} films are there")
            print(estimate({task.model: lines.bundle_of(task.model) for task in todo}, todo, kinds, fleet.paces(kinds)).text())
            return 0
        _make(Dispatch(todo, fleet.workers, fleet.lost, args.tries), manifest, str(fleet))
    _tidy(states)
    return _summary(manifest, destination)


def _fleet(args: argparse.Namespace, states: Path | None) -> AbstractContextManager[RayFleet | HereFleet]:
    renderer = Renderer(args.dtype, states=str(states or ""), save_every=args.save_every)
    return here_fleet(renderer) if args.here else ray_fleet(renderer, args.ray, args.workers, args.cores)


def _make(dispatch: Dispatch[Any], manifest: Manifest, fleet: str) -> None:
    """The manifest is written first, so that a place that cannot be written is known before the first film."""
    manifest.write()
    for outcome in _shown(dispatch.outcomes(), len(manifest.unfinished), fleet):
        manifest.add(outcome)


def _shown(outcomes: Iterator[Outcome[Any]], films: int, fleet: str) -> Iterator[Outcome[Any]]:
    with tqdm(total=films, desc=fleet, unit="film") as bar:
        for outcome in outcomes:
            if isinstance(outcome.result, Failed):
                bar.write(f"line {outcome.task.line} failed: {outcome.result.why}")
            yield outcome
            bar.update()


def _nothing_to_make(manifest: Manifest, destination: Destination, dry_run: bool) -> int:
    """But the manifest, since lines may have moved or gone."""
    if not dry_run:
        manifest.write()
    return _summary(manifest, destination)


def _summary(manifest: Manifest, destination: Destination) -> int:
    made, failed = manifest.count(MADE), manifest.count(FAILED)
    print(f"{made} of {len(manifest.entries)} films and {NAME} are in {destination}")
    if failed:
        print(f"{failed} failed: {NAME} says why; start the command again to try them again")
    return SOME_FAILED if failed else 0


def _require_counts(args: argparse.Namespace) -> None:
    for name, least in (("workers", 0), ("cores", 1), ("tries", 1), ("save_every", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: use {least} or more")


def _states(args: argparse.Namespace, destination: Destination) -> Path | None:
    if not args.save_every:
        return None
    if args.states:
        return Path(args.states).absolute()
    return destination.path.absolute() / STATES if isinstance(destination, Folder) else None


def _tidy(states: Path | None) -> None:
    """States of finished films are gone: so is their folder, if nothing else lies in it."""
    with suppress(OSError):
        if states:
            states.rmdir()


def _made_with(args: argparse.Namespace) -> dict[str, Any]:
    return {"jobs": args.jobs.name, "commit": commit(), "date": f"{date.today()}"}
