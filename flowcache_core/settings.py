"""How the fields of a frozen dataclass of settings describe and check themselves: default, range and help in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Setting:
    """How a field of a policy is shown and checked: one place for default, range and help."""

    help: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    options: tuple[str, ...] = ()
    advanced: bool = False


def setting(default: Any, help: str, **kw: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(help, **kw)})


def check(policy: Any) -> None:
    """Raises ValueError, with the range, for a field outside its own."""
    for name, f in policy.__dataclass_fields__.items():
        rule, value = f.metadata.get("setting"), getattr(policy, name)
        if rule is None:
            continue
        if rule.options and value not in rule.options:
            raise ValueError(f"{name} is {value!r}: use one of {', '.join(rule.options)}")
        if rule.low is not None and not rule.low <= value <= rule.high:
            raise ValueError(f"{name} is {value}: it must lie between {rule.low} and {rule.high}")
