"""KV policies by name, with settings as people write them: `importance-redundancy lam=0.5 queries=chunk`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .policy import KVPolicy
from .scores import KV_POLICIES
from .scores.salience import Salience


def policy_named(name: str, settings: str = "", head: str = "") -> KVPolicy:
    """Raises ValueError for a name, a setting or a value that does not exist, with those that do.

    `settings`: name=value, apart by spaces or commas; what is not named keeps its default. `head`: file of the salience head,
    "" for that of the bundled model; other policies need none.
    """
    kind = next((kind for kind in KV_POLICIES if kind.name == name), None)
    if kind is None:
        raise ValueError(f"no KV policy is called {name!r}: there are {', '.join(kind.name for kind in KV_POLICIES)}")
    known = settings_of(kind)
    given: dict[str, Any] = {"path": head} if kind is Salience else {}
    for part in settings.replace(",", " ").split():
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} is no setting: write name=value, without spaces around the =")
        if key not in known:
            there_are = ", ".join(f"{name}={default}" for name, default in known.items())
            raise ValueError(f"{name} has no setting {key!r}: " + (f"it has {there_are}" if known else "it has none, leave the settings empty"))
        given[key] = _read(value, known[key], key)
    return kind(**given)


def settings_of(kind: type[KVPolicy]) -> dict[str, Any]:
    """Defaults of what can be written as name=value: numbers and choices, not files."""
    described = [(field, field.metadata["setting"]) for field in fields(kind) if "setting" in field.metadata]  # type: ignore[arg-type]
    return {field.name: field.default for field, rule in described if rule.options or not isinstance(field.default, str)}


def _read(value: str, default: Any, name: str) -> Any:
    if isinstance(default, str):
        return value
    try:
        return type(default)(value)
    except ValueError as error:
        kind = "whole number" if isinstance(default, int) else "number"
        raise ValueError(f"{name} is {value!r}: it must be a {kind}, such as {default}") from error
