"""The tables that pages show of `bench frontier`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..policies.presets import PLANS
from ..show.metrics import mean_and_error
from .measured import data, origin, table

MAIN, DRAWN = "frontier", "frontier-drawn"
"""The run of `bench frontier` that the pages show, and the one of films that were drawn at random."""
PARTS = {MAIN: ("frontier-eighth", "frontier-rows", "frontier-30"), DRAWN: ("frontier-eighth-drawn",)}
"""Later runs, of which every setting and share takes the place of the same one in the first run."""
Rows = Sequence[dict[str, Any]]
NAMES = {
    "steps": "fewer steps, UniPC",
    "steps-fractional": "the same, chunks exactly as far apart",
    "steps-euler": "fewer steps, Euler",
    "even": "evenly spaced rows, our solver",
    "default": "**Chunkwise Cache** (plan)",
    "motion": "**Motion Cache** (plan by token)",
    "threshold": "threshold on the time signature",
    "published-residual": "as published for SkyReels-V2",
    "published-increment": "as published for MAGI-1",
}
SETTING = ("frames", "steps", "cfg", "shift", "ar_step", "attention")


def rows_of(name: str) -> Rows:
    """All rows of a run, in its order; those of a setting and share that were measured again from the later run."""
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for part in (name, *PARTS.get(name, ())):
        mine: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in data(part)["rows"]:
            mine.setdefault(tuple(row[key] for key in (*SETTING, "share")), []).append(row)
        places |= mine
    return [row for rows in places.values() for row in rows]


def origins(name: str, smallest: str) -> str:
    """Where rows come from, those of the smallest share by a run of its own."""
    return origin(name) + "The line of 13 %: " + origin(smallest)


def usual(attention: str = "block-causal", name: str = MAIN) -> Rows:
    """The rows of the usual setting: that of the first row, with this attention."""
    rows = rows_of(name)
    first = {**{key: rows[0][key] for key in SETTING}, "attention": attention}
    return [row for row in rows if all(row[key] == first[key] for key in SETTING)]


def arms_at(rows: Rows) -> dict[float, dict[str, dict[str, Any]]]:
    """share -> arm -> row, the largest share first."""
    out: dict[float, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["arm"] != "uncached":
            out.setdefault(row["share"], {})[row["arm"]] = row
    return dict(sorted(out.items(), reverse=True))


def rival(arms: dict[str, dict[str, Any]], key: str) -> float:
    """The best arm of fewer steps, of those through which all films of ours went."""
    return max(row[key] for arm, row in arms.items() if arm.startswith("steps") and row["prompts"] == arms["default"]["prompts"])


def signed(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:+.1f}" + (f" ± {row[key + '_se']:.1f}" if row["prompts"] > 1 else "")


def frontier(attention: str = "block-causal", name: str = MAIN) -> str:
    rows = usual(attention, name)
    whole = next(row for row in rows if row["arm"] == "uncached")
    lines = []
    for arms in arms_at(rows).values():
        ours = arms["default"]
        lines.append((
            f"{ours['share_measured']:.0%}", f"{ours['wall_ratio']:.2f}x", f"{rival(arms, 'psnr_converged'):.1f} dB",
            f"**{ours['psnr_converged']:.1f} dB**", f"{signed(ours, 'gain_converged')} dB", f"{ours['wins']} of {ours['prompts']}",
            f"{rival(arms, 'psnr'):.1f}", f"{ours['psnr']:.1f}", f"{ours['ssim']:.3f}",
        ))  # fmt: skip
    head = ["computed", "speed", "fewer steps", "Chunkwise Cache", "gain", "nearer in",
            "fewer steps, to uncached", "Chunkwise, to uncached", "SSIM"]  # fmt: skip
    line = f"The uncached film itself is {whole['psnr_converged']:.1f} dB from the converged one.\n"
    return table(head, lines) + "\n" + line


def motion() -> str:
    """Motion Cache by a plan beside the plan by chunk, where it was made for all films."""
    lines = []
    for arms in arms_at(usual()).values():
        if arms["default"]["prompts"] != arms.get("motion", {}).get("prompts"):
            continue
        chunk, token = arms["default"], arms["motion"]
        lines.append((
            f"{chunk['share_measured']:.1%}", f"{rival(arms, 'psnr_converged'):.1f} dB", f"{chunk['psnr_converged']:.1f} dB",
            f"{token['psnr_converged']:.1f} dB", f"{_paired(token, chunk)} dB", f"{chunk['wall_ratio']:.2f}x", f"{token['wall_ratio']:.2f}x",
        ))  # fmt: skip
    return table(
        ["computed", "fewer steps", "Chunkwise Cache", "Motion Cache", "Motion against Chunkwise", "speed, Chunkwise", "speed, Motion"], lines
    )


def _paired(row: dict[str, Any], other: dict[str, Any]) -> str:
    """The mean difference to the converged film, film by film, with its standard error."""
    differences = [a[1] - b[1] for a, b in zip(row["each"], other["each"], strict=True)]
    mean, error = mean_and_error(differences)
    return f"{mean:+.1f} ± {error or 0.0:.1f}"


def all_arms() -> str:
    return table_of_arms(usual())


def all_arms_bidirectional() -> str:
    return table_of_arms(usual("bidirectional"))


def table_of_arms(rows: Rows, names: Mapping[str, str] = NAMES) -> str:
    lines = []
    for arms in arms_at(rows).values():
        for arm, name in names.items():
            if arm not in arms:
                continue
            row = arms[arm]
            gains = ["—", "—"] if row["gain"] is None else [signed(row, "gain"), signed(row, "gain_converged")]
            lines.append((
                f"{row['share_measured']:.1%}", name, f"{row['psnr']:.1f}", f"{row['ssim']:.3f}", gains[0], f"{row['psnr_converged']:.1f}",
                f"{row['ssim_converged']:.3f}", gains[1], f"{row['wins']} of {row['prompts']}",
                f"{row['wall_ratio']:.2f}x", f"{row['ideal']:.2f}",
            ))  # fmt: skip
    return table(["computed", "arm", "PSNR", "SSIM", "gain", "PSNR, converged", "SSIM, converged", "gain", "wins", "speed", "ideal"], lines)


def settings() -> str:
    """One thing changed at a time: fewer steps and ours, to the converged film."""
    first = usual()[0]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows_of(MAIN):
        groups.setdefault(tuple(row[key] for key in SETTING), []).append(row)
    lines = []
    for setting, rows in groups.items():
        changed = [f"{key} {value}" for key, value in zip(SETTING, setting, strict=True) if value != first[key]]
        if len(changed) != 1 or changed[0].startswith("attention"):
            continue
        what = changed[0].replace("ar_step -1", "one chunk after the other")
        for arms in arms_at(rows).values():
            ours = arms["default"]
            lines.append((what, f"{ours['share_measured']:.0%}", f"{rival(arms, 'psnr_converged'):.1f}", f"{ours['psnr_converged']:.1f}",
                          signed(ours, "gain_converged"), signed(ours, "gain"), f"{ours['wins']} of {ours['prompts']}"))  # fmt: skip
    return table(["changed", "computed", "fewer steps", "Chunkwise Cache", "gain, to converged", "gain, to uncached", "nearer in"], lines)


def presets() -> str:
    """What each preset of Chunkwise Cache was measured to give, at the measured share that is nearest to its own."""
    arms, lines = arms_at(usual()), []
    for name, plan in PLANS.items():
        row = arms[min(arms, key=lambda share: abs(share - plan.share))]["default"]
        lines.append((f"`{name}`", f"{row['share_measured']:.0%}", f"{row['wall_ratio']:.2f}x", f"{row['psnr']:.1f} dB", f"{row['ssim']:.3f}"))
    return table(["preset", "computed", "speed", "PSNR to uncached", "SSIM"], lines)


def policies() -> str:
    """All that decides what is computed, at the share of preset balanced, and fewer steps beside it: of the films that all were made for."""
    arms = arms_at(usual())[PLANS["balanced"].share]
    films = min(row["prompts"] for row in arms.values())
    close = {arm: [mean_and_error([each[k] for each in row["each"][:films]])[0] for k in (0, 1)] for arm, row in arms.items()}
    lines = [
        (NAMES[arm], f"{uncached:.1f} dB", f"{converged:.1f} dB", f"{arms[arm]['wall_ratio']:.2f}x")
        for arm, (uncached, converged) in sorted(close.items(), key=lambda one: -one[1][1])
    ]
    return table(["what decides", "PSNR to uncached", "PSNR to converged", "speed"], lines) + f"\nMeans of {films} films.\n"


def staggers() -> str:
    """How ar_step changes what a plan of the share of preset fast costs and gives."""
    first, share, lines = usual()[0], PLANS["fast"].share, []
    alike = [key for key in SETTING if key != "ar_step"]
    for row in rows_of(MAIN):
        if row["arm"] == "default" and row["share"] == share and all(row[key] == first[key] for key in alike):
            ar_step = row["steps"] if row["ar_step"] < 0 else row["ar_step"]
            each = row["each"][0]
            lines.append((ar_step, f"{row['wall_ratio']:.2f}x", f"{each[0]:.1f} dB", f"{each[1]:.1f} dB"))
    return table(["ar_step", "speed", "PSNR to uncached", "PSNR to converged"], [(str(first), *rest) for first, *rest in sorted(lines)])


def lines() -> dict[str, list[tuple[float, float]]]:
    """Name -> (share, PSNR to the converged film), of the arms through which all films went at several shares: others are no comparison."""
    out: dict[str, list[tuple[float, float]]] = {}
    for share, arms in arms_at(usual()).items():
        for arm, row in sorted(arms.items(), key=lambda one: one[0] != "default"):
            if row["prompts"] != arms["default"]["prompts"]:
                continue
            out.setdefault(NAMES[arm].replace("*", ""), []).append((row["share_measured"] or share, row["psnr_converged"]))
    return {name: points for name, points in out.items() if len(points) > 1}


FIGURES: dict[str, Callable[[], str]] = {
    "frontier": frontier,
    "frontier-motion": motion,
    "presets": presets,
    "policies": policies,
    "staggers": staggers,
    "frontier-bidirectional": lambda: frontier("bidirectional"),
    "frontier-arms": all_arms,
    "frontier-arms-bidirectional": all_arms_bidirectional,
    "frontier-settings": settings,
    "frontier-origin": lambda: origins(MAIN, "frontier-eighth"),
    "drawn": lambda: frontier(name=DRAWN),
    "drawn-origin": lambda: origins(DRAWN, "frontier-eighth-drawn"),
    "frontier-rows-origin": lambda: "The lines of 20 and 13 %: " + origin("frontier-rows"),
    "frontier-30-origin": lambda: "The line of 30 steps: " + origin("frontier-30"),
}
