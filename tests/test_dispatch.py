"""Films to workers: none is lost with its worker, none is made twice, and no more are under way than there are workers."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from flowcache_core.fleet.dispatch import Dispatch, NoWorkers
from flowcache_core.fleet.ray_fleet import lost_of
from flowcache_core.fleet.tasks import Failed, Made, Result, Task


class Gone(Exception):
    pass


@dataclass
class Scripted:
    """A worker that is lost with the films of `deadly` lines; `born`: of all that were made in its place, whether they start."""

    deadly: set[int]
    born: list[bool] = field(default_factory=list)
    rendered: list[int] = field(default_factory=list)
    under_way: list[Future[Result]] = field(default_factory=list)
    most: list[int] = field(default_factory=lambda: [0])
    starts: bool = True
    error: Exception = field(default_factory=lambda: Gone("killed"))

    def start(self) -> Future[str]:
        out: Future[str] = Future()
        if self.starts:
            out.set_result("here")
        else:
            out.set_exception(OSError("no such module"))
        return out

    def render(self, task: Task) -> Future[Result]:
        out: Future[Result] = Future()
        self.rendered.append(task.line)
        self.under_way.append(out)
        self.most[0] = max(self.most[0], sum(not one.done() for one in self.under_way))
        if task.line in self.deadly:
            out.set_exception(self.error)
        else:
            out.set_result(Made({}, {}, 1.0, "here"))
        return out

    def renewed(self) -> Scripted:
        starts = self.born.pop(0) if self.born else True
        return Scripted(self.deadly, self.born, self.rendered, self.under_way, self.most, starts, self.error)


def tasks(count: int) -> list[Task]:
    return [Task(line, f"{line:016x}", "a", {}) for line in range(1, count + 1)]


def test_every_film_is_made_once_by_whoever_is_free() -> None:
    workers = [Scripted(set()), Scripted(set())]
    outcomes = list(Dispatch(tasks(7), workers, (Gone,)).outcomes())
    assert sorted(one.task.line for one in outcomes) == sorted(workers[0].rendered + workers[1].rendered) == list(range(1, 8))
    assert all(isinstance(one.result, Made) and one.tries == 1 for one in outcomes)
    assert workers[0].most == workers[1].most == [1]


def test_a_film_that_kills_every_worker_fails_alone() -> None:
    worker = Scripted({2})
    outcomes = {one.task.line: one for one in Dispatch(tasks(4), [worker], (Gone,), tries=3).outcomes()}
    assert outcomes.keys() == {1, 2, 3, 4}
    assert worker.rendered.count(2) == outcomes[2].tries == 3
    assert outcomes[2].result == Failed("3 workers were lost with it, the last one because: killed", "")
    assert all(isinstance(outcomes[line].result, Made) for line in (1, 3, 4))


def test_a_worker_that_ray_ends_for_want_of_memory_or_loses_with_its_machine_is_replaced() -> None:
    ray = pytest.importorskip("ray")
    errors = ray.exceptions
    for error in (errors.ActorDiedError(), errors.OutOfMemoryError("low"), errors.NodeDiedError("gone"), errors.ObjectLostError("0a", None, "")):
        poisoned, good = Dispatch(tasks(2), [Scripted({1}, error=error)], lost_of(ray), tries=2).outcomes()
        assert isinstance(poisoned.result, Failed)
        assert isinstance(good.result, Made)


def test_a_worker_that_does_not_start_again_leaves_its_film_to_the_others() -> None:
    weak, strong = Scripted({1}, born=[False]), Scripted(set())
    outcomes = {one.task.line: one for one in Dispatch(tasks(3), [weak, strong], (Gone,)).outcomes()}
    assert all(isinstance(one.result, Made) for one in outcomes.values())
    assert outcomes[1].tries == 2


def test_without_a_worker_a_sentence_says_why() -> None:
    films = Dispatch(tasks(3), [Scripted({2}, born=[False])], (Gone,)).outcomes()
    assert next(films).task.line == 1
    with pytest.raises(NoWorkers, match="no worker is left \\(no such module\\): films that are made are kept"):
        next(films)
