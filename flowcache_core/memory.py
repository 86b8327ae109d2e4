"""What is remembered during a run: by settings that are frozen, as things found by their type; by other objects, in named attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

import torch

T = TypeVar("T")


@runtime_checkable
class Remembers(Protocol):
    """An object that goes along with a run. `remembers`: the attributes that change meanwhile; all others are settings, or follow from these."""

    remembers: ClassVar[tuple[str, ...]]


@runtime_checkable
class TakesIn(Protocol):
    """An object that copies what it remembers in one attribute, `copied`, into memory of its own when a run goes on. It is handed over with its
    tensors in the computer's memory, so that the device never holds it twice."""

    copied: ClassVar[str]

    def take_in(self, value: Any, device: torch.device) -> None:
        """`device`: that of the run. Raises ValueError or RuntimeError for what does not fit."""
        ...


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
