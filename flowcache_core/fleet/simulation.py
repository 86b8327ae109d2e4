"""A fleet without films: what `dispatch.py` does, event by event, on a clock of its own.

Whoever is free takes the next film. A worker that is lost is replaced, and its film goes to the next free worker, which goes on from the last
saved state. What a film takes is given in seconds; whence they come is unknown here.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, count, repeat
from random import Random


@dataclass(frozen=True)
class FilmTime:
    """`parts`: seconds from the beginning to the first saved state, from each to the next, and from the last one to the end of sampling; `decoding`:
    seconds after that."""

    parts: tuple[float, ...]
    decoding: float = 0.0

    @cached_property
    def ends(self) -> tuple[float, ...]:
        """Of the parts, in seconds of work since the beginning."""
        return tuple(accumulate(self.parts))

    @property
    def seconds(self) -> float:
        return self.ends[-1] + self.decoding

    def saved(self, work: float) -> int:
        """Parts that a worker leaves which is lost after so many seconds of work. Behind the last part no state is saved."""
        return min(bisect_right(self.ends, work), len(self.parts) - 1)


@dataclass(frozen=True)
class Fleet:
    """`load`: seconds until a new worker can be used; `resume`: until a saved film goes on; `lifetime`: seconds of work after which a worker is
    lost, on average, at any moment alike; a film with which `tries` workers were lost has failed. Raises ValueError."""

    workers: int
    load: float = 0.0
    resume: float = 0.0
    lifetime: float = math.inf
    tries: int = 3

    def __post_init__(self) -> None:
        if self.workers < 1 or self.tries < 1:
            raise ValueError(f"a fleet of {self.workers} workers that tries a film {self.tries} times makes none: use 1 or more of both")
        if min(self.load, self.resume) < 0 or not self.lifetime > 0:
            raise ValueError(
                f"workers load for {self.load:g} s, read a state for {self.resume:g} s and are lost after {self.lifetime:g} s: use 0 or more, and "
                "for the last one more than 0"
            )


@dataclass(frozen=True)
class Spent:
    """Seconds of workers: `useful` for what is in films, `lost` with workers, and for what their loss makes necessary again; `loading` at first."""

    useful: float = 0.0
    lost: float = 0.0
    loading: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.useful + other.useful, self.lost + other.lost, self.loading + other.loading)

    @property
    def busy(self) -> float:
        return self.useful + self.lost + self.loading


@dataclass(frozen=True)
class Simulated:
    """`seconds`: until the last film is there; `idle`: seconds of workers that had no film to make, or had not come to one."""

    seconds: float
    spent: Spent
    idle: float
    made: int
    failed: int


@dataclass(frozen=True)
class Attempt:
    """`done`: parts of the film that are saved; `number`: of this worker with it, from 1."""

    film: FilmTime
    done: int = 0
    number: int = 1

    @property
    def saved(self) -> float:
        """Seconds of work."""
        return self.film.ends[self.done - 1] if self.done else 0.0


@dataclass(frozen=True, order=True)
class Event:
    """A worker has loaded (no `attempt`), or is through with a film, or is lost with either. `order`: of events at the same time."""

    at: float
    order: int
    lost: bool = field(compare=False)
    spent: Spent = field(compare=False)
    attempt: Attempt | None = field(compare=False, default=None)


class Simulation:
    """Of one fleet and its films. Workers are alike, so only those are counted that are free. `lives`: seconds until the worker is lost, of each
    loading and each film that is begun, in their order."""

    def __init__(self, films: Sequence[FilmTime], fleet: Fleet, lives: Iterator[float]) -> None:
        self.fleet, self._lives, self._order = fleet, lives, count()
        self._waiting, self._events = deque(Attempt(film) for film in films), list[Event]()
        self._free, self._left, self._made, self._spent = 0, len(films), 0, Spent()
        for _ in range(fleet.workers):
            self._load(0.0, again=False)

    def run(self) -> Simulated:
        now, films = 0.0, self._left
        while self._left:
            event = heapq.heappop(self._events)
            now, self._spent = event.at, self._spent + event.spent
            self._lost(event) if event.lost else self._done(event)
            while self._free and self._waiting:
                self._free -= 1
                self._make(now, self._waiting.popleft())
        return Simulated(now, self._spent, max(self.fleet.workers * now - self._spent.busy, 0.0), self._made, films - self._made)

    def _done(self, event: Event) -> None:
        self._free += 1
        if event.attempt:
            self._made, self._left = self._made + 1, self._left - 1

    def _lost(self, event: Event) -> None:
        self._load(event.at, again=True)
        if (attempt := event.attempt) is None:
            return
        if attempt.number < self.fleet.tries:
            self._waiting.appendleft(replace(attempt, number=attempt.number + 1))
            return
        self._left -= 1
        self._spent += Spent(-attempt.saved, attempt.saved)

    def _load(self, now: float, again: bool) -> None:
        life, needed = next(self._lives), self.fleet.load
        spent = min(life, needed)
        self._push(now + spent, life < needed, Spent(lost=spent) if again or life < needed else Spent(loading=spent))

    def _make(self, now: float, attempt: Attempt) -> None:
        """What is saved of the film when the worker is lost is not lost with it."""
        life, reading = next(self._lives), self.fleet.resume if attempt.done else 0.0
        if life >= (needed := reading + attempt.film.seconds - attempt.saved):
            return self._push(now + needed, False, Spent(needed - reading, reading), attempt)
        after = replace(attempt, done=attempt.film.saved(attempt.saved + life - reading) if life > reading else attempt.done)
        useful = after.saved - attempt.saved
        return self._push(now + life, True, Spent(useful, life - useful), after)

    def _push(self, at: float, lost: bool, spent: Spent, attempt: Attempt | None = None) -> None:
        heapq.heappush(self._events, Event(at, next(self._order), lost, spent, attempt))


def simulate(films: Sequence[FilmTime], fleet: Fleet, seed: int = 0) -> Simulated:
    """`films`: in the order in which they are given out. The same `seed` loses the same workers."""
    return Simulation(films, fleet, repeat(math.inf) if math.isinf(fleet.lifetime) else _lives(fleet.lifetime, Random(seed))).run()


def _lives(mean: float, random: Random) -> Iterator[float]:
    while True:
        yield random.expovariate(1 / mean)
