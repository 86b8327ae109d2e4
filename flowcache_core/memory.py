"""What is remembered during a run: by settings that are frozen, as things found by their type; by other objects, in named attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol, TypeVar, cast, runtime_checkable

T = TypeVar("T")


@runtime_checkable
class Remembers(Protocol):
    """An object that goes along with a run. `remembers`: the attributes that change meanwhile; all others are settings, or follow from these."""

    remembers: ClassVar[tuple[str, ...]]


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

    def all(self) -> list[object]:
        return list(self._things.values())

    def put(self, things: Iterable[object]) -> None:
        """Each under its own type."""
        self._things.update({type(thing): thing for thing in things})

    def clear(self) -> None:
        self._things.clear()
