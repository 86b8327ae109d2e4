"""A simulated fleet: seconds of workers add up, and films go to workers as `Dispatch` gives them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import chain, repeat
from random import Random
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcache_core.fleet.dispatch import Dispatch
from flowcache_core.fleet.simulation import FilmTime, Fleet, Simulated, Simulation, simulate
from flowcache_core.fleet.tasks import Made, Result, Task

FILMS = st.lists(st.builds(lambda parts, end: FilmTime(tuple(parts), end), st.lists(st.floats(0.1, 50), min_size=1, max_size=5), st.floats(0, 20)),
                 min_size=1, max_size=30)  # fmt: skip
LOAD = 3.0


def lost(films: Sequence[FilmTime], fleet: Fleet, *lives: float) -> Simulated:
    """With workers that are lost after these seconds of their loading and their films, in the order of these, and never afterwards."""
    return Simulation(films, fleet, chain(lives, repeat(math.inf))).run()


@given(FILMS, st.integers(1, 40), st.floats(1, 500), st.integers(0, 9))
def test_seconds_of_workers_add_up(films: list[FilmTime], workers: int, lifetime: float, seed: int) -> None:
    """What is in films, lost, loading and idle is all the time of all workers; what is in films is the films that were made."""
    came = simulate(films, Fleet(workers, LOAD, 1.0, lifetime), seed)
    assert came.made + came.failed == len(films)
    assert came.spent.busy + came.idle == pytest.approx(workers * came.seconds)
    assert min(came.spent.useful, came.spent.lost, came.spent.loading, came.idle) >= -1e-6
    if not came.failed:
        assert came.spent.useful == pytest.approx(sum(film.seconds for film in films))


@given(FILMS)
def test_one_worker_takes_the_sum_of_the_films(films: list[FilmTime]) -> None:
    came = simulate(films, Fleet(1, LOAD))
    assert came.seconds == pytest.approx(LOAD + sum(film.seconds for film in films))
    assert (came.spent.lost, came.made) == (0, len(films))


@given(FILMS, st.integers(1, 20))
def test_more_workers_are_never_later(films: list[FilmTime], workers: int) -> None:
    few, more = (simulate(films, Fleet(count, LOAD)) for count in (workers, workers + 1))
    assert more.seconds <= few.seconds + 1e-9
    assert few.seconds >= LOAD + max(max(film.seconds for film in films), sum(film.seconds for film in films) / workers) - 1e-9


def test_a_seed_loses_the_same_workers_and_another_one_others() -> None:
    films, fleet = [FilmTime((5.0,) * 4)] * 50, Fleet(7, LOAD, 1.0, 60.0)
    assert simulate(films, fleet, 1) == simulate(films, fleet, 1) != simulate(films, fleet, 2)


def test_a_film_goes_on_from_its_last_part() -> None:
    """Lost after 13 of 20 seconds: two parts of 5 are saved; it is loaded for 3, read for 1, and the other two are made."""
    came = lost([FilmTime((5.0,) * 4)], Fleet(1, LOAD, 1.0), math.inf, 13.0)
    assert came.seconds == 3 + 13 + 3 + 1 + 10
    assert (came.spent.useful, came.spent.lost, came.spent.loading) == (20, 3 + 3 + 1, 3)


def test_a_film_that_is_lost_while_it_is_read_keeps_what_it_had() -> None:
    came = lost([FilmTime((5.0,) * 4)], Fleet(1, 0.0, 1.0), math.inf, 13.0, math.inf, 0.5)
    assert came.seconds == 13 + 0.5 + 1 + 10


def test_a_film_that_is_lost_in_decoding_goes_on_from_its_last_state() -> None:
    """None is saved when sampling ends."""
    came = lost([FilmTime((5.0, 5.0), 4.0)], Fleet(1), math.inf, 12.0)
    assert (came.seconds, came.spent.lost) == (12 + 9, 7)
    assert lost([FilmTime((10.0,), 4.0)], Fleet(1), math.inf, 12.0).seconds == 12 + 14, "without states"


def test_a_film_fails_with_the_last_worker_that_may_try_it() -> None:
    came = lost([FilmTime((5.0,) * 4), FilmTime((1.0,))], Fleet(1, tries=2), math.inf, 13.0, math.inf, 2.0)
    assert (came.made, came.failed, came.seconds) == (1, 1, 13 + 2 + 1)
    assert (came.spent.useful, came.spent.lost) == (1, 15)


def test_a_worker_lost_in_loading_is_loaded_again() -> None:
    came = lost([FilmTime((5.0,))], Fleet(1, LOAD), 2.0)
    assert (came.seconds, came.spent.lost) == (2 + 3 + 5, 2 + 3)


@pytest.mark.parametrize("settings", [{"workers": 0}, {"tries": 0}, {"load": -1.0}, {"resume": -1.0}, {"lifetime": 0.0}])
def test_a_fleet_that_cannot_be_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"use (0|1) or more"):
        Fleet(**{"workers": 1, **settings})


class Timed:
    """A worker of `Dispatch` whose films take as long as their lines say, on a clock of all workers."""

    under_way: ClassVar[list[tuple[float, Future[Result]]]] = []
    now: ClassVar[float] = 0.0

    def start(self) -> Future[str]:
        out: Future[str] = Future()
        out.set_result("here")
        return out

    def render(self, task: Task) -> Future[Result]:
        out: Future[Result] = Future()
        self.under_way.append((self.now + task.line, out))
        return out

    def renewed(self) -> Timed:
        return self


def test_films_go_to_workers_as_dispatch_gives_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, on a clock that goes on to the next film that is done whenever it waits."""

    def wait(_: object, **__: object) -> None:
        if Timed.under_way and not any(future.done() for _, future in Timed.under_way):
            Timed.under_way.sort(key=lambda one: one[0])
            Timed.now, first = Timed.under_way.pop(0)
            first.set_result(Made({}, {}, 0.0, ""))

    monkeypatch.setattr("flowcache_core.fleet.dispatch.wait", wait)
    seconds = [Random(0).randrange(1, 10**6) for _ in range(40)]
    list(Dispatch([Task(one, "", "", {}) for one in seconds], [Timed() for _ in range(6)], ()).outcomes())
    assert simulate([FilmTime((one,)) for one in seconds], Fleet(6)).seconds == Timed.now
