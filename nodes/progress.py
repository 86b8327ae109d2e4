"""Progress of a run: console, bar, preview, live panel and partial film. It decides nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tqdm.auto import tqdm

from ..flowcache_core.run.report import NOT_RUN, RunReport
from ..flowcache_core.run.run import Run
from ..flowcache_core.sampling.chunk import Chunk
from .live import LivePanel
from .page import Page

if TYPE_CHECKING:
    from .partial_film import PartialFilm
    from .projector import FilmPreview


def say(lines: Iterable[str]) -> None:
    """Onto the console, above a progress bar. A console that is closed ends no run."""
    with suppress(OSError, ValueError):
        for line in lines:
            tqdm.write(f"FlowCache: {line}", file=sys.stderr)


class Progress:
    """Bar, preview, live panel and partial film of one run.

    Use it as a context manager: leaving it with an error tells the panel that the run was stopped. With a `preview` finished chunks are shown.
    """

    remembers: ClassVar[tuple[str, ...]] = ("so_far",)

    def __init__(self, film: torch.Tensor, run: Run, node: str | None, callback: Any, hide: bool, preview: FilmPreview | None = None) -> None:
        self.total, self.chunks, self.callback, self.at = run.steps, run.chunks, callback, 0
        page = Page(node)
        self.shown, self.live = film.clone(), LivePanel(page, run)
        self.film = preview.start(page, self.live.name, film.shape) if preview else None
        self.reached = 0
        self.bar = tqdm(total=self.total, disable=hide)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        if self.film is not None:
            self.film.close()
        if error is not None:
            self.live.stop()

    def begin(self, report: RunReport, notes: Iterable[str]) -> None:
        """What is known before the first step, onto console and page. A run that goes on has come some way already."""
        say(notes)
        self.at = int((report.map != NOT_RUN).sum())
        self.bar.update(self.at - self.bar.n)
        self.live.show(report, self.at)

    @property
    def so_far(self) -> torch.Tensor:
        """The preview of the frames that were reached; set, it is put in place."""
        return self.shown[:, :, : self.reached]

    @so_far.setter
    def so_far(self, frames: torch.Tensor) -> None:
        self.reached = frames.shape[2]
        self.shown[:, :, : self.reached].copy_(frames)

    def step(self, report: RunReport, chunk: Chunk, clean: torch.Tensor | None, film: torch.Tensor) -> None:
        """`clean`: the chunk as it is now predicted; None where its step was skipped, which leaves the preview as it is."""
        if clean is not None:
            self.shown[:, :, chunk.start : chunk.start + chunk.frames] = clean
        self.at, self.reached = self.at + 1, max(self.reached, chunk.start + chunk.frames)
        self.bar.set_postfix_str(f"chunk {chunk.index + 1}/{self.chunks}, {report.share:.0%} of tokens computed", refresh=False)
        self.bar.update()
        self.live.show(report, self.at, chunk)
        last = self.at == self.total
        if self.callback is not None and (last or clean is not None):
            self.callback(self.at - 1, self.shown if last else clean, film, self.total)
        if self.film is not None:
            self._grow(self.film, report, chunk, film)

    def _grow(self, partial: PartialFilm, report: RunReport, chunk: Chunk, film: torch.Tensor) -> None:
        if chunk.step == chunk.steps - 1:
            partial.ready = chunk.start + chunk.frames
        if self.at == self.total:
            partial.finish(film, report)
        else:
            partial.advance(film, report)

    def end(self, report: RunReport) -> dict[str, Any]:
        """What the panel shows from now on."""
        return self.live.end(report)
