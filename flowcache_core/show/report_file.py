"""The report of a run as a file: json, csv with a line per chunk and step, or png, the chunk x step map."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from ..files import write_text
from ..run.report import COMPUTED, NOT_RUN, REFRESHED, REUSED, RunReport
from .film import write_picture
from .plot import chunk_map

KINDS = ("json", "csv", "png")
COLUMNS = ("chunk", "step", "row", "sigma", "decision", "share", "seconds")
DECISIONS = {NOT_RUN: "not run", REUSED: "reused", COMPUTED: "computed", REFRESHED: "in part"}


def write_report(path: Path, report: RunReport, **more: Any) -> None:
    """Whole or not at all; what is written the ending of the name says, one of `KINDS`. `more`: for json. Raises ValueError for another ending."""
    match path.suffix:
        case ".json":
            write_text(path, json.dumps({**report.as_dict(), **more}, indent=1) + "\n")
        case ".csv":
            write_text(path, as_csv(report))
        case ".png":
            write_picture(path, chunk_map(report))
        case other:
            raise ValueError(f"a report cannot be written as {path.name}: instead of {other or 'no ending'} use one of {', '.join(KINDS)}")


def as_csv(report: RunReport) -> str:
    """A head, and a line per chunk and step, in their order, both counted from 1.

    `row` of the sampling loop, from 1; `sigma`: the noise level before the step; `share` of the chunk's tokens that ran; `seconds` of the
    network, clean passes of finished chunks left out. Where chunks are evaluated together, bidirectionally, they share a row's seconds equally.
    """
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(COLUMNS)
    chunks, steps = report.map.shape
    for k in range(chunks):
        for j in range(steps):
            place = int(report.row_of[k, j]), f"{report.sigmas[j]:.6g}", _decision(report, k, j)
            lines.writerow((k + 1, j + 1, *place, f"{report.shares[k, j]:.4g}", f"{report.clock.steps[k, j]:.6g}"))
    return out.getvalue()


def _decision(report: RunReport, chunk: int, step: int) -> str:
    what = int(report.map[chunk, step])
    return "skipped" if what == REUSED and report.plans else DECISIONS[what]
