"""Films to workers: whoever is free gets the next one, so that no more are under way than there are workers.

What a worker is, an actor, a server or this process, is unknown here: it answers with futures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from .tasks import Failed, Result, Task

T = TypeVar("T", bound=Task)
T_contra = TypeVar("T_contra", bound=Task, contravariant=True)


class Worker(Protocol[T_contra]):
    """One that makes a film at a time."""

    def start(self) -> Future[str]:
        """-> where it is, once it can be used."""
        ...

    def render(self, task: T_contra) -> Future[Result]: ...

    def renewed(self) -> Worker[T_contra]:
        """One in its place, when it was lost."""
        ...


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """`tries`: workers that were given the film."""

    task: T
    result: Result
    tries: int


class NoWorkers(ValueError):
    """None is left."""


class Dispatch(Generic[T]):
    """`lost`: what a future raises where the worker is gone with what it was doing. A film is then given to another one, up to `tries` times."""

    def __init__(self, tasks: Iterable[T], workers: Sequence[Worker[T]], lost: tuple[type[BaseException], ...], tries: int = 3) -> None:
        self.lost, self.tries = lost, tries
        self._waiting = deque((task, 1) for task in tasks)
        self._starting: dict[Future[str], Worker[T]] = {worker.start(): worker for worker in workers}
        self._making: dict[Future[Result], tuple[Worker[T], T, int]] = {}
        self._free: deque[Worker[T]] = deque()
        self._why_not: list[str] = []

    def outcomes(self) -> Iterator[Outcome[T]]:
        """Of every film, as it is made. Raises NoWorkers, with the reasons, where no worker is left to make one."""
        while self._waiting or self._making:
            while self._waiting and self._free:
                worker, (task, number) = self._free.popleft(), self._waiting.popleft()
                self._making[worker.render(task)] = worker, task, number
            if not self._making and not self._starting:
                why = "; ".join(dict.fromkeys(self._why_not))
                raise NoWorkers(f"no worker is left ({why}): films that are made are kept, start the command again")
            under_way: list[Future[Any]] = [*self._making, *self._starting]
            wait(under_way, return_when=FIRST_COMPLETED)
            for started in [one for one in self._starting if one.done()]:
                self._started(started)
            for finished in [one for one in self._making if one.done()]:
                yield from self._finished(finished)

    def _started(self, future: Future[str]) -> None:
        """One that does not start is given up."""
        worker = self._starting.pop(future)
        try:
            future.result()
        except Exception as error:
            self._why_not.append(first_line(error))
        else:
            self._free.append(worker)

    def _finished(self, future: Future[Result]) -> Iterator[Outcome[T]]:
        worker, task, number = self._making.pop(future)
        try:
            result = future.result()
        except self.lost as error:
            self._replace(worker)
            if number < self.tries:
                self._waiting.appendleft((task, number + 1))
                return
            result = Failed(f"{number} workers were lost with it, the last one because: {first_line(error)}", "")
        else:
            self._free.append(worker)
        yield Outcome(task, result, number)

    def _replace(self, worker: Worker[T]) -> None:
        other = worker.renewed()
        self._starting[other.start()] = other


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
