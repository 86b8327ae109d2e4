"""How the fields of a frozen dataclass of settings describe and check themselves, and how they are written: `threshold=0.1 order=1`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar


@dataclass(frozen=True, slots=True)
class Setting:
    """How a field of a policy is shown and checked: one place for default, range and help."""

    help: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    options: tuple[str, ...] = ()
    advanced: bool = False


class Named(Protocol):
    """A kind of settings that is chosen by its name."""

    name: ClassVar[str]


K = TypeVar("K", bound=Named)


def setting(default: Any, help: str, **kw: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(help, **kw)})


def check(policy: Any) -> None:
    """Raises ValueError, with the range, for a field outside its own."""
    for name, rule in described(policy).items():
        value = getattr(policy, name)
        if rule.options and value not in rule.options:
            raise ValueError(f"{name} is {value!r}: use one of {', '.join(rule.options)}")
        if rule.low is not None and rule.high is not None and not rule.low <= value <= rule.high:
            raise ValueError(f"{name} is {value}: it must lie between {rule.low} and {rule.high}")


def described(kind: Any) -> dict[str, Setting]:
    """The fields of a kind, or of its settings, that describe themselves; in their order."""
    return {name: f.metadata["setting"] for name, f in kind.__dataclass_fields__.items() if "setting" in f.metadata}


def settings_of(kind: Any) -> dict[str, Any]:
    """Defaults of what can be written as name=value: numbers, choices, and true or false; not files."""
    found = [(name, rule, kind.__dataclass_fields__[name].default) for name, rule in described(kind).items()]
    return {name: default for name, rule, default in found if rule.options or not isinstance(default, str)}


def kind_named(kinds: Sequence[type[K]], name: str, what: str) -> type[K]:
    """Raises ValueError, with the names that there are, where none of the kinds has this one. `what`: what they are called."""
    kind = next((kind for kind in kinds if kind.name == name), None)
    if kind is None:
        raise ValueError(f"no {what} is called {_cut(name)}: there are {', '.join(kind.name for kind in kinds)}")
    return kind


def read_settings(kind: type[Named], text: str) -> dict[str, Any]:
    """What a text gives of the settings of a kind: name=value, apart by spaces or commas; what it does not name keeps its default.

    Raises ValueError for a setting or a value that does not exist, with those that do.
    """
    known, given = settings_of(kind), {}
    for part in text.replace(",", " ").split():
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{_cut(part)} is no setting: write name=value, without spaces around the =")
        if key not in known:
            there_are = ", ".join(f"{name}={default}" for name, default in known.items())
            raise ValueError(
                f"{kind.name} has no setting {_cut(key)}: " + (f"it has {there_are}" if known else "it has none, leave the settings empty")
            )
        given[key] = _read(value, known[key], key)
    return given


def _cut(text: str, most: int = 60) -> str:
    """In quotes, as it may stand in a sentence."""
    return repr(text if len(text) <= most else f"{text[:most]}...")


def _read(value: str, default: Any, name: str) -> Any:
    if isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{name} is {_cut(value)}: it must be true or false")
        return value.lower() == "true"
    try:
        return type(default)(value)
    except ValueError as error:
        kind = "whole number" if isinstance(default, int) else "number"
        raise ValueError(f"{name} is {_cut(value)}: it must be a {kind}, such as {default}") from error
