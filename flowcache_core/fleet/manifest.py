"""What lies in a folder of films: an entry for each, in manifest.json, written whole after every film."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..untrusted import parsed
from .destination import Destination
from .dispatch import Outcome
from .tasks import Made, Task

NAME = "manifest.json"
FORMAT = "flowcache-films-1"
REPORT = ".json"
"""Right behind the key, where no film ends so: it then has a number."""
NOT_MADE, MADE, FAILED = "not made yet", "made", "failed"
OF_KEY = re.compile(r"-([0-9a-f]{16})(?:-\d+)?\.\w+$")
Entry = dict[str, Any]


class Manifest:
    """Of the films of a jobs file, and of those that were made there before. `made_with`: what all have in common."""

    def __init__(self, destination: Destination, tasks: Sequence[Task], made_with: dict[str, Any]) -> None:
        self.destination, self.made_with = destination, made_with
        self._before = self._read()
        there = files_by_key(destination.names())
        self.entries: dict[str, Entry] = {task.key: self._entry(task, there.get(task.key, set())) for task in tasks}
        self.unfinished = [task for task in tasks if self.entries[task.key]["state"] != MADE]

    def _read(self) -> dict[str, Entry]:
        """Entries that were made, by key. A manifest that cannot be read is written anew: which films there are, their files say."""
        with suppress(OSError, ValueError, AttributeError, TypeError):
            values = parsed(self.destination.read(NAME).decode())
            return {str(one["key"]): dict(one) for one in values["films"] if one.get("state") == MADE}
        return {}

    def _entry(self, task: Task, files: set[str]) -> Entry:
        """A film is finished where its report is, which is written last."""
        known = {"line": task.line, "key": task.key, "asked": dict(task.asked)}
        report = next((name for name in sorted(files) if name.endswith(f"-{task.key}{REPORT}")), None)
        if report is None or len(files) < 2:
            return {**known, "state": NOT_MADE}
        before = {name: value for name, value in self._before.get(task.key, {}).items() if name in ("seconds", "tries", "where")}
        return {**known, "state": MADE, "films": sorted(files - {report}), "report": report, **before}

    def add(self, outcome: Outcome[Any]) -> None:
        """Writes what was made, and the manifest. Raises OSError where that cannot be written."""
        task, result = outcome.task, outcome.result
        known = {"line": task.line, "key": task.key, "asked": dict(task.asked), "tries": outcome.tries, "where": result.where}
        if isinstance(result, Made):
            films = [f"{task.stem}{end}" for end in result.films]
            for name, content in zip(films, result.films.values(), strict=True):
                self.destination.write(name, content)
            self.destination.write(f"{task.stem}{REPORT}", as_json({"key": task.key, "asked": dict(task.asked), **result.report}))
            made = {"films": films, "report": f"{task.stem}{REPORT}", "seconds": round(result.seconds, 3)}
            self.entries[task.key] = {**known, "state": MADE, **made}
        else:
            self.entries[task.key] = {**known, "state": FAILED, "why": result.why}
        self.write()

    def write(self) -> None:
        """Raises OSError."""
        others = [one for key, one in self._before.items() if key not in self.entries]
        self.destination.write(NAME, as_json({"format": FORMAT, **self.made_with, "films": [*self.entries.values(), *others]}))

    def count(self, state: str) -> int:
        return sum(one["state"] == state for one in self.entries.values())


def files_by_key(names: set[str]) -> dict[str, set[str]]:
    """Names of whole files by the key of the film that they are of."""
    found: dict[str, set[str]] = {}
    for name in names:
        if not name.startswith(".") and (key := OF_KEY.search(name)):
            found.setdefault(key[1], set()).add(name)
    return found


def as_json(values: dict[str, Any]) -> bytes:
    return f"{json.dumps(values, indent=1)}\n".encode()
