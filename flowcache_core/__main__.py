"""`python -m flowcache_core demo`, `python -m flowcache_core bench NAME` and `python -m flowcache_core render JOBS.jsonl`."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

from .bench import causal, figures, fleet, frontier, kernels, kv, long, magi, model, motion, recall, rendered, reuse, row, scale, seam, step
from .demo import run as demo
from .device import commit, device_name
from .files import refused, write_text
from .fleet import command as render
from .models.bundle import weights_id
from .ranks.group import DeviceLost
from .ranks.launch import first, world
from .show.film import write_picture
from .show.plot import line_plot

BENCHES = (frontier, magi, reuse, motion, recall, seam, kv, long, causal, model, kernels, scale, fleet, rendered, step, row)


def main() -> int:
    parser = argparse.ArgumentParser(prog="flowcache_core", description="FlowCache: faster autoregressive video, on the bundled model.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo.add_arguments(commands.add_parser("demo", help="one prompt through several arms, with films, map, table and report.json"))
    benches = commands.add_parser("bench", help="measure a sweep of settings").add_subparsers(dest="bench", required=True)
    for bench in BENCHES:
        one = benches.add_parser(bench.NAME, help=(bench.__doc__ or "").splitlines()[0])
        bench.add_arguments(one)
        one.add_argument("--json", type=Path, help="write the rows here, and a plot of share and PSNR beside it")
    figures.add_arguments(commands.add_parser("figures", help="write the tables and charts of README and docs from docs/bench"))
    render.add_arguments(commands.add_parser("render", help="many films over many workers: Ray, or running ComfyUI servers"))
    args = parser.parse_args()
    try:
        if args.command == "render":
            return render.main(args)
        if args.command == "demo":
            with world() as devices:
                demo.main(args, devices)
        elif args.command == "figures":
            figures.main(args)
        else:
            _bench(args)
    except ValueError as error:
        if first():
            print(f"flowcache: {error}", file=sys.stderr)
        return 2
    except DeviceLost as error:
        print(f"flowcache: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"flowcache: {refused(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flowcache: stopped before it was done", file=sys.stderr)
        return 130
    return 0


def _bench(args: argparse.Namespace) -> None:
    bench = next(b for b in BENCHES if args.bench == b.NAME)
    result = {
        "bench": bench.NAME, "device": device_name(), "commit": commit(),
        "date": f"{date.today()}", "weights": weights_id(), **bench.run(args),
    }  # fmt: skip
    if not first():
        return
    rows = result["rows"]
    print(_table(rows))
    if result.get("summary"):
        print(f"\nat equal computed share, between the nearest settings\n{_table(result['summary'])}")
    if args.json:
        write_text(args.json, json.dumps(result, indent=1) + "\n")
        if "share" not in rows[0]:
            return
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in (r for r in rows if r["psnr"] is not None):
            lines.setdefault(row.get("rule") or row.get("arm") or row["policy"], []).append((row["share"], row["psnr"]))
        if lines:
            write_picture(args.json.with_suffix(".png"), line_plot(lines, "computed share of tokens", "PSNR to the uncached run, dB"))


def _table(rows: list[dict[str, Any]]) -> str:
    keys = list(rows[0])
    widths = {k: max(len(k), *(len(str(r[k])) for r in rows)) for k in keys}
    return "\n".join("  ".join(str(r[k]).rjust(widths[k]) for k in keys) for r in [dict(zip(keys, keys, strict=True)), *rows])


if __name__ == "__main__":
    sys.exit(main())
