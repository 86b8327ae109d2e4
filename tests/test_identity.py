"""What a film depends on, as it is digested: equal for equal settings, whatever has run in between."""

from __future__ import annotations

from collections.abc import Callable

from flowcache_core.run.identity import digest


def averaging(strength: float) -> Callable[[float], float]:
    """As nodes around guidance are written: a setting, and what is kept from one call to the next."""
    kept = 0.0

    def average(x: float) -> float:
        nonlocal kept
        kept = strength * kept + x
        return kept

    return average


def inside(strength: float) -> Callable[[float], float]:
    """The same, kept by a function within."""
    kept = 0.0

    def outer(x: float) -> float:
        def inner() -> None:
            nonlocal kept
            kept += strength * x

        inner()
        return kept

    return outer


def test_what_a_function_keeps_from_call_to_call_is_none_of_its_settings() -> None:
    for made in (averaging, inside):
        function, before = made(0.5), digest(made(0.5))
        assert digest(function) == before
        assert function(2.0) != 0
        assert digest(function) == before
        assert digest(made(0.25)) != before
