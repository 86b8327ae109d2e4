"""`python -m flowcache_core figures`: writes every measured table and chart of README and docs from the JSON files in docs/bench.

A page marks the place with a line `<!-- figure: NAME -->` and ends it with `<!-- end -->`; what stands between is replaced. With `--check`
nothing is written, and a page or chart that does not say what its JSON says is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..models.bundle import weights_id
from ..show.metrics import mean_and_error
from ..show.plot import line_plot

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/measurements.md", "web/docs/FlowCacheChunkwise.md", "web/docs/FlowCacheMotion.md")
CHART = "docs/frontier.png"
DATA = "docs/bench"
MAIN, DRAWN = "frontier", "frontier-drawn"
"""The run of `bench frontier` that the pages show, and the one of films that were drawn at random."""
PLACE = re.compile(r"(<!-- figure: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page or chart is not what its JSON says")


def main(args: argparse.Namespace) -> None:
    """Raises ValueError for a missing file, an unknown figure, or, with `--check`, for what is out of date."""
    stale = []
    for page in PAGES:
        path = ROOT / page
        if not path.exists():
            raise ValueError(f"{page} is not there: figures are written in a checkout of the repository, not in an installed package")
        before = path.read_text()
        after = PLACE.sub(lambda place: place[1] + figure(place[2]) + place[4], before)
        if after != before:
            stale.append(page)
            if not args.check:
                path.write_text(after)
    chart = ROOT / CHART
    if _source(chart) != _digest(MAIN):
        stale.append(CHART)
        if not args.check:
            _chart(chart)
    if args.check and stale:
        raise ValueError(f"{', '.join(stale)} does not say what {DATA} says: run make figures")
    print(f"{'written: ' + ', '.join(stale) if stale else 'everything says what ' + DATA + ' says'}")


def figure(name: str) -> str:
    """The lines between the marks. Raises ValueError for an unknown name."""
    if name not in FIGURES:
        raise ValueError(f"there is no figure {name!r}: there are {', '.join(FIGURES)}")
    return FIGURES[name]()


def data(name: str) -> dict[str, Any]:
    """What a bench wrote. Raises ValueError where the file is missing or of other weights than the bundled ones."""
    path = ROOT / DATA / f"{name}.json"
    if not path.exists():
        raise ValueError(f"{DATA}/{name}.json is not there: measure it first (python -m flowcache_core bench {name} --json {DATA}/{name}.json)")
    values: dict[str, Any] = json.loads(path.read_text())
    if values.get("weights") != weights_id():
        raise ValueError(
            f"{DATA}/{name}.json was measured on other weights ({values.get('weights')}) than are bundled ({weights_id()}): measure again"
        )
    return values


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def origin(name: str, command: str) -> str:
    """Where figures come from, in one line."""
    d = data(name)
    return f"`{command}`, {d['device']}, {d.get('dtype', 'bfloat16')}, commit {d['commit']}, {d['date']}.\n"


def usual(attention: str = "block-causal", name: str = MAIN) -> Rows:
    """The rows of the usual setting: that of the first row, with this attention."""
    rows: Rows = data(name)["rows"]
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
    """The best arm of fewer steps."""
    return max(row[key] for arm, row in arms.items() if arm.startswith("steps"))


def signed(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:+.1f} ± {row[key + '_se']:.1f}"


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
    said = f"The uncached film itself is {whole['psnr_converged']:.1f} dB from the converged one.\n"
    return table(head, lines) + "\n" + said


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
    return _arms(usual())


def all_arms_bidirectional() -> str:
    return _arms(usual("bidirectional"))


def _arms(rows: Rows) -> str:
    lines = []
    for arms in arms_at(rows).values():
        for arm, name in NAMES.items():
            if arm not in arms:
                continue
            row = arms[arm]
            gains = ["—", "—"] if row["gain"] is None else [signed(row, "gain"), signed(row, "gain_converged")]
            lines.append((
                f"{row['share_measured']:.1%}", name, f"{row['psnr']:.1f}", f"{row['ssim']:.3f}", gains[0], f"{row['psnr_converged']:.1f}",
                f"{row['ssim_converged']:.3f}", gains[1], f"{row['wins']} of {row['prompts']}", f"{row['wall_ratio']:.2f}x", f"{row['ideal']:.2f}",
            ))  # fmt: skip
    return table(["computed", "arm", "PSNR", "SSIM", "gain", "PSNR, converged", "SSIM, converged", "gain", "wins", "speed", "ideal"], lines)


def settings() -> str:
    """One thing changed at a time: fewer steps and ours, to the converged film."""
    first = usual()[0]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in data(MAIN)["rows"]:
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


def demo() -> str:
    d = data("demo")
    base = next(run for run in d["runs"] if run["arm"] == "uncached")
    names = {
        "upstream": "upstream-like: bidirectional, every chunk in every row",
        "uncached": "block-causal with KV cache, uncached",
        "chunkwise": "the same with Chunkwise Cache, `balanced`",
        "motion": "the same with Motion Cache, `turbo`",
    }
    lines = []
    for run in d["runs"]:
        close = ("—", "—") if run["psnr"] is None else (f"{run['psnr']:.1f} dB", f"{run['ssim']:.3f}")
        steps, share = f"{run['chunk_steps_computed']} of {run['chunk_steps']}", f"{run['tokens_computed'] / run['tokens']:.0%}"
        lines.append((names[run["arm"]], f"{run['wall_s']:.1f} s", f"{base['wall_s'] / run['wall_s']:.2f}x", steps, share, *close))
    head = ["arm", "seconds", "speed against uncached", "chunk-steps computed", "tokens computed", "PSNR to uncached", "SSIM"]
    return table(head, lines) + "\n" + origin("demo", "make demo")


COMMAND = "python -m flowcache_core bench frontier"
FIGURES: dict[str, Callable[[], str]] = {
    "frontier": frontier,
    "frontier-motion": motion,
    "frontier-bidirectional": lambda: frontier("bidirectional"),
    "frontier-arms": all_arms,
    "frontier-arms-bidirectional": all_arms_bidirectional,
    "frontier-settings": settings,
    "frontier-origin": lambda: origin(MAIN, f"{COMMAND} --workers 2"),
    "drawn": lambda: frontier(name=DRAWN),
    "drawn-origin": lambda: origin(
        DRAWN, f"{COMMAND} --grid usual --prompts-file {DATA}/drawn.tsv --arms steps,steps-fractional,default --workers 2"
    ),
    "demo": demo,
}


def _chart(path: Path) -> None:
    """Of the arms through which all films went: means over other films are no comparison."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for share, arms in arms_at(usual()).items():
        for arm, row in sorted(arms.items(), key=lambda one: one[0] != "default"):
            if row["prompts"] != arms["default"]["prompts"]:
                continue
            lines.setdefault(NAMES[arm].replace("*", ""), []).append((row["share_measured"] or share, row["psnr_converged"]))
    info = PngInfo()
    info.add_text("source", _digest(MAIN))
    line_plot(lines, "computed share of tokens", "PSNR to the converged film, dB").save(path, pnginfo=info)


def _source(chart: Path) -> str:
    """What a chart says it was drawn from; "" where there is none."""
    if not chart.exists():
        return ""
    with Image.open(chart) as picture:
        return str(picture.info.get("source", ""))


def _digest(name: str) -> str:
    return hashlib.sha256(json.dumps(data(name)["rows"], sort_keys=True).encode()).hexdigest()
