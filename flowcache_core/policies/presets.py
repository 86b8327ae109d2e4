"""The named settings of Chunkwise Cache: the one table of them.

`safe`, `balanced`, `fast` and `turbo` are ours: plans, of a share of all tokens that is computed, so that they mean the same on every
model and at every number of steps. The others are the rule published for SkyReels-V2 (FlowCache, ICLR 2026, section 3 and
its released settings): time signature through the published polynomial, threshold 0.1 (slow) or 0.15 (fast), five warm-up
steps, the last step always computed, no limit of reused steps in a row, the residual replayed. The published polynomial is
negative for small changes; the names that end in `-exact` let it be so, the others clamp it at 0.
"""

from __future__ import annotations

from .chunkwise import Chunkwise
from .planned import Planned
from .protocol import Rescale
from .target import Target

CUSTOM = "custom"


def published(threshold: float, rescale: Rescale) -> Chunkwise:
    return Chunkwise(threshold, warmup_steps=5, max_reuse=1000, signature="time", replay="residual", order=0, rescale=rescale)


PLANS: dict[str, Planned] = {
    "safe": Planned(share=0.55),
    "balanced": Planned(share=0.4),
    "fast": Planned(share=0.3),
    "turbo": Planned(share=0.13),
}
RULES: dict[str, Chunkwise] = {
    "flowcache-slow": published(0.1, "clamped"),
    "flowcache-fast": published(0.15, "clamped"),
    "flowcache-slow-exact": published(0.1, "unclamped"),
    "flowcache-fast-exact": published(0.15, "unclamped"),
}
PRESETS: dict[str, Planned | Chunkwise] = {**PLANS, **RULES}
MAGI_RULES: dict[str, Chunkwise] = {
    "flowcache-magi-slow": Chunkwise(0.01, warmup_steps=5, max_reuse=1000, signature="latent", order=0),
    "flowcache-magi-fast": Chunkwise(0.015, warmup_steps=5, max_reuse=1000, signature="latent", order=0),
}
"""The thresholds that FlowCache released for MAGI-1 at 64 steps. There drift is measured behind the patch embedding, here on the latents;
there the latent increment is replayed, here the velocity. Other models have other thresholds: these are for MAGI-1 alone."""


def preset(name: str) -> Planned | Chunkwise:
    """Raises ValueError for a name that is in no table."""
    known = {**PRESETS, **MAGI_RULES}
    if name not in known:
        raise ValueError(f"there is no preset {name!r}: use one of {', '.join(known)}")
    return known[name]


def describe(rule: Planned | Chunkwise) -> str:
    """The settings in use, in one line."""
    if isinstance(rule, Planned):
        return f"{budget(rule)}; in which steps is settled before the run and in step over chunks, and what is skipped is integrated over"
    goal = f"target {rule.share:.0%} of chunk-steps computed" if isinstance(rule, Target) else f"threshold {rule.threshold:g}"
    first, last = rule.start_percent, rule.end_percent
    where = "" if (first, last) == (0, 1) else f", reuse from {first:.0%} to {last:.0%} of the steps"
    rescale = "" if rule.rescale == "none" else f", rescale {rule.rescale}"
    return (
        f"{goal}, warmup_steps {rule.warmup_steps}, max_reuse {rule.max_reuse}, signature {rule.signature}{rescale}, "
        f"replay {rule.replay}, order {rule.order}{where}"
    )


def budget(rule: Planned) -> str:
    """What a plan may spend, in words."""
    if rule.exact is not None:
        return "the given plan says what is computed"
    if rule.seconds:
        return f"as many of all tokens are computed as {rule.seconds:g} s of the network allow"
    return f"{rule.share:.0%} of all tokens are computed"


def on_signature(rule: Chunkwise) -> tuple[str, ...]:
    """Says of a rule that does not depend on the content what else does not."""
    if rule.signature != "time" or rule.threshold == 0:
        return ()
    return (
        "under signature time this rule is a plan too, only a worse one: nothing in it depends on the content, and chunks get out of step; "
        f"the presets {', '.join(PLANS)} spend the same share better",
    )
