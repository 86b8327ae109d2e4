"""A jobs file: JSON lines, each of one film. Every line is checked before anything runs, and refused by its number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from ..untrusted import parsed, short
from .tasks import Asked, Task

BYTES = 64 << 20
LINE = 1 << 20
"""Characters of a line that are read."""
T = TypeVar("T", bound=Task)
V = TypeVar("V", bool, int, float, str)
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text in double quotes"}


def read_tasks(path: Path, task_of: Callable[[int, Asked], T]) -> list[T]:
    """The film of every line that is not empty. Raises ValueError, with the number of the line, for one that cannot be made or was there before."""
    tasks: list[T] = []
    first: dict[str, int] = {}
    for number, text in _lines(path):
        try:
            task = task_of(number, _asked(text))
        except ValueError as error:
            raise ValueError(f"{short(path.name)}, line {number}: {error}") from None
        if task.key in first:
            raise ValueError(f"{short(path.name)}, line {number}: it makes the same film as line {first[task.key]}: leave one of them out")
        first[task.key] = number
        tasks.append(task)
    if not tasks:
        raise ValueError(f"{short(path.name)} has no line: write one film a line, such as " + '{"prompt": "red circle moves right", "seed": 1}')
    return tasks


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Raises ValueError for what is no text file."""
    if not path.is_file():
        raise ValueError(f"there is no jobs file {short(path)}: name a file with one film a line")
    if (size := path.stat().st_size) > BYTES:
        raise ValueError(f"{short(path.name)} has {size} bytes, and at most {BYTES} are read: cut it into several")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{short(path.name)} is no text in UTF-8 (byte {error.start}): save it as UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _asked(text: str) -> Asked:
    try:
        values = parsed(text, LINE)
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error}): write one object a line, in double quotes") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"it is {short(text, 40)}, and a film is an object, such as " + '{"prompt": "red circle moves right", "seed": 1}')
    return values


def require_known(asked: Mapping[str, object], known: tuple[str, ...], what: str) -> None:
    """Raises ValueError, with the names that there are, for one that there is not."""
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"{what} has no setting {short(unknown[0])}: there are {', '.join(known)}")


def typed(asked: Mapping[str, object], name: str, like: V) -> V:
    """A value of the kind of `like`, which it is where none was given. Raises ValueError for another kind."""
    value = asked.get(name, like)
    if isinstance(like, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(like) or value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name} is {short(value)}: it must be {KINDS[type(like)]}")
    return value
