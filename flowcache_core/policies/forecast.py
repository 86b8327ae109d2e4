"""What is known of a chunkwise run before it begins: how much it will compute, and whether there is anything to skip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .protocol import Outlook
from .thresholds import computed_from, least_computed

if TYPE_CHECKING:
    from .chunkwise import Chunkwise

FEW_STEPS = 8
"""With this many steps per chunk or fewer, neighbouring steps differ too much for reuse to be worth a lot."""
FEW_FREE = 3


def expected_steps(rule: Chunkwise, outlook: Outlook) -> tuple[str, ...]:
    """How many of how many chunk-steps will be computed: exact for signature time, otherwise what bounds it."""
    chunks, steps = outlook.chunks, outlook.steps
    total = chunks * steps
    if rule.threshold == 0:
        return (f"all {total} chunk-steps will be computed: threshold is 0",)
    if rule.signature == "time":
        n = chunks * computed_from(rule, rule.threshold, rule.known_changes(outlook))
        return (f"{n} of {total} chunk-steps will be computed",)
    least = chunks * least_computed(rule, steps)
    return (f"at least {least} of {total} chunk-steps will be computed; how many more shows as the latents drift",)


def nothing_skipped() -> str:
    """What is said of a finished run in which a threshold let every step be computed, and what would change that; a plan says so before."""
    return (
        "nothing was skipped, so no time was saved: at every step at which a chunk may be skipped it had drifted past the threshold; raise the "
        "threshold, or use a preset that plans, such as balanced"
    )


def on_rescaling(rule: Chunkwise, polynomial: Sequence[float]) -> tuple[str, ...]:
    if rule.rescale == "none":
        return ()
    if not polynomial:
        return ("no polynomial was published for this model: its changes are added up as they are",)
    how = "clamped at 0" if rule.rescale == "clamped" else "not clamped"
    return (f"changes go through the polynomial published for a model of this size, {how}",)


def free_steps(rule: Chunkwise, steps: int) -> int:
    """How many steps of a chunk are neither warm-up, nor the last, nor outside start_percent..end_percent."""
    return sum(not rule.forced(step, steps, computed=step) for step in range(steps))


def headroom(rule: Chunkwise, steps: int) -> tuple[str, ...]:
    """Says where reuse cannot help much and what does; () where it can."""
    free = free_steps(rule, steps)
    if rule.threshold == 0 or (steps > FEW_STEPS and free >= FEW_FREE):
        return ()
    can = f"at most {free}" if free else "none"
    sentence = f"little to skip: of {steps} steps per chunk {steps - free} are always computed, so {can} can be reused ({free / steps:.0%})"
    helps = []
    if free_steps(replace(rule, warmup_steps=1, start_percent=0.0, end_percent=1.0), steps) > free:
        helps += [f"a lower warmup_steps (it is {rule.warmup_steps})"] if rule.warmup_steps > 1 else []
        helps += ["a wider start_percent to end_percent"] if (rule.start_percent, rule.end_percent) != (0, 1) else []
    if steps <= FEW_STEPS:
        sentence += "; few steps are a speed-up already"
        helps += ["a smaller picture", "a smaller window in AR Chunk Sampler"]
    *others, final = helps
    return (f"{sentence}. What helps: {', '.join(others)}{' or ' if others else ''}{final}",)
