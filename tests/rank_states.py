"""A film that two processes share, stopped and resumed from their saved states; `rank_cases` runs it for `test_ranks`."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from flowcache_core.kv.compressor import Compressor
from flowcache_core.models.bundle import Bundle
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.ranks.world import World
from flowcache_core.run import state_file
from flowcache_core.run.generate import Job, generate
from flowcache_core.run.report import RunReport
from flowcache_core.run.states import States
from flowcache_core.sampling.chunk import Chunk
from tests.forked import forked

DEVICES = 2


class Stopped(Exception):
    pass


@dataclass(frozen=True)
class Film:
    """`stop`: of its chunk-steps, after how many it is stopped, with a state behind it; `reference`: of one device."""

    bundle: Bundle
    job: Job
    policy: CachePolicy | None
    compressor: Compressor | None
    stop: int
    reference: Tensor

    def make(self, world: World, folder: Path, stop: int = 0) -> tuple[Tensor, RunReport]:
        made = list[Chunk]()

        def on_step(chunk: Chunk) -> None:
            made.append(chunk)
            if len(made) == stop:
                raise Stopped

        return generate(self.bundle, self.job, self.policy, on_step, compressor=self.compressor, states=States(folder), world=world)

    def stopped(self, world: World, folder: Path) -> list[str]:
        """-> the files that this process finds after all have stopped."""
        try:
            self.make(world, folder, self.stop)
        except Stopped:
            dist.barrier()
        return sorted(path.name for path in folder.iterdir())

    def resumed(self, world: World, folder: Path) -> dict[str, Any]:
        latents, report = self.make(world, folder)
        dist.barrier()
        return {"deviation": float((latents - self.reference).abs().max()), "notes": report.notes, "left": folder.exists()}


def as_it_was(film: Film, world: World, folder: Path) -> dict[str, Any]:
    """With the weights shared too."""
    network = deepcopy(film.bundle.network)
    film, world = replace(film, bundle=replace(film.bundle, network=network)), world.sharded(network, film.bundle.family.blocks)
    files = film.stopped(world, folder)
    return {"files": files, **film.resumed(world, folder)}


def other_mesh(film: Film, world: World, folder: Path) -> dict[str, Any]:
    film.stopped(world, folder)
    return film.resumed(replace(world, branches=1), folder)


def lost(film: Film, world: World, folder: Path) -> dict[str, Any]:
    """The second process finds no state."""
    (mine,) = (name for name in film.stopped(world, folder) if f".{world.rank}." in name)
    dist.barrier()
    if world.rank:
        (folder / mine).unlink()
    dist.barrier()
    return film.resumed(world, folder)


def full_disk(film: Film, world: World, folder: Path) -> dict[str, Any]:
    """Of the second process."""
    fails = patch.object(state_file, "_write", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with fails if world.rank else nullcontext():
        latents, report = film.make(world, folder)
    return {"deviation": float((latents - film.reference).abs().max()), "notes": report.notes, "saves": report.saves.count}


WAYS: dict[str, Callable[[Film, World, Path], dict[str, Any]]] = {
    "as it was": as_it_was, "other mesh": other_mesh, "lost": lost, "full disk": full_disk,
}  # fmt: skip


def device(rank: int, films: dict[str, tuple[Film, World]], folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-states", rank=rank, world_size=DEVICES)
    out = {}
    for name, (film, world) in films.items():
        film_on, here = WAYS[name], replace(world, rank=rank)
        out[name] = film_on(film, here, folder / name)
    (folder / f"states-{rank}.json").write_text(json.dumps(out))
    dist.destroy_process_group()


def resumed(films: dict[str, tuple[Film, World]], folder: Path) -> list[dict[str, Any]]:
    """By way of `WAYS` a film -> by process, and by way, what came of it."""
    assert forked(DEVICES, partial(device, films=films, folder=folder)) == [0] * DEVICES
    return [json.loads((folder / f"states-{rank}.json").read_text()) for rank in range(DEVICES)]
