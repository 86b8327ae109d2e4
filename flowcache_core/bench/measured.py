"""What benches wrote into docs/bench, and how a page shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..models.bundle import BUNDLED, NAME, weights_id
from ..models.skyreels_family import SKYREELS
from ..untrusted import json_file

ROOT = Path(__file__).parents[2]
DATA = "docs/bench"
BENCH = "python -m flowcache_core bench"
COMMANDS = {
    "demo": "make demo",
    "recall": f"{BENCH} recall --clips 6",
    "seam": f"{BENCH} seam --prompts 2",
    "kv": f"{BENCH} kv --prompts 12 --workers 2",
    "kv-float32": f"{BENCH} kv --precision float32 --policies even --prompts 6 --clips 1",
    "kv-stands-for": f'{BENCH} kv --policies "even,even stands_for=1,even stands_for=2,even stands_for=8,random" --prompts 6 --clips 1',
    "frontier": f"{BENCH} frontier --workers 2",
    "frontier-drawn": f"{BENCH} frontier --grid usual --prompts-file {DATA}/drawn.tsv --arms steps,steps-fractional,default --workers 2",
}
"""What makes the files that pages show of the first bundled model, all of one commit; `make measure` runs them all."""
ANEW = {
    "frontier-eighth": f"{BENCH} frontier --grid usual --shares 0.12 --workers 2",
    "frontier-rows": f"{BENCH} frontier --grid usual --attention bidirectional --prompts 4 --shares 0.2,0.12 --workers 2",
    "frontier-eighth-drawn": f"{BENCH} frontier --grid usual --prompts-file {DATA}/drawn.tsv --shares 0.12 "
    "--arms steps,steps-fractional,even,default --workers 2",
    "frontier-30": f"{BENCH} frontier --grid usual --steps 30 --prompts 1 --shares 0.3 --arms steps,steps-fractional,default --workers 2",
}
"""Of what the frontier has shown, all that changed with the plans, measured again: these rows take the place of the earlier ones."""
SOME = "even,h2o,importance-redundancy,salience,sink-recent,random"
SCALE = {f"scale-{devices}": f"torchrun --nproc-per-node {devices} -m flowcache_core bench scale" for devices in (2, 4)}
STEP = {
    "step": f"{BENCH} step --steps 4",
    "step-2": f"{BENCH} step --steps 4 --threads 2",
    "step-magi": f"{BENCH} step --steps 4 --model tiny-magi --frames 96",
}
ROW = {"row": f"{BENCH} row", "row-wide": f"{BENCH} row --model skyreels-1.3b --layers 1 --size 256 --rows 3"}
OTHERS = {
    "magi": f"{BENCH} magi --workers 2",
    "causal": f"{BENCH} causal --prompts 16 --workers 2",
    "kv-causal": f'{BENCH} kv --model tiny-causal --policies "{SOME}" --as-computed --clips 16 --prompts 16 --workers 2',
    "long": f"{BENCH} long --prompts 16 --share 0.4 --workers 2",
    "long-random": f"{BENCH} long --arms random --prompts 16 --share 0.4 --workers 2",
    "long-sink": f'{BENCH} long --arms "shorter window; even, no sink" --prompts 16 --share 0.4 --workers 2',
    "rendered": f"{BENCH} rendered --frames 57",
    **ANEW,
    **SCALE,
    **STEP,
    **ROW,
}
"""The same of other models, of several devices and of the processor alone, each at a commit of its own."""


def data(name: str) -> dict[str, Any]:
    """What a bench wrote. Raises ValueError where the file is missing or of other weights than the bundled ones."""
    path = ROOT / DATA / f"{name}.json"
    if not path.exists():
        raise ValueError(f"{DATA}/{name}.json is not there: make measure makes it")
    try:
        values: dict[str, Any] = json_file(path)
    except ValueError as why:
        raise ValueError(f"{DATA}/{name}.json cannot be read: {why}; make measure makes it") from None
    if not isinstance(values, dict):
        raise ValueError(f"{DATA}/{name}.json is not what a bench writes: make measure makes it")
    bundled = weights_id(BUNDLED.get(values.get("model", NAME), SKYREELS))
    if values.get("weights") != bundled:
        raise ValueError(f"{DATA}/{name}.json was measured on other weights ({values.get('weights')}) than are bundled ({bundled}): measure again")
    return values


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def origin(name: str) -> str:
    """Where figures come from, in one line."""
    d = data(name)
    dtype = f", {d['dtype']}" if "dtype" in d else ""
    return f"`{(COMMANDS | OTHERS)[name]}`, {d['device']}{dtype}, commit {d['commit']}, {d['date']}.\n"
