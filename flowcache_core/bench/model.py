"""`bench model`: where the seconds of a run go on a network of released size, arm by arm.

The architecture is the real one and its weights are random, so nothing is said about films here: closeness is measured by `bench frontier`, on
the bundled model. Floating-point operations are counted by formula from the shapes of every product (`torch.utils.flop_counter`), on the same
run through networks of one and of two layers, from which those of all layers follow exactly. The ceiling is the rate of one large product,
measured in the same process.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..device import device_name
from ..kv.compressor import Compressor
from ..kv.scores.even import Even
from ..models.bundle import Bundle
from ..models.family import ChunkLayout
from ..models.skyreels import SkyReelsConfig
from ..models.skyreels_family import SKYREELS
from ..policies.multirate import Multirate
from ..policies.presets import PRESETS
from ..policies.protocol import CachePolicy
from ..run.footprint import Footprint
from ..run.generate import Job, generate, generate_upstream
from ..run.report import RunReport
from ..run.run import Place, Run
from .measured import table

NAME = "model"
UPSTREAM, UNCACHED = "upstream", "uncached"
MIB, GIB = 2**20, 2**30
HALF = 2
"""Bytes of a number in 16 bits."""
LENGTHS = (5, 20, 60)
"""Seconds of the films whose memory is told."""


@dataclass(frozen=True)
class Geometry:
    """A released model, and the film that it is measured on."""

    config: SkyReelsConfig
    layout: ChunkLayout
    job: Job
    words: int = 512
    """Text tokens per branch."""

    def frames_of(self, seconds: float) -> int:
        """Pixel frames of a film of at least so many seconds in whole chunks."""
        return SKYREELS.frames.nearest(math.ceil(seconds * self.layout.fps), self.layout.chunk_frames)[1]


RELEASED = SKYREELS.layout
GEOMETRIES = {
    "skyreels-1.3b": Geometry(SkyReelsConfig(1536, 8960, 30, fps=True), RELEASED, Job("", 97, size=544, width=960)),
    "skyreels-14b": Geometry(SkyReelsConfig(5120, 13824, 40), RELEASED, Job("", 97, size=544, width=960)),
    "self-forcing": Geometry(
        SkyReelsConfig(1536, 8960, 30), ChunkLayout(3, 7, 16),
        Job("", 81, 4, size=480, width=832, cfg=1.0, shift=5.0, ar_step=4, solver="euler", fps=16),
    ),
    "smoke": Geometry(SkyReelsConfig(128, 256, 3, text_dim=64, fps=True), RELEASED, Job("", 37, 6, size=32, ar_step=1), 16),
}  # fmt: skip
"""`smoke` only shows that the bench works."""


@dataclass(frozen=True)
class Arm:
    """One way of running. `history`: the share of the window that the KV cache may keep; None keeps all."""

    policy: CachePolicy | None = None
    history: float | None = None
    upstream: bool = False

    def run(self, bundle: Bundle, job: Job) -> RunReport:
        if self.upstream:
            return generate_upstream(bundle, job)[1]
        return generate(bundle, job, self.policy, compressor=self.compressor(bundle.layout))[1]

    def compressor(self, layout: ChunkLayout) -> Compressor | None:
        return None if self.history is None else Compressor(Even(), self.history * layout.window)


ARMS: dict[str, Arm] = {
    UPSTREAM: Arm(upstream=True),
    UNCACHED: Arm(),
    **{name: Arm(policy) for name, policy in PRESETS.items() if not name.endswith("-exact")},
    "motion": Arm(Multirate()),
    "kv-quarter": Arm(history=0.25),
    "balanced, kv-quarter": Arm(PRESETS["balanced"], 0.25),
}


@dataclass(frozen=True)
class Sized(Bundle):
    """A network of random weights; every text is as long as a released model pads it."""

    words: int = 512

    def text(self, prompt: str) -> Tensor:
        """-> random [1, words, text_dim] in the network's dtype and place."""
        drawn = torch.randn(1, self.words, self.network.config.text_dim, generator=torch.Generator().manual_seed(len(prompt)))
        return drawn.to(self.like)


