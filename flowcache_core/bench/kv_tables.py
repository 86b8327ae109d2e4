"""The tables that pages show of `bench kv`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .measured import data, origin, table

NAME, EXACT, STANDS_FOR = "kv", "kv-float32", "kv-stands-for"
"""The runs: all policies, fewer bits without rounding, and limits of what a kept token counts for."""
FRACTIONS = {0.5: "half of the history", 0.25: "a quarter", 0.125: "an eighth"}
SHOWN = {
    "even": "`even` (default): thinned evenly, what stays counts for what went",
    "h2o": "`h2o`",
    "importance-redundancy": "`importance-redundancy` (FlowCache)",
    "salience": "`salience` (PaFu-KV)",
    "sink-recent": "`sink-recent`",
    "random": "`random`, the control",
}
"""Policies of the short table."""
MIB = 2**20


def policies() -> str:
    """The short table: PSNR and SSIM of some policies by fraction."""
    rows = {(row["policy"], row["fraction"]): row for row in data(NAME)["rows"] if row["dtype"] == "as computed"}
    lines = [(text, *(", ".join(_close(rows[policy, fraction])) for fraction in FRACTIONS)) for policy, text in SHOWN.items()]
    return table(["policy", *FRACTIONS.values()], lines)


def everything() -> str:
    lines = []
    for row in data(NAME)["rows"]:
        close = ("—", "—") if row["psnr"] is None else (f"{row['psnr']:.1f}", f"{row['ssim']:.3f}")
        gain = "—" if not row["gain_error"] else f"{row['gain']:+.1f} ± {row['gain_error']:.1f}"
        lines.append((
            row["policy"], f"{row['fraction']:g}", row["dtype"], close[0], gain, close[1], f"{row['drift']:.1f}", f"{row['attention_error']:.3f}",
            f"{row['reappearing_error']:.2f}", f"{row['kv_peak_bytes'] / MIB:.1f}",
        ))  # fmt: skip
    return table(["policy", "fraction", "stored", "PSNR, dB", "to chance, dB", "SSIM", "drift", "attention error", "reappearing error",
                  "KV peak, MiB"], lines)  # fmt: skip


def by_layer() -> str:
    """The attention error of every layer at a quarter, as computed."""
    rows = [row for row in data(NAME)["rows"] if row["fraction"] == 0.25 and row["dtype"] == "as computed"]
    layers = range(len(rows[0]["attention_error_by_layer"]))
    return table(["policy", *layers], [(row["policy"], *(f"{error:.3f}" for error in row["attention_error_by_layer"])) for row in rows])


def bits() -> str:
    """What fewer bits cost by themselves, in float32."""
    rows = {(row["fraction"], row["dtype"]): row for row in data(EXACT)["rows"] if row["policy"] == "even"}
    lines = []
    for dtype in ("int8", "fp8", "int4"):
        whole, quarter = rows[1.0, dtype], rows[0.25, dtype]
        lines.append((dtype, f"{whole['psnr']:.1f} dB", f"{whole['attention_error']:.2%}", f"{quarter['cost']:.2f} ± {quarter['cost_error']:.2f}"))
    return table(["stored", "PSNR of the whole history", "attention error", "cost on top of an even quarter, dB"], lines)


def budget() -> str:
    """What a smaller budget costs, thinned evenly, in float32."""
    rows = [row for row in data(EXACT)["rows"] if row["policy"] in ("whole history", "even") and row["dtype"] == "as computed"]
    whole = rows[0]["kv_peak_bytes"]
    lines = [
        (f"{row['fraction'] * 100:g}%", f"{row['kv_peak_bytes'] / whole:.0%}", *(("—", "—") if row["psnr"] is None else _close(row)))
        for row in sorted(rows, key=lambda row: -row["fraction"])
    ]
    return table(["history kept", "KV cache at its peak", "PSNR of the last chunks", "SSIM"], lines)


def _close(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['psnr']:.1f} dB", f"{row['ssim']:.3f}"


def stands_for() -> str:
    """How closeness at a quarter depends on the most that a kept token may count for."""
    rows = [row for row in data(STANDS_FOR)["rows"] if row["fraction"] == 0.25 and row["dtype"] == "as computed" and "soft" not in row["policy"]]
    return table(["policy", "PSNR, dB", "SSIM"], [(row["policy"], f"{row['psnr']:.1f}", f"{row['ssim']:.3f}") for row in rows])


FIGURES: dict[str, Callable[[], str]] = {
    "kv": policies,
    "kv-everything": everything,
    "kv-by-layer": by_layer,
    "kv-bits": bits,
    "kv-budget": budget,
    "kv-stands-for": stands_for,
    "kv-origin": lambda: origin(NAME),
    "kv-bits-origin": lambda: origin(EXACT),
    "kv-stands-for-origin": lambda: origin(STANDS_FOR),
}
