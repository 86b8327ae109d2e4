"""The partial films of the latest runs, as they were sent to a page, for one that was loaded after that."""

from __future__ import annotations

from collections import deque
from threading import Lock
from typing import Any

MOST = 48 * 2**20
"""Bytes that are kept, of all films: some six minutes."""
BESIDE = 1024
"""Bytes of a message beside its picture, at most."""

Message = dict[str, Any]


class LatestFilms:
    """Messages of `PartialFilm`, in the order in which they were sent; the oldest are dropped first."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._size = 0
        self._lock = Lock()

    def put(self, message: Message) -> None:
        with self._lock:
            self._messages.append(message)
            self._size += _size(message)
            while self._size > MOST:
                self._size -= _size(self._messages.popleft())

    def of(self, run: str | None) -> list[Message]:
        """Those of one run."""
        with self._lock:
            return [message for message in self._messages if message["run"] == run]


def _size(message: Message) -> int:
    return len(message["picture"]) + BESIDE


FILMS = LatestFilms()
