"""KV policies by name, with settings as people write them: `importance-redundancy lam=0.5 queries=chunk`."""

from __future__ import annotations

from typing import Any

from ..settings import kind_named, read_settings
from .policy import KVPolicy
from .scores import KV_POLICIES
from .scores.salience import Salience


def policy_named(name: str, settings: str = "", head: str = "") -> KVPolicy:
    """Raises ValueError for a name, a setting or a value that does not exist, with those that do.

    `settings`: as in `read_settings`. `head`: file of the salience head, "" for that of the bundled model; other policies need none.
    """
    kind = kind_named(KV_POLICIES, name, "KV policy")
    given: dict[str, Any] = {"path": head} if kind is Salience else {}
    return kind(**given, **read_settings(kind, settings))
