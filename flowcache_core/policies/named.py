"""Cache policies by name, with settings as people write them: `threshold threshold=0.2 order=0`; and in words."""

from __future__ import annotations

from ..settings import described, kind_named, read_settings
from . import POLICIES
from .protocol import CachePolicy


def policy_named(name: str, settings: str = "") -> CachePolicy:
    """Raises ValueError for a name, a setting or a value that does not exist, with those that do. `settings`: as in `read_settings`."""
    kind = kind_named(POLICIES, name, "cache policy")
    return kind(**read_settings(kind, settings))


def in_words(policy: CachePolicy) -> tuple[str, ...]:
    """What a policy is called; then each of its settings, with its value and what it does."""
    return (policy.title, *(f"{name}={getattr(policy, name)}: {rule.help}" for name, rule in described(policy).items()))
