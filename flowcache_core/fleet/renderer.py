"""Makes films with the bundled models, and keeps each model that it has loaded. Whether it lives in an actor or in this process is unknown here."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..device import commit, device_name
from ..models.bundle import BUNDLED, Bundle, load_bundle, weights_id
from ..policies.planned import Planned
from ..policies.protocol import CachePolicy
from ..run.generate import Job, decode, generate
from ..run.identity import digest
from ..run.states import States
from ..sampling.plan import Plan
from ..sampling.schedule import ChunkSchedule
from ..show.film import film_bytes, frames_of
from .tasks import Failed, FilmTask, Made, Result

PACKAGE = Path(__file__).parent.parent
FILM = ".mp4"


@dataclass(frozen=True)
class Renderer:
    """`dtype`: of computation, by its name in torch; `threads`: of torch, 0 as it is; `states`: a folder for the states of films under way,
    "" for none, each written after `save_every` finished chunks."""

    dtype: str
    threads: int = 0
    states: str = ""
    save_every: int = 1

    def start(self) -> tuple[str, str]:
        """-> where this is, and which code runs here."""
        if self.threads:
            torch.set_num_threads(self.threads)
        return self._where, code_id()

    def render(self, task: FilmTask) -> Result:
        """Whatever is wrong with a film is its own: it fails with a sentence, and the next one is made."""
        began = time.perf_counter()
        try:
            films, report = self._made(task)
        except Exception as error:
            return Failed(f"{type(error).__name__}: {error}", self._where)
        return Made(films, report, time.perf_counter() - began, self._where)

    def _made(self, task: FilmTask) -> tuple[dict[str, bytes], dict[str, Any]]:
        bundle = bundle_of(task.model, self.dtype)
        states = States(Path(self.states) / task.key, self.save_every, keep=True) if self.states else None
        latents, report = generate(bundle, task.job, task.policy, compressor=task.compressor, states=states)
        frames = frames_of(decode(bundle, latents))
        made_with = {"device": device_name(), "dtype": self.dtype, "commit": commit(), "model": task.model, "weights": weights_id(bundle.family)}
        same = {"latents": digest(latents), "frames": digest(torch.from_numpy(frames))}
        film = film_bytes(frames, task.job.fps)
        if states:
            shutil.rmtree(states.folder, ignore_errors=True)
        return {FILM: film}, {**made_with, "job": asdict(task.job), **same, "run": report.as_dict()}

    def time(self, tasks: Sequence[FilmTask]) -> list[Pace]:
        """How fast films of these settings are here. No film is made."""
        return [pace(bundle_of(task.model, self.dtype), task) for task in tasks]

    @property
    def _where(self) -> str:
        return f"{platform.node()}, process {os.getpid()}"


@dataclass(frozen=True)
class Pace:
    """Seconds of a latent frame: in one evaluation of the network, all branches, on average over the uncached film; decoded and encoded."""

    network: float
    decode: float


class Timed(Exception):
    """Ends a run when its evaluation has been timed."""

    def __init__(self, frame_s: float) -> None:
        super().__init__()
        self.frame_s = frame_s


@dataclass(frozen=True)
class Stopwatch(Planned):
    """Has the loop time an evaluation (`sampling.loop.frame_seconds`), and goes no further."""

    seconds: float = 1.0

    def timed(self, schedule: ChunkSchedule, frame_s: float, together: bool = False) -> Plan:
        raise Timed(frame_s)


def pace(bundle: Bundle, task: FilmTask) -> Pace:
    return Pace(_network_s(bundle, task.job), _decode_s(bundle, task.job))


def _network_s(bundle: Bundle, job: Job, policy: CachePolicy = Stopwatch()) -> float:
    try:
        generate(bundle, job, policy)
    except Timed as timed:
        return timed.frame_s
    raise AssertionError("a run that times an evaluation went on without it")


def _decode_s(bundle: Bundle, job: Job) -> float:
    """By as many frames as the window holds, behind a chunk that pays for what every process pays once."""
    films, channels, frames, *picture = job.noise_shape(bundle)
    longest = min(frames, bundle.layout.chunk_frames * bundle.layout.window)
    for length in (min(bundle.layout.chunk_frames, longest), longest):
        began = time.perf_counter()
        film_bytes(frames_of(decode(bundle, torch.randn(films, channels, length, *picture))), job.fps)
    return (time.perf_counter() - began) / longest


@lru_cache
def bundle_of(model: str, dtype: str) -> Bundle:
    """On the accelerator of this process, where it has one."""
    return load_bundle(getattr(torch, dtype), "cuda" if torch.cuda.is_available() else "cpu", BUNDLED[model])


@lru_cache
def code_id() -> str:
    """Of the sources of this package: workers that run others would make other films."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]
