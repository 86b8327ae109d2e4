"""The partial film: finished chunks are decoded during sampling, and their frames are sent to the page.

All of it is done between two steps, in the thread of the run: no two decodes ever meet, and what ends the run ends it too. It decides nothing of the
run and changes nothing of it. What decodes is unknown here.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..flowcache_core.run.report import RunReport
from ..flowcache_core.show.film import frames_of, shrunk, strip_of
from ..flowcache_core.show.pieces import Pieces
from .latest_films import FILMS
from .page import Page

EVENT = "flowcache.film"
SIDE = 320
"""Pixels of the longer side of a frame."""
PAUSE_S = 0.1
"""Between two messages."""
AT_MOST = 384 * 2**10
"""Bytes of the picture in a message."""


class PartialFilm:
    """One run's messages to the tab that queued it. `ready`: how many latent frames are finished, from the first on.

    A message has `frames` frames, the first of which is number `first` of the film, beside one another in the JPEG `picture`; or a `note` in place of
    a film. `fps`: of the film; `run`: as in `LivePanel`; `hindrance`: why nothing can be decoded right now, "" where it can; `go_on`: raises where
    the run was interrupted.
    """

    def __init__(self, pieces: Pieces, page: Page, run: str, fps: int, hindrance: Callable[[], str], go_on: Callable[[], None]) -> None:
        self.page, self.run, self.fps, self.hindrance, self.go_on = page, run, fps, hindrance, go_on
        self.ready, self._frames, self._noted = 0, 0, ""
        self._sent = time.perf_counter() - PAUSE_S
        self._pieces: Pieces | None = pieces

    def advance(self, film: torch.Tensor, report: RunReport) -> None:
        """After a step: decodes one piece of latents [films, C, F, h, w], where one is finished and the last was sent long enough ago."""
        if self._pieces is not None and self._pause() <= 0:
            self._decode(self._pieces, film, report)

    def finish(self, film: torch.Tensor, report: RunReport) -> None:
        """After the last step: decodes the rest, unless nothing was shown on the way, as where all chunks are finished together."""
        while self._pieces is not None and self._frames:
            time.sleep(min(max(self._pause(), 0), PAUSE_S))
            if not self._decode(self._pieces, film, report):
                break
        self.close()

    def close(self) -> None:
        """Lets go of what the decoder remembers."""
        self._pieces = None

    def _pause(self) -> float:
        """Seconds until the next message may be sent."""
        return self._sent + PAUSE_S - time.perf_counter()

    def _may(self) -> bool:
        if not self.page.there:
            return False
        why_not = self.hindrance()
        if why_not:
            self._say(f"The film is not shown while it grows: {why_not}")
        return not why_not

    def _decode(self, pieces: Pieces, film: torch.Tensor, report: RunReport) -> bool:
        """Whether there was a piece, and it could be decoded."""
        self.go_on()
        if pieces.done >= self.ready:
            return False
        if film.device.type == "cuda":
            torch.cuda.synchronize(film.device)  # so that the seconds are those of the decoder
        began = time.perf_counter()
        try:
            piece = pieces.next(film[:1], self.ready) if self._may() else None
            if piece is None:
                return False
            self._show(frames_of(shrunk(piece[..., :3], SIDE).float().cpu()))
        except Exception as why:  # the run goes on without
            self._say(f"The film cannot be shown while it grows: {why}")
            self.close()
            return False
        report.host_syncs += 1
        report.shown.add(len(piece), time.perf_counter() - began)
        return True

    def _show(self, frames: np.ndarray) -> None:
        """uint8 [T, H, W, 3]"""
        picture = strip_of(frames, AT_MOST)
        if picture is not None:
            self._send(frames=len(frames), picture=b64encode(picture).decode(), note="")
        self._frames += len(frames)

    def _say(self, note: str) -> None:
        """Once."""
        if note != self._noted:
            self._noted = note
            self._send(frames=0, picture="", note=note)

    def _send(self, **more: Any) -> None:
        self._sent = time.perf_counter()
        where = {"node": self.page.node, "workflow": self.page.workflow, "run": self.run}
        message = {**where, "first": self._frames, "fps": self.fps, **more}
        FILMS.put(message)
        self.page.send(EVENT, message)
