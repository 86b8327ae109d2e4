"""Workers as Ray actors, on this machine or on a cluster. Ray places them and tells when one is gone; it is imported here alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from .dispatch import first_line
from .renderer import Pace, Renderer, code_id
from .tasks import FilmTask, Result

MISSING = "Ray is not installed: pip install 'flowcache[fleet]', or add --here to make the films one after the other in this process"
STORE = 512 << 20
"""Bytes for results on their way, each of them a finished film."""
ANSWER_S = 5.0
"""Within which a cluster has to answer."""


@dataclass(frozen=True)
class RayFleet:
    """`cores`: processor cores of a worker, and threads of torch; `gpus`: of a worker, 0 or 1."""

    workers: tuple[RayWorker, ...]
    cores: int
    gpus: int
    lost: tuple[type[BaseException], ...]

    def paces(self, tasks: Sequence[FilmTask]) -> list[list[Pace]]:
        """Of films of these settings, on all workers at the same time."""
        for future in [worker.start() for worker in self.workers]:
            future.result()
        return [future.result() for future in [worker.time(tasks) for worker in self.workers]]

    def __str__(self) -> str:
        each = "a GPU" if self.gpus else f"{self.cores} core{'s' * (self.cores > 1)}"
        return f"{len(self.workers)} worker{'s' * (len(self.workers) > 1)} of {each}"


@dataclass(frozen=True)
class RayWorker:
    """`kind`: the actor class with what it needs; `actor`: one of it."""

    kind: Any
    renderer: Renderer
    actor: Any

    @classmethod
    def of(cls, kind: Any, renderer: Renderer) -> RayWorker:
        return cls(kind, renderer, kind.remote(renderer.dtype, renderer.threads, renderer.states, renderer.save_every))

    def start(self) -> Future[str]:
        """Fails where the worker has another version of this package, or none."""
        answer, out = self.actor.start.remote().future(), Future[str]()

        def check(there: Future[tuple[str, str]]) -> None:
            try:
                where, code = there.result()
                if code != code_id():
                    raise ValueError(f"{where} has another version of flowcache (sources {code}, here {code_id()}): install the same on all machines")
                out.set_result(where)
            except ValueError as error:
                out.set_exception(error)
            except BaseException as error:
                out.set_exception(ValueError(f"a worker does not start ({first_line(error)}): flowcache has to be installed wherever workers run"))

        answer.add_done_callback(check)
        return out

    def render(self, task: FilmTask) -> Future[Result]:
        return self.actor.render.remote(task).future()

    def time(self, tasks: Sequence[FilmTask]) -> Future[list[Pace]]:
        return self.actor.time.remote(tasks).future()

    def renewed(self) -> RayWorker:
        return RayWorker.of(self.kind, self.renderer)


@contextmanager
def ray_fleet(renderer: Renderer, address: str, workers: int, cores: int) -> Iterator[RayFleet]:
    """Actors on a cluster, or on this machine where `address` is "". `workers`: 0 for as many as there is room for.

    Raises ValueError, with the way out, without Ray, for a cluster that does not answer, and for more workers than there is room for.
    """
    _require_answer(address)
    try:
        import ray
    except ImportError:
        raise ValueError(MISSING) from None
    with cluster(ray, address):
        room, gpus = _room(ray, cores)
        if workers > room or not room:
            raise ValueError(f"{workers or 1} workers were asked for, and there is room for {room} of {'a GPU' if gpus else f'{cores} cores'} each: "
                             f"use {f'--workers {room} or fewer' if room else 'fewer --cores'}, or a larger cluster")  # fmt: skip
        kind = ray.remote(num_cpus=cores, num_gpus=gpus, max_restarts=0, max_task_retries=0)(Renderer)
        each = Renderer(renderer.dtype, cores, renderer.states, renderer.save_every)
        yield RayFleet(tuple(RayWorker.of(kind, each) for _ in range(workers or room)), cores, gpus, lost_of(ray))


def lost_of(ray: Any) -> tuple[type[BaseException], ...]:
    """What is raised where a worker is gone: its process has ended, Ray has ended it since memory ran low, or its machine went with the film."""
    errors = ray.exceptions
    return errors.RayActorError, errors.OutOfMemoryError, errors.NodeDiedError, errors.ObjectLostError


@contextmanager
def cluster(ray: Any, address: str) -> Iterator[None]:
    """Connected to `address`, or to one that is started here; to that which this process has already joined, if any."""
    if ray.is_initialized():
        yield
        return
    _join(ray, address)
    try:
        yield
    finally:
        ray.shutdown()


def _join(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if not address:
        _start(ray, {"include_dashboard": False, "object_store_memory": STORE, **quiet})
        return
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the Ray cluster at {address} cannot be used ({error}): give --ray HOST:PORT of its head; if it asks for a token, set "
            "RAY_AUTH_MODE=token and have that of its head in ~/.ray/auth_token"
        ) from None


def _start(ray: Any, settings: dict[str, Any], starts: int = 3) -> None:
    """Ray gives its own processes 30 s to start, which is too short on a busy machine: it is tried again."""
    for _ in range(starts):
        try:
            ray.init(**settings)
            return
        except Exception as error:
            ray.shutdown()
            why = error
    raise ValueError(f"Ray does not start on this machine ({str(why).splitlines()[0]}): try again when it is less busy, or add --here") from why


def _require_answer(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit():
        return
    try:
        with suppress(OverflowError):
            socket.create_connection((host, int(port)), ANSWER_S).close()
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"no Ray cluster answers at {address} ({why}): start one there (ray start --head), or leave --ray out") from None


def _room(ray: Any, cores: int) -> tuple[int, int]:
    """-> how many workers the cluster has room for when nothing else runs there, and GPUs of each: where there are any, one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = ([int(node.get(kind, 0)) // each for node in nodes] for kind, each in (("CPU", cores), ("GPU", 1)))
    return (sum(map(min, cpus, gpus)), 1) if any(gpus) else (sum(cpus), 0)
