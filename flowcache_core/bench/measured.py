"""What benches wrote into docs/bench, and how a page shows it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..models.bundle import weights_id

ROOT = Path(__file__).parents[2]
DATA = "docs/bench"


def data(name: str) -> dict[str, Any]:
    """What a bench wrote. Raises ValueError where the file is missing or of other weights than the bundled ones."""
    path = ROOT / DATA / f"{name}.json"
    if not path.exists():
        raise ValueError(f"{DATA}/{name}.json is not there: measure it first (python -m flowcache_core bench {name} --json {DATA}/{name}.json)")
    values: dict[str, Any] = json.loads(path.read_text())
    if values.get("weights") != weights_id():
        raise ValueError(
            f"{DATA}/{name}.json was measured on other weights ({values.get('weights')}) than are bundled ({weights_id()}): measure again"
        )
    return values


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def origin(name: str, command: str = "") -> str:
    """Where figures come from, in one line; `command` in place of what the file says."""
    d = data(name)
    return f"`{command or d['command']}`, {d['device']}, {d['dtype']}, commit {d['commit']}, {d['date']}.\n"
