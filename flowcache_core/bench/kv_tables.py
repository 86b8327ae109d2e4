"""The tables that pages show of `bench kv`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .measured import data, origin, table

EXACT, STANDS_FOR = "kv-float32", "kv-stands-for"
"""The runs: fewer bits without rounding, and limits of what a kept token counts for."""


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
    "kv-bits": bits,
    "kv-budget": budget,
    "kv-stands-for": stands_for,
    "kv-bits-origin": lambda: origin(EXACT),
    "kv-stands-for-origin": lambda: origin(STANDS_FOR),
}
