"""What a fleet makes: one film of a line, and what came of it. Who makes it is unknown here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..kv.compressor import Compressor
from ..policies.protocol import CachePolicy
from ..run.generate import Job

Asked = Mapping[str, Any]
"""A line of a jobs file, as it was read."""
TITLE = 40
"""Characters of a title in the name of a file."""


@dataclass(frozen=True)
class Task:
    """One film. `line`: in the jobs file, from 1; `key`: digest of all that the film depends on; `title`: what its files begin with."""

    line: int
    key: str
    title: str
    asked: Asked

    @property
    def stem(self) -> str:
        """Of the names of its files: readable, and another one for another film."""
        return f"{slug(self.title)}-{self.key}"


@dataclass(frozen=True)
class FilmTask(Task):
    """Made by a bundled model, of this name."""

    model: str
    job: Job
    policy: CachePolicy | None = None
    compressor: Compressor | None = None


@dataclass(frozen=True)
class GraphTask(Task):
    """Made by a ComfyUI server from a workflow in the API format."""

    graph: Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """`films`: contents by what follows the stem in their names; `report`: plain JSON values; `where`: who made it."""

    films: Mapping[str, bytes]
    report: Mapping[str, Any]
    seconds: float
    where: str


@dataclass(frozen=True)
class Failed:
    """`why`: a sentence."""

    why: str
    where: str


Result = Made | Failed


def slug(title: str) -> str:
    """As it may stand in the name of a file on every system."""
    return re.sub(r"[^A-Za-z0-9]+", "-", title)[:TITLE].strip("-").lower() or "film"
