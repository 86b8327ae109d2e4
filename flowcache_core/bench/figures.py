"""`python -m flowcache_core figures`: writes every measured table and chart of README and docs from the JSON files in docs/bench.

A page marks the place with a line `<!-- figure: NAME -->` and ends it with `<!-- end -->`; what stands between is replaced. With `--check`
nothing is written, and a page or chart that does not say what its JSON says is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..files import write_text
from ..show.film import write_picture
from ..show.plot import line_plot
from . import (
    cards,
    causal_tables,
    chunks,
    fleet_tables,
    frontier_tables,
    kv_tables,
    long_tables,
    magi_tables,
    recall,
    rendered,
    row,
    scale,
    seam,
    step,
)
from .measured import COMMANDS, DATA, ROOT, data, origin, table

HELP = ("Chunkwise", "Compare", "ConditionFrames", "KVCompressor", "LoadModel", "Motion", "Overlay", "Policy", "Report", "Sampler")
"""Nodes of which something is measured."""
DOCS = ("measurements", "magi", "causal", "gpu", "scale")
PAGES = ("README.md", *(f"docs/{page}.md" for page in DOCS), *(f"web/docs/FlowCache{node}.md" for node in HELP))
CHART = "docs/frontier.png"
PLACE = re.compile(r"(<!-- figure: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


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
                write_text(path, after)
    chart = ROOT / CHART
    if _source(chart) != _digest():
        stale.append(CHART)
        if not args.check:
            _chart(chart)
    commits = {name: data(name)["commit"] for name in COMMANDS}
    if len(set(commits.values())) > 1:
        listed = ", ".join(f"{name} {commit}" for name, commit in commits.items())
        raise ValueError(f"files in {DATA} that have to be of one commit are of several ({listed}): make measure makes them all of one")
    if args.check and stale:
        raise ValueError(f"{', '.join(stale)} does not say what {DATA} says: run make figures")
    print(f"{'written: ' + ', '.join(stale) if stale else 'everything says what ' + DATA + ' says'}")


def figure(name: str) -> str:
    """The lines between the marks. Raises ValueError for an unknown name."""
    if name not in FIGURES:
        raise ValueError(f"there is no figure {name!r}: there are {', '.join(FIGURES)}")
    return FIGURES[name]()


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
    return table(head, lines) + "\n" + origin("demo")


FIGURES: dict[str, Callable[[], str]] = {
    **frontier_tables.FIGURES, **magi_tables.FIGURES, **kv_tables.FIGURES, **causal_tables.FIGURES, **long_tables.FIGURES, **recall.FIGURES,
    **seam.FIGURES, **cards.FIGURES, **scale.FIGURES, **step.FIGURES, **row.FIGURES, **chunks.FIGURES, **fleet_tables.FIGURES, **rendered.FIGURES,
    "demo": demo,
}  # fmt: skip


def _chart(path: Path) -> None:
    info = PngInfo()
    info.add_text("source", _digest())
    write_picture(path, line_plot(frontier_tables.lines(), "computed share of tokens", "PSNR to the converged film, dB"), pnginfo=info)


def _source(chart: Path) -> str:
    """What a chart says it was drawn from; "" where there is none."""
    if not chart.exists():
        return ""
    with Image.open(chart) as picture:
        return str(picture.info.get("source", ""))


def _digest() -> str:
    """Of the chart's points."""
    return hashlib.sha256(json.dumps(frontier_tables.lines(), sort_keys=True).encode()).hexdigest()