def sized(geometry: Geometry, layers: int, dtype: torch.dtype, device: torch.device | str) -> Sized:
    """A bundle without a VAE."""
    network = SKYREELS.network(replace(geometry.config, layers=layers), device="meta", dtype=dtype).to_empty(device=device)
    randomise(network)
    return Sized(SKYREELS, network.requires_grad_(False), None, geometry.layout, geometry.words)


def randomise(network: nn.Module) -> None:
    """Weights that keep the size of what passes: normal by fan-in, and one for the scales of norms."""
    like = next(network.parameters())
    rng = torch.Generator(like.device).manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.ndim == 1 and name.endswith("weight"):
            nn.init.ones_(weight)
        else:
            nn.init.normal_(weight, std=0.02 if weight.ndim == 1 else weight[0].numel() ** -0.5, generator=rng)


def operations(geometry: Geometry, arm: Arm, dtype: torch.dtype, device: torch.device | str) -> float:
    """Floating-point operations of the arm's run: all layers cost the same, so two short networks tell those of any."""
    one, two = (_counted(sized(geometry, layers, dtype, device), geometry.job, arm) for layers in (1, 2))
    return one + (geometry.config.layers - 1) * (two - one)


def _counted(bundle: Bundle, job: Job, arm: Arm) -> float:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}) as counter:
        arm.run(bundle, job)
    return float(counter.get_total_flops())


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def ceiling(dtype: torch.dtype, device: torch.device, side: int, repeats: int = 20) -> float:
    """Operations per second of one square product of random matrices, the best of `repeats`."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(_seconds(lambda: a @ b, device) for _ in range(repeats))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def held(geometry: Geometry, frames: int, arm: Arm, ar_step: int) -> Footprint:
    """What a film of so many frames holds in 16 bits, by the arithmetic that every run announces. Made on the meta device: no memory is needed."""
    bundle = Sized(SKYREELS, SKYREELS.network(geometry.config, device="meta", dtype=torch.bfloat16), None, geometry.layout, geometry.words)
    job = replace(geometry.job, frames=frames, ar_step=ar_step)
    noise, branches = job.noise_shape(bundle), len(SKYREELS.guidance.branches(job.cfg))
    weights = sum(weight.numel() for weight in bundle.network.parameters()) * HALF
    place = Place(1, branches, branches * geometry.words, weights, HALF)
    compressor = arm.compressor(geometry.layout)
    return Run(SKYREELS, bundle.adapter(), job.schedule(bundle), job.sigmas(bundle), (noise[1], *noise[3:]), place, arm.policy, compressor).held


def memory() -> str:
    """Weights, KV cache and everything held, in GiB: chunks as closely behind each other as the window allows, and one by one."""
    lines = []
    for name, geometry in GEOMETRIES.items():
        steps, window = geometry.job.steps, geometry.layout.window
        ways = {max(geometry.job.ar_step, steps // window): f"up to {window} at once", steps: "one after the other"}
        for ar_step, seconds in product(ways, LENGTHS):
            if name == "smoke":
                continue
            whole, quarter = (held(geometry, geometry.frames_of(seconds), ARMS[arm], ar_step) for arm in (UNCACHED, "kv-quarter"))
            values = (whole.weights, whole.kv, quarter.kv, whole.weights + whole.held, quarter.weights + quarter.held)
            size = f"{geometry.job.width} x {geometry.job.size}"
            lines.append((name, size, f"{seconds} s", ways[ar_step], *(f"{value / GIB:.1f}" for value in values)))
    return table(
        ["model", "picture", "film", "chunks", "weights", "KV cache", "KV cache, a quarter", "all that is held", "the same, a quarter"], lines
    )


FIGURES: dict[str, Callable[[], str]] = {"gpu-memory": memory}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="smoke", help="whose sizes the network has (default %(default)s)")
    parser.add_argument("--arms", default="", help=f"which ways to run it, separated by semicolons, of {'; '.join(ARMS)} (default: all)")
    parser.add_argument("--frames", type=int, help="pixel frames (default: 97, of self-forcing 81)")
    parser.add_argument("--steps", type=int, help="steps per chunk (default: 50, of self-forcing 4)")
    parser.add_argument("--layers", type=int, help="a shorter network, where all layers would take too long (default: all of them)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="also list the N operators that take most of a short uncached run")


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows"}: per arm seconds, operations and their rate, peaks of memory, host waits; see `measure`. Raises ValueError for what cannot work."""
    geometry = asked(args)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    wanted = [part.strip() for part in args.arms.split(";") if part.strip()] or list(ARMS)
    if unknown := [name for name in wanted if name not in ARMS]:
        raise ValueError(f"there is no arm {'; '.join(unknown)}: choose from {'; '.join(ARMS)}")
    most = ceiling(dtype, device, 8192 if device.type == "cuda" else 1024)
    bundle = sized(geometry, geometry.config.layers, dtype, device)
    short = replace(geometry.job, steps=2, ar_step=1)
    Arm().run(bundle, short)
    rows = [measure(name, bundle, geometry, dtype, device, most) for name in wanted]
    compare(rows)
    profile = profiled(bundle, short, args.profile) if args.profile else []
    return {
        "geometry": args.geometry, "config": asdict(geometry.config), "job": asdict(geometry.job), "dtype": args.dtype, "device": device_name(),
        "torch": torch.__version__, "ceiling_tflops": round(most / 1e12, 3), "rows": rows, "profile": profile,
    }  # fmt: skip


