"""Where films go: a folder of this machine, or any URL that fsspec knows. A file is there whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from ..files import whole

T = TypeVar("T")


class Destination(Protocol):
    def names(self) -> set[str]:
        """Of the files that are there. Raises OSError."""
        ...

    def read(self, name: str) -> bytes:
        """Raises OSError."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Whole or not at all, in place of what was there. Raises OSError, with the name."""
        ...


@dataclass(frozen=True)
class Folder:
    path: Path

    def names(self) -> set[str]:
        return {one.name for one in self.path.iterdir() if one.is_file()} if self.path.exists() else set()

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        with whole(self.path / name) as partial:
            partial.write_bytes(content)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Remote:
    """`system`: an fsspec file system; `root`: a path in it."""

    system: Any
    root: str
    url: str

    def names(self) -> set[str]:
        return set(self._asked("", self._listed))

    def _listed(self) -> list[str]:
        if not self.system.exists(self.root):
            return []
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in self.system.ls(self.root, detail=False, refresh=True)]

    def read(self, name: str) -> bytes:
        return self._asked(name, lambda: bytes(self.system.cat_file(f"{self.root}/{name}")))

    def write(self, name: str, content: bytes) -> None:
        self._asked(name, lambda: self._put(f"{self.root}/{name}", content))

    def _put(self, path: str, content: bytes) -> None:
        """Under another name first: not every system makes a file appear in one step, but all of them rename."""
        folder, _, name = path.rpartition("/")
        partial = f"{folder}/.{uuid4().hex[:8]}.partial-{name}"
        self.system.makedirs(self.root, exist_ok=True)
        try:
            self.system.pipe_file(partial, content)
            self.system.mv(partial, path)
        except BaseException:
            with suppress(Exception):
                self.system.rm_file(partial)
            raise

    def _asked(self, name: str, call: Callable[[], T]) -> T:
        """Every system has errors of its own."""
        try:
            return call()
        except Exception as error:
            number = getattr(error, "errno", None)
            raise OSError(number if isinstance(number, int) else errno.EIO, str(error) or type(error).__name__, f"{self.url}/{name}") from error

    def __str__(self) -> str:
        return self.url


def destination_of(text: str) -> Destination:
    """Raises ValueError for a URL that cannot be used, with what fsspec says of it, and for a name that is a file's."""
    if "://" not in text:
        if Path(text).exists() and not Path(text).is_dir():
            raise ValueError(f"--out {text} is a file: name a folder")
        return Folder(Path(text))
    try:
        import fsspec

        system, root = fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise ValueError(f"films cannot be written to {text} ({error}): install what is missing, or name a folder") from None
    return Remote(system, root.rstrip("/"), text.rstrip("/"))
