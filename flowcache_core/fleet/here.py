"""One worker in this process, without Ray: films one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from .renderer import Pace, Renderer
from .tasks import FilmTask, Result


@dataclass(frozen=True)
class HereWorker:
    renderer: Renderer

    def start(self) -> Future[str]:
        future = Future[str]()
        future.set_result(self.renderer.start()[0])
        return future

    def render(self, task: FilmTask) -> Future[Result]:
        """Done when it is returned."""
        future = Future[Result]()
        future.set_result(self.renderer.render(task))
        return future

    def renewed(self) -> HereWorker:
        return self


@dataclass(frozen=True)
class HereFleet:
    renderer: Renderer
    lost: tuple[type[BaseException], ...] = ()

    @property
    def workers(self) -> tuple[HereWorker, ...]:
        return (HereWorker(self.renderer),)

    def paces(self, tasks: Sequence[FilmTask]) -> list[list[Pace]]:
        return [self.renderer.time(tasks)]

    def __str__(self) -> str:
        return "1 worker in this process"


@contextmanager
def here_fleet(renderer: Renderer) -> Iterator[HereFleet]:
    yield HereFleet(renderer)
