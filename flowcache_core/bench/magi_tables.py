"""The tables that pages show of `bench magi`."""

from __future__ import annotations

from collections.abc import Callable

from .frontier_tables import table_of_arms, usual
from .magi import NAME
from .measured import data, origin, table

AT_SHARES = {
    "steps": "fewer steps, UniPC",
    "steps-euler": "fewer steps, Euler",
    "steps-multistep": "fewer steps, our solver",
    "default": "**Chunkwise Cache** (plan), Euler",
    "default-unipc": "**Chunkwise Cache** (plan), UniPC",
    "motion": "**Motion Cache** (plan by token), Euler",
    "published-increment": "as published by FlowCache",
}
ALONE = {
    "no-ranges": "all of history in reach",
    "no-clean-pass": "no clean pass",
    "flowcache-magi-slow": "FlowCache as published, slow",
    "flowcache-magi-fast": "FlowCache as published, fast",
    "motion-published": "MotionCache as published",
    "kv-5": "KV Compressor, 5 chunks in all",
    "kv-6": "KV Compressor, 6 chunks in all",
    "default-kv-6": "Chunkwise Cache (plan) and KV Compressor, 6 chunks",
}


def at_shares() -> str:
    """Every arm at every share, and how near the stock film is to the converged one."""
    rows = usual(name=NAME)
    whole = next(row for row in rows if row["arm"] == "uncached")
    return table_of_arms(rows, AT_SHARES) + f"\nThe stock film itself is {whole['psnr_converged']:.1f} dB from the converged one.\n"


def alone() -> str:
    lines = []
    for row in data(NAME)["rows"]:
        if row["arm"] in ALONE:
            close = (f"{row[key]:.{digits}f}" for key, digits in (("psnr", 1), ("ssim", 3), ("psnr_converged", 1), ("ssim_converged", 3)))
            lines.append((f"{row['share_measured']:.0%}", ALONE[row["arm"]], *close))
    return table(["computed", "arm", "PSNR to stock", "SSIM", "PSNR, converged", "SSIM, converged"], lines)


FIGURES: dict[str, Callable[[], str]] = {"magi": at_shares, "magi-alone": alone, "magi-origin": lambda: origin(NAME)}
