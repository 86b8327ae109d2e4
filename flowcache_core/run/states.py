"""The folder in which runs leave their state, and sentences about the states that lie there.

A state lies under the digest of all that its film depends on: what is found under a film's digest is of this film. Two runs of one film
write the same state, each in one step; whichever is found, the film comes out the same. States of other films are left alone, but for
the oldest where they become too many.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..untrusted import short
from .identity import Film, differences, key_of
from .state_file import PARTIAL, StateFile, metadata_of, read_state

SUFFIX = ".safetensors"
STATE = re.compile(r"([0-9a-f]{16})(\.\d+)?\.safetensors")
LEFT = re.compile(r"\.[0-9a-f]{16}(\.\d+)?\.[0-9a-f]{8}\.partial")
KEPT = 4
"""States of unfinished films in a folder."""
ABANDONED_S = 900.0
"""What nobody has written to for so long was left behind by a run that was killed."""


@dataclass(frozen=True)
class States:
    """Where the states of runs lie, and after how many finished chunks one is written. Raises ValueError for fewer than 1.

    `film`: what the film depends on and a run does not know, by name: its texts, the weights.
    """

    folder: Path
    every: int = 1
    film: Mapping[str, object] = field(default_factory=dict)
    part: int | None = None
    """Which of the devices that share the film writes here; None where one makes it."""
    keep: bool = False
    """Whether the last state stays when the latents are there, for whoever has not done with them yet."""
    named: Film | None = None
    """All that the film depends on, as the first of the devices that share it has said; None: this process finds out by itself."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"the state of a run was to be saved every {self.every} chunks: use 1 or more, or leave it out")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> States:
        return cls(Path(data["folder"]), data["every"], keep=data["keep"], named=data["named"])

    def as_json(self) -> dict[str, Any]:
        """For another device of the film, which has been named."""
        return {"folder": f"{self.folder.absolute()}", "every": self.every, "keep": self.keep, "named": self.named}

    def path(self, film: Film) -> Path:
        part = "" if self.part is None else f".{self.part}"
        return self.folder / f"{key_of(film)}{part}{SUFFIX}"

    def find(self, film: Film) -> StateFile | None:
        """None where nothing was saved of this film. Raises ValueError, or OSError, for a state that cannot be used."""
        path = self.path(film)
        if not path.is_file():
            return None
        found = read_state(path)
        if found.metadata.get("film") != film:
            raise ValueError(f"{path.name} is of another film")
        return found

    def nearest(self, film: Film) -> str:
        """In a sentence, which of the films that were saved is nearest to this one, and how it differs; "" where there is none."""
        others = [(differences(there, film), size_of(metadata)) for metadata, there in self._films() if there != film]
        if not others:
            return ""
        named, size = min(others, key=lambda other: len(other[0]))
        listed = "; ".join([*named[:NAMED], *([f"{len(named) - NAMED} settings more"] if len(named) > NAMED else [])])
        return f"a state of {size} was saved of another film, which differs in {listed}. This film begins anew; with those settings that one goes on"

    @property
    def films(self) -> list[Film]:
        """Those of which a state lies here."""
        return [there for _, there in self._films()]

    def _films(self) -> Iterator[tuple[Mapping[str, object], Film]]:
        for path in self._all():
            with suppress(OSError, ValueError):
                match metadata := metadata_of(path):
                    case {"film": dict(there)}:
                        yield metadata, {str(name): str(value) for name, value in there.items()}

    def try_out(self, film: Film) -> None:
        """Raises OSError where no file can be made in the folder."""
        trial = self.folder / f".{self.path(film).stem}.00000000{PARTIAL}"
        self.folder.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink(missing_ok=True)

    def tidy(self) -> None:
        """The oldest states go, and what killed runs left half written."""
        with suppress(OSError):
            paths = sorted(self._all(), key=_changed, reverse=True)
            latest = list(dict.fromkeys(map(_key, paths)))[:KEPT]
            for path in paths:
                if _key(path) not in latest:
                    path.unlink(missing_ok=True)
            for path in self.folder.iterdir():
                if LEFT.fullmatch(path.name) and _changed(path) < time.time() - ABANDONED_S:
                    path.unlink(missing_ok=True)

    def drop(self, film: Film) -> None:
        """A film is finished: its state goes, the parts of all devices, and the folder, if nothing else lies in it."""
        with suppress(OSError):
            for path in self._all():
                if _key(path) == key_of(film):
                    path.unlink(missing_ok=True)
            self.tidy()
            self.folder.rmdir()

    def _all(self) -> list[Path]:
        with suppress(OSError):
            return [path for path in self.folder.iterdir() if STATE.fullmatch(path.name)]
        return []


NAMED = 4
"""Of the settings in which two films differ, those that are named."""


def size_of(metadata: Mapping[str, object]) -> str:
    """How much of a film is finished, in words."""
    match metadata.get("chunks"):
        case [int(done), int(chunks)]:
            return f"{done} of {chunks} chunks"
    return "some chunks"


def not_used(error: Exception) -> str:
    why = short(f"the system does not read it, {error.strerror}" if isinstance(error, OSError) else error, 300)
    return f"a state of this film was saved, but cannot be used: {why}. The film begins anew"


def not_saved(error: Exception) -> str:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"the state of this run cannot be saved ({short(why)}): the run goes on, and a state that was saved before stays"


def _key(path: Path) -> str:
    """Of the film: the same for the parts of all devices."""
    return path.name.split(".")[0]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
