"""The tables that pages show of `bench causal`, and of `bench kv` on the few-step model."""

from __future__ import annotations

from collections.abc import Callable

from .causal import NAME
from .kv_tables import FRACTIONS, MIB, SHOWN
from .long import WINDOW
from .long_tables import by_arm, by_stretch, with_error
from .measured import data, origin, table

KV = "kv-causal"
ARMS = {
    WINDOW: "the plain window of 5 chunks",
    "shorter window": "a window of 4 chunks, as much as the budget",
    "sink-recent": "`sink-recent`",
    "sink-recent, positions grow": "`sink-recent`, positions not bounded",
    "random": "`random`, the control",
    "even": "`even`",
    "even, no sink": "`even`, without the first chunk",
    "salience": "`salience`",
}


def colours() -> str:
    return by_stretch([NAME], ARMS, "colour", 100, 0, {"chance": "other prompts"})


def moved() -> str:
    return by_stretch([NAME], ARMS, "moved")


def contrast() -> str:
    return by_stretch([NAME], ARMS, "contrast", digits=2)


def saturation() -> str:
    return by_stretch([NAME], ARMS, "saturation", digits=2)


def ends() -> str:
    """Likeness to the plain window's film, returns to the first frames, and memory."""
    lines = []
    for arm, text in ARMS.items():
        first, *_, final = by_arm(NAME)[arm]
        like = [with_error(row["psnr_to_window"]) if row["psnr_to_window"] else "—" for row in (first, final)]
        found = f"{final['returned']}", f"{final['nearest']:.2f}", f"{final['kv_peak_bytes'] / MIB:.1f}"
        lines.append((text, *like, with_error(final["psnr_to_other"]), *found))
    head = ["history", f"PSNR to the window's film at {first['until']} s", f"at {final['until']} s", "to that of another prompt", "films that return",
            "nearest return", "KV peak, MiB"]  # fmt: skip
    return table(head, lines)


def clean_pass() -> str:
    found = data(NAME)["clean_pass"]
    lines = []
    for name, text in (("every", "every chunk"), ("none", "none")):
        one = found[name]
        close = "—" if name == "every" else with_error(found["psnr"])
        other = "—" if name == "every" else with_error(found["psnr_of_other_prompts"])
        lines.append((
            text, f"{one['colour_present']:.0%}", f"{one['direction_right']:.0%}", f"{one['background_drift_levels']:.1f}", close, other,
        ))  # fmt: skip
    return table(["clean passes", "colour present", "direction right", "background drift", "PSNR, dB", "to another prompt's film, dB"], lines)


def no_clean_pass() -> str:
    """The same as a sentence, where there is no room for a table."""
    found = data(NAME)["clean_pass"]
    every, none = found["every"], found["none"]
    return (
        f"On tiny-causal, {data(NAME)['films']} films of 57 frames: colours present {every['colour_present']:.0%} with clean passes and "
        f"{none['colour_present']:.0%} without, direction right {every['direction_right']:.0%} and {none['direction_right']:.0%}, background drift "
        f"{every['background_drift_levels']:.1f} and {none['background_drift_levels']:.1f} grey levels; PSNR between the two films "
        f"{with_error(found['psnr'])} dB (to a film of another prompt {with_error(found['psnr_of_other_prompts'])} dB).\n"
    )


def kv() -> str:
    """PSNR with its standard error by policy and fraction, and against chance."""
    rows = {(row["policy"], row["fraction"]): row for row in data(KV)["rows"]}
    lines = []
    for policy, text in SHOWN.items():
        for fraction, part in FRACTIONS.items():
            row = rows[policy, fraction]
            gain = "—" if not row["gain_error"] else f"{row['gain']:+.1f} ± {row['gain_error']:.1f}"
            lines.append((
                text, part, f"{row['psnr']:.1f} ± {row['psnr_error']:.1f}", gain, f"{row['ssim']:.3f}", f"{row['drift']:.1f}",
                f"{row['attention_error']:.3f}", f"{row['reappearing_error']:.2f}", f"{row['kv_peak_bytes'] / MIB:.1f}",
            ))  # fmt: skip
    whole = rows["whole history", 1.0]
    lines.append(("all of it", "whole", "—", "—", "—", f"{whole['drift']:.1f}", "0.000", f"{whole['reappearing_error']:.2f}",
                  f"{whole['kv_peak_bytes'] / MIB:.1f}"))  # fmt: skip
    head = ["policy", "history kept", "PSNR, dB", "to chance, dB", "SSIM", "drift", "attention error", "reappearing error", "KV peak, MiB"]
    return table(head, lines)


FIGURES: dict[str, Callable[[], str]] = {
    "causal-colours": colours,
    "causal-moved": moved,
    "causal-contrast": contrast,
    "causal-saturation": saturation,
    "causal-ends": ends,
    "causal-clean-pass": clean_pass,
    "causal-no-clean-pass": no_clean_pass,
    "causal-origin": lambda: origin(NAME),
    "kv-causal": kv,
    "kv-causal-origin": lambda: origin(KV),
}
