"""Films to workers: whoever is free gets the next one, so that no more are under way than there are workers.

What a worker is, an actor, a server or this process, is unknown here: it answers with futures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
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


class Torn(Exception):
    """A film was made and did not arrive whole, from a worker that is there. `aside`: that worker is to have no more films."""

    def __init__(self, why: str, aside: bool = False) -> None:
        super().__init__(why)
        self.aside = aside


@dataclass(frozen=True)
class Waiting(Generic[T]):
    """`number`: which try comes next; `torn`: workers from which the film did not arrive whole, and the reason of the last one."""

    task: T
    number: int = 1
    torn: tuple[Worker[T], ...] = ()
    why: str = ""

    def is_for(self, worker: Worker[T]) -> bool:
        return all(one is not worker for one in self.torn)


class Dispatch(Generic[T]):
    """`lost`: what a future raises where the worker is gone with what it was doing. A film is then given to another one, up to `tries` times.

    A film that is `Torn` goes to workers that have not torn it, which is no try: it fails where none of those that are left sent it whole. `tell`: is
    given a sentence for a worker that is set aside.
    """

    def __init__(self, tasks: Iterable[T], workers: Sequence[Worker[T]], lost: tuple[type[BaseException], ...], tries: int = 3,
                 tell: Callable[[str], object] = lambda sentence: None) -> None:  # fmt: skip
        self.lost, self.tries, self.tell = lost, tries, tell
        self._waiting = deque(Waiting(task) for task in tasks)
        self._starting: dict[Future[str], Worker[T]] = {worker.start(): worker for worker in workers}
        self._making: dict[Future[Result], tuple[Worker[T], Waiting[T]]] = {}
        self._free: deque[Worker[T]] = deque()
        self._why_not: list[str] = []

    def outcomes(self) -> Iterator[Outcome[T]]:
        """Of every film, as it is made. Raises NoWorkers, with the reasons, where no worker is left to make one."""
        while self._waiting or self._making:
            self._give()
            if not self._making and not self._starting:
                if self._free:
                    yield from self._torn_by_all()
                    return
                why = "; ".join(dict.fromkeys(self._why_not))
                raise NoWorkers(f"no worker is left ({why}): films that are made are kept, start the command again")
            under_way: list[Future[Any]] = [*self._making, *self._starting]
            wait(under_way, return_when=FIRST_COMPLETED)
            for started in [one for one in self._starting if one.done()]:
                self._started(started)
            for finished in [one for one in self._making if one.done()]:
                yield from self._finished(finished)

    def _give(self) -> None:
        """To every free worker the first film that it has not torn."""
        for worker in [self._free.popleft() for _ in range(len(self._free))]:
            place = next((place for place, one in enumerate(self._waiting) if one.is_for(worker)), None)
            if place is None:
                self._free.append(worker)
                continue
            one = self._waiting[place]
            del self._waiting[place]
            self._making[worker.render(one.task)] = worker, one

    def _torn_by_all(self) -> Iterator[Outcome[T]]:
        """Of the films that are left when nobody can be given one."""
        while self._waiting:
            one = self._waiting.popleft()
            yield Outcome(one.task, Failed(f"it arrived whole from no worker: {one.why}", ""), one.number)

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
        worker, one = self._making.pop(future)
        try:
            result = future.result()
        except Torn as error:
            if error.aside:
                self._why_not.append(first_line(error))
                self.tell(f"{error}, so it is given no more films")
            else:
                self._free.append(worker)
            self._waiting.appendleft(replace(one, torn=(*one.torn, worker), why=first_line(error)))
            return
        except self.lost as error:
            self._replace(worker)
            if one.number < self.tries:
                self._waiting.appendleft(replace(one, number=one.number + 1))
                return
            result = Failed(f"{one.number} workers were lost with it, the last one because: {first_line(error)}", "")
        else:
            self._free.append(worker)
        yield Outcome(one.task, result, one.number)

    def _replace(self, worker: Worker[T]) -> None:
        other = worker.renewed()
        self._starting[other.start()] = other


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
