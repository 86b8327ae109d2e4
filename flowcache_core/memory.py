"""What settings that are frozen remember during a run: things found by their type."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

T = TypeVar("T")


class RunMemory:
    """What a policy remembers across the chunks of a run, found by its type."""

    def __init__(self) -> None:
        self._things: dict[type, object] = {}

    def of(self, kind: type[T], make: Callable[[], T]) -> T:
        if kind not in self._things:
            self._things[kind] = make()
        return cast(T, self._things[kind])

    def find(self, kind: type[T]) -> T | None:
        return cast("T | None", self._things.get(kind))

    def clear(self) -> None:
        self._things.clear()
