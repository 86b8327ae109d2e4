"""The named settings of Chunkwise Cache: the one table of them.

`safe`, `balanced` and `fast` are ours: shares of computed chunk-steps, for which the threshold is found, so that they mean the same
on every model and at every number of steps. The others are the rule published for SkyReels-V2 (FlowCache, ICLR 2026, section 3 and
its released settings): time signature through the published polynomial, threshold 0.1 (slow) or 0.15 (fast), five warm-up
steps, the last step always computed, no limit of reused steps in a row, the residual replayed. The published polynomial is
negative for small changes; the names that end in `-exact` let it be so, the others clamp it at 0.
"""

from __future__ import annotations

from ..decision import Rescale
from .chunkwise import Chunkwise
from .target import Target

CUSTOM = "custom"


def published(threshold: float, rescale: Rescale) -> Chunkwise:
    return Chunkwise(threshold, warmup_steps=5, max_reuse=1000, signature="time", replay="residual", order=0, rescale=rescale)


PRESETS: dict[str, Chunkwise] = {
    "safe": Target(share=0.55),
    "balanced": Target(share=0.4),
    "fast": Target(share=0.3),
    "flowcache-slow": published(0.1, "clamped"),
    "flowcache-fast": published(0.15, "clamped"),
    "flowcache-slow-exact": published(0.1, "unclamped"),
    "flowcache-fast-exact": published(0.15, "unclamped"),
}


def preset(name: str) -> Chunkwise:
    """Raises ValueError for a name that is not in the table."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def describe(rule: Chunkwise) -> str:
    """The settings in use, in one line."""
    goal = f"target {rule.share:.0%} of chunk-steps computed" if isinstance(rule, Target) else f"threshold {rule.threshold:g}"
    first, last = rule.start_percent, rule.end_percent
    where = "" if (first, last) == (0, 1) else f", reuse from {first:.0%} to {last:.0%} of the steps"
    rescale = "" if rule.rescale == "none" else f", rescale {rule.rescale}"
    return (
        f"{goal}, warmup_steps {rule.warmup_steps}, max_reuse {rule.max_reuse}, signature {rule.signature}{rescale}, "
        f"replay {rule.replay}, order {rule.order}{where}"
    )