def asked(args: argparse.Namespace) -> Geometry:
    """The geometry with what the command line changes. Raises ValueError, before anything is made."""
    geometry = GEOMETRIES[args.geometry]
    changes = {key: value for key in ("frames", "steps") if (value := getattr(args, key)) is not None}
    if args.layers is not None and not 1 <= args.layers <= geometry.config.layers:
        raise ValueError(f"{args.layers} layers were asked for: {args.geometry} has {geometry.config.layers}")
    config = replace(geometry.config, layers=args.layers or geometry.config.layers)
    geometry = replace(geometry, config=config, job=replace(geometry.job, **changes))
    geometry.job.schedule(Sized(SKYREELS, None, None, geometry.layout))
    return geometry


def measure(name: str, bundle: Bundle, geometry: Geometry, dtype: torch.dtype, device: torch.device, most: float) -> dict[str, Any]:
    """`network_s`: of the evaluations, by the device's clock; `of_ceiling`: their rate over that of one large product."""
    with peak_of(device) as peak:
        report = ARMS[name].run(bundle, geometry.job)
    network, counted = report.clock.seconds["network"], operations(geometry, ARMS[name], dtype, device)
    return {
        "arm": name, "share_of_tokens": round(report.share, 4), "wall_s": round(report.wall_s, 3), "network_s": round(network, 3),
        "tflop": float(f"{counted / 1e12:.5g}"), "tflops": round(counted / network / 1e12, 3), "of_ceiling": round(counted / network / most, 3),
        "kv_mib": round(report.kv_peak_bytes / MIB, 1), "peak_mib": round(peak[0] / MIB, 1) if peak else None, "host_waits": report.host_syncs,
    }  # fmt: skip


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds, where the uncached arm ran: how many times faster, and how many times its operations say (`predicted`)."""
    base = next((row for row in rows if row["arm"] == UNCACHED), None)
    for row in rows if base else []:
        assert base
        row["speed"] = round(base["network_s"] / row["network_s"], 3)
        row["predicted"] = round(base["tflop"] / row["tflop"], 3)


@contextmanager
def peak_of(device: torch.device) -> Iterator[list[int]]:
    """A list that is given the bytes allocated at the peak of the block; it stays empty where the device does not count."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found.append(torch.cuda.max_memory_allocated(device))


def profiled(bundle: Bundle, job: Job, count: int) -> list[dict[str, Any]]:
    """The operators that take most of an uncached run's time on the device, with their part of it."""
    from torch.profiler import ProfilerActivity, profile

    cuda = bundle.like.is_cuda
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as trace:
        Arm().run(bundle, job)
    times = {event.key: event.self_device_time_total if cuda else event.self_cpu_time_total for event in trace.key_averages()}
    total = sum(times.values())
    first = sorted(times.items(), key=lambda one: -one[1])[:count]
    return [{"operator": name, "ms": round(us / 1000, 3), "part": round(us / total, 4)} for name, us in first]
