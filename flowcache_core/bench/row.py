"""`bench row`: the chunks of a row in one pass through the network, beside one after the other. `run.SMALL` says which of the two makes films.

All chunks of a window are denoised together, so that every row has all of them. Chunk by chunk each looks back on the keys and values that those
before it have left in the KV cache; in one pass they lie side by side, block-causal in every layer, each at its own noise level. Both see the same
latents, in turn, row for row. `distance`: of the velocities, as a part of their norm; it is rounding.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from ..device import device_name, fast_dtype
from ..models.adapter import Call, ModelAdapter
from ..models.attention import BlockCausal
from ..models.bundle import NAME as BUNDLED_NAME
from ..models.bundle import Bundle, load_bundle
from ..models.skyreels_adapter import SkyReelsAdapter
from ..models.skyreels_family import SKYREELS
from ..network import Attend
from ..run.generate import Job, generate
from ..show.metrics import mean_and_error
from .around import Around
from .geometries import GEOMETRIES, Sized, sized
from .measured import ROW, data, origin, table
from .model import clocked
from .prompts import PROMPTS

NAME = "row"
MODELS = (BUNDLED_NAME, *(name for name, one in GEOMETRIES.items() if one.family is SKYREELS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, default=BUNDLED_NAME, help="the bundled one, or the sizes of a released one (default %(default)s)")
    parser.add_argument("--layers", type=int, help="of a released size, where all layers would take too long (default: all of them)")
    parser.add_argument("--size", type=int, help="pixels of a square picture (default: that of the model)")
    parser.add_argument("--rows", type=int, default=8, help="that are timed, behind one that is not (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch (default %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the one that the demo uses here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Timed:
    """A row: seconds chunk by chunk and in one pass, and how far the velocities of the two are from each other."""

    apart: float
    together: float
    distance: float


class Rows(Around):
    """Notes the chunks of a row, and passes them through the network once more, all of them at once."""

    def __init__(self, inner: SkyReelsAdapter, chunks: int, rows: int) -> None:
        super().__init__(inner)
        self.chunks, self.rows = chunks, rows
        self.timed: list[Timed] = []
        self._row: list[tuple[Call, float, Tensor]] = []

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        spent, out = clocked(lambda: self.inner.forward(call, attend), call.x.device)
        if len(self.timed) < self.rows:
            self._row.append((call, spent, out[0]))
        if len(self._row) == self.chunks:
            self.timed.append(self._together())
            self._row = []
        return out

    def _together(self) -> Timed:
        calls, spent, velocities = zip(*self._row, strict=True)
        lengths = [call.chunk.frames * math.prod(self.inner.token_grid(*call.x.shape[3:])) for call in calls]
        attend = BlockCausal(tuple(accumulate(lengths)))
        took, out = clocked(lambda: cast(SkyReelsAdapter, self.inner).forward_row(calls, attend), calls[0].x.device)
        other = torch.cat(velocities, 2).float()
        return Timed(sum(spent), took, float((out.float() - other).norm() / other.norm()))


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows"}: one. Raises ValueError for what cannot work."""
    if args.rows < 1 or args.threads < 1:
        raise ValueError(f"{args.rows} rows on {args.threads} threads were asked for: use at least 1 of both")
    dtype, threads = getattr(torch, args.dtype) if args.dtype else fast_dtype(), torch.get_num_threads()
    bundle, job = asked(args, dtype)
    torch.set_num_threads(args.threads)
    try:
        timed = rows_of(bundle, job, args.rows)
    finally:
        torch.set_num_threads(threads)
    named = {"model": args.model, "layers": bundle.network.config.layers, "picture": f"{job.width or job.size} x {job.size}",
             "threads": args.threads, "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
    device = device_name(torch.device(args.device))
    return {"device": device, "model": BUNDLED_NAME, "torch": torch.__version__, "rows": [{**named, **row(bundle, job, timed)}]}


def asked(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Bundle, Job]:
    """A window of chunks, all together, one row more than is timed before and behind: the last one has clean passes too."""
    steps, changes = args.rows + 2, {"size": args.size, "width": args.size} if args.size else {}
    if args.model == BUNDLED_NAME:
        if args.layers:
            raise ValueError(f"{BUNDLED_NAME} has a fixed number of layers: leave --layers out")
        bundle = load_bundle(dtype, args.device, SKYREELS)
        return bundle, _window(bundle, replace(Job.usual(SKYREELS, PROMPTS[0], steps=steps), **changes))
    geometry = GEOMETRIES[args.model]
    if args.layers is not None and not 1 <= args.layers <= geometry.config.layers:
        raise ValueError(f"{args.layers} layers were asked for: {args.model} has {geometry.config.layers}")
    made: Sized = sized(geometry, args.layers or geometry.config.layers, dtype, args.device)
    return made, _window(made, replace(geometry.job, steps=steps, **changes))


def _window(bundle: Bundle, job: Job) -> Job:
    return replace(job, frames=bundle.family.frames.pixel(bundle.layout.chunk_frames * bundle.layout.window), ar_step=0)


def rows_of(bundle: Bundle, job: Job, rows: int) -> list[Timed]:
    made: list[Rows] = []

    def make(adapter: ModelAdapter, sigmas: object) -> ModelAdapter:
        made.append(Rows(cast(SkyReelsAdapter, adapter), bundle.layout.window, rows + 1))
        return cast(ModelAdapter, made[-1])

    generate(bundle, job, adapter=make)
    return made[0].timed[1:]


def row(bundle: Bundle, job: Job, timed: list[Timed]) -> dict[str, Any]:
    """`ratio`: of the seconds chunk by chunk to those of one pass, the mean over the rows and its standard error."""
    height, width = job.noise_shape(bundle)[3:]
    return {
        "chunks": bundle.layout.window, "tokens": bundle.layout.chunk_frames * (height // 2) * (width // 2), "timed": len(timed),
        "apart_s": round(statistics.median(one.apart for one in timed), 4), "together_s": round(statistics.median(one.together for one in timed), 4),
        "ratio": mean_and_error([one.apart / one.together for one in timed]), "distance": float(f"{max(one.distance for one in timed):.1e}"),
    }  # fmt: skip


def shown() -> str:
    """What was found on a processor."""
    lines = []
    for name in ROW:
        for one in data(name)["rows"]:
            ratio = "{:.2f} ± {:.2f}".format(*one["ratio"])
            lines.append((one["model"], one["layers"], one["dtype"], one["picture"], f"{one['chunks']} x {one['tokens']}", f"{one['apart_s']:.3f} s",
                          f"{one['together_s']:.3f} s", ratio, f"{one['distance']:.0e}"))  # fmt: skip
    head = ["sizes of", "layers", "dtype", "picture", "tokens of a row", "chunk by chunk", "in one pass", "ratio", "distance"]
    return table(head, lines) + "\n" + "\n".join(map(origin, ROW))


FIGURES: dict[str, Callable[[], str]] = {"row": shown}
