"""`bench model`: where the seconds of a run go on a network of released size, arm by arm.

The architecture is the real one and its weights are random, so nothing is said about films here: closeness is measured on the bundled models, by
`bench frontier` and `bench magi`. Floating-point operations are counted by formula from the shapes of every product (`torch.utils.flop_counter`), on
the same run through networks of one and of two layers, from which those of all layers follow exactly. The ceiling is the rate of one large product,
measured in the same process.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..device import device_name
from ..kv.compressor import Compressor
from ..kv.policy import Stored
from ..kv.scores.even import Even
from ..models.adapter import Call, ModelAdapter
from ..models.bundle import Bundle
from ..models.family import ChunkLayout, Family
from ..models.magi_family import MAGI_DISTILLED
from ..models.skyreels_family import SKYREELS
from ..network import Attend
from ..policies.multirate import Multirate
from ..policies.presets import MAGI_RULES, PLANS, RULES
from ..policies.protocol import CachePolicy, PartPolicy
from ..run.generate import Job, MakeAdapter, generate, generate_upstream
from ..run.report import RunReport
from .around import Around
from .geometries import GEOMETRIES, Geometry, Sized, sized
from .sampled import Count, Sampling, nothing

NAME = "model"
UPSTREAM, UNCACHED = "upstream", "uncached"
MIB = 2**20
FIDELITY = "none: the weights are random; closeness is measured on the bundled models, by bench frontier and bench magi"
NEVER = 2**30
"""Rows apart of which only those remain that are run in any case."""


T = TypeVar("T")


@dataclass(frozen=True)
class Arm:
    """One way of running. `history`: the share of the window that the KV cache may keep, None all; `stored`: in how many bits."""

    policy: CachePolicy | None = None
    history: float | None = None
    upstream: bool = False
    stored: Stored = "as computed"

    def run(self, bundle: Bundle, job: Job, adapter: MakeAdapter = lambda adapter, sigmas: adapter) -> RunReport:
        if self.upstream:
            return generate_upstream(bundle, job, adapter=adapter)[1]
        return generate(bundle, job, self.policy, adapter=adapter, compressor=self.compressor(bundle.layout))[1]

    def compressor(self, layout: ChunkLayout) -> Compressor | None:
        return None if self.history is None else Compressor(Even(), self.history * layout.window, dtype=self.stored)

    def apart(self, every: int) -> int:
        """How many rows apart are run where `every` are asked for: all where tokens wait for those that are computed meanwhile."""
        return 1 if isinstance(self.policy, PartPolicy) else every

    def sampling(self, bundle: Bundle, job: Job, every: int, count: Count = nothing) -> Sampling:
        held = self.policy is not None and self.policy.keeps == "residual"
        return Sampling(job.schedule(bundle), every, held, len(bundle.family.guidance.branches(job.cfg)), count)


def _of(policies: Mapping[str, CachePolicy]) -> dict[str, Arm]:
    return {name: Arm(policy) for name, policy in policies.items() if not name.endswith("-exact")}


BOUNDED = {"kv-quarter": Arm(history=0.25), "balanced, kv-quarter": Arm(PLANS["balanced"], 0.25)}
PLANNED = {**_of(PLANS), "motion": Arm(Multirate()), **BOUNDED}
FEW_STEPS = {UNCACHED: Arm(), "kv-quarter": BOUNDED["kv-quarter"], "kv-quarter, int8": Arm(history=0.25, stored="int8")}
"""Of models that leave no step out."""
ARMS = {
    SKYREELS.name: {UPSTREAM: Arm(upstream=True), UNCACHED: Arm(), **_of(RULES), **PLANNED},
    MAGI_DISTILLED.name: {UNCACHED: Arm(), **_of(MAGI_RULES), **PLANNED},
}
"""By family. `upstream` is SkyReels-V2 as published, bidirectional, with every chunk in every row; the others are published chunk by chunk, which
is what `uncached` does."""


def arms_of(family: Family) -> dict[str, Arm]:
    return ARMS.get(family.name, FEW_STEPS)


def operations(geometry: Geometry, arm: Arm, dtype: torch.dtype, device: torch.device | str, every: int = 1) -> tuple[float, float]:
    """Floating-point operations of the rows that are run, and of all: all layers cost the same, so two short networks are enough for any."""
    one, two = (_counted(sized(geometry, layers, dtype, device), geometry.job, arm, every) for layers in (1, 2))
    ran, whole = (a + (geometry.config.layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    return ran, whole


def _counted(bundle: Bundle, job: Job, arm: Arm, every: int = 1) -> tuple[float, float]:
    with counter() as counted:
        sampling = arm.sampling(bundle, job, every, lambda: float(counted.get_total_flops()))
        arm.run(bundle, job, sampling)
    ran = float(counted.get_total_flops())
    return ran, ran + sampling.left_out


def counter() -> FlopCounterMode:
    """Counts the floating-point operations of products, those of PyTorch's own kernels for the processor too."""
    own = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention, torch.ops.mkldnn._linear_pointwise: _linear}
    return FlopCounterMode(display=False, custom_mapping=own)


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(x) * weight[0])


def ceiling(dtype: torch.dtype, device: torch.device, side: int, repeats: int = 20) -> float:
    """Operations per second of one square product of random matrices, the best of `repeats`."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(clocked(lambda: a @ b, device)[0] for _ in range(repeats))


def clocked(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds until the device is through, and what came."""
    _wait(device)
    began = time.perf_counter()
    out = call()
    _wait(device)
    return time.perf_counter() - began, out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="smoke", help="whose sizes the network has (default %(default)s)")
    parser.add_argument("--arms", default="", help=f"which ways to run it, separated by semicolons (default: all): {_listed()}")
    parser.add_argument("--frames", type=int, help=f"pixel frames (default: {_defaults('frames')})")
    parser.add_argument("--steps", type=int, help=f"steps per chunk (default: {_defaults('steps')})")
    parser.add_argument("--layers", type=int, help="a shorter network, where all layers would take too long (default: all of them)")
    every = ", ".join(f"{name} {one.every}" for name, one in GEOMETRIES.items() if one.every > 1)
    parser.add_argument("--every", type=int, help=f"run every n-th row of the schedule, and count the others (default: {every}; 1 of the others)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="also list the N operators that take most of one evaluation of a chunk")


def _listed() -> str:
    few = {"few-step causal models": FEW_STEPS}
    return ". ".join(f"{name}: {'; '.join(arms)}" for name, arms in (ARMS | few).items())


def _defaults(setting: str) -> str:
    return ", ".join(f"{name} {getattr(one.job, setting)}" for name, one in GEOMETRIES.items() if not one.smoke)


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows"}: per arm seconds, operations and their rate, peaks of memory, host waits; see `measure`. Raises ValueError for what cannot work."""
    geometry = asked(args)
    device, dtype, arms = torch.device(args.device), getattr(torch, args.dtype), arms_of(geometry.family)
    wanted = [part.strip() for part in args.arms.split(";") if part.strip()] or list(arms)
    if unknown := [name for name in wanted if name not in arms]:
        raise ValueError(f"{args.geometry} has no arm {'; '.join(unknown)}: choose from {'; '.join(arms)}")
    most = ceiling(dtype, device, 8192 if device.type == "cuda" else 1024)
    bundle = sized(geometry, geometry.config.layers, dtype, device)
    Arm().run(bundle, geometry.job, Arm().sampling(bundle, geometry.job, NEVER))
    rows = [measure(name, bundle, geometry, dtype, device, most) for name in wanted]
    compare(rows)
    return {
        "geometry": args.geometry, "family": geometry.family.name, "config": asdict(geometry.config), "job": asdict(geometry.job),
        "dtype": args.dtype, "device": device_name(device), "torch": torch.__version__, "ceiling_tflops": round(most / 1e12, 3),
        "fidelity": FIDELITY, "rows_run": rows_run(geometry.every), "rows": rows,
        "profile": profiled(bundle, geometry.job, args.profile) if args.profile else [],
    }  # fmt: skip


def rows_run(every: int) -> str:
    if every == 1:
        return "all rows of the schedule were run"
    return (
        f"of {every} rows of the schedule one was run, with the first step and the clean pass of every chunk (column every: 1 where all were); "
        "seconds are those of all rows, at the rate of operations of those that were run"
    )


def asked(args: argparse.Namespace) -> Geometry:
    """The geometry with what the command line changes. Raises ValueError, before anything is made."""
    geometry = GEOMETRIES[args.geometry]
    changes = {key: value for key in ("frames", "steps") if (value := getattr(args, key)) is not None}
    if args.layers is not None and not 1 <= args.layers <= geometry.config.layers:
        raise ValueError(f"{args.layers} layers were asked for: {args.geometry} has {geometry.config.layers}")
    if args.every is not None and args.every < 1:
        raise ValueError(f"every {args.every} rows were asked for: 1 runs all of them")
    if args.steps is not None:
        changes["ar_step"] = geometry.family.published.stagger(args.steps)
    job = replace(geometry.job, **changes)
    geometry = replace(geometry.shortened(args.layers or geometry.config.layers), job=job, every=args.every or geometry.every)
    bundle = Sized.of(geometry)
    geometry.family.check(job.schedule(bundle))
    geometry.family.check_levels(job.sigmas(bundle))
    return geometry


def measure(name: str, bundle: Bundle, geometry: Geometry, dtype: torch.dtype, device: torch.device, most: float) -> dict[str, Any]:
    """`every`: how many rows apart were run; `network_s`: of the evaluations, by the device's clock, for all rows at the rate of those that were run;
    `wall_s`: None where not all were; `of_ceiling`: their rate over that of one large product."""
    arm, job = arms_of(geometry.family)[name], geometry.job
    every = arm.apart(geometry.every)
    with peak_of(device) as peak:
        report = arm.run(bundle, job, arm.sampling(bundle, job, every)) if every > 1 else arm.run(bundle, job)
    network, (ran, whole) = report.clock.seconds["network"], operations(geometry, arm, dtype, device, every)
    return {
        "arm": name, "every": every, "share_of_tokens": round(report.share, 4), "wall_s": round(report.wall_s, 3) if every == 1 else None,
        "network_s": round(network * whole / ran, 3), "tflop": float(f"{whole / 1e12:.5g}"), "tflops": round(ran / network / 1e12, 3),
        "of_ceiling": round(ran / network / most, 3), "kv_mib": round(report.kv_peak_bytes / MIB, 1),
        "peak_mib": round(peak[0] / MIB, 1) if peak else None, "host_waits": report.host_syncs,
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


class Traced(Around):
    """Profiles one evaluation: the first step of the last chunk, which looks back on as much as any. `times`: microseconds and calls by operator."""

    def __init__(self, inner: ModelAdapter, chunks: int, cuda: bool) -> None:
        super().__init__(inner)
        self.chunks, self.cuda = chunks, cuda
        self.times: dict[str, tuple[float, int]] = {}

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        if self.times or (call.chunk.index, call.chunk.step) != (self.chunks - 1, 0):
            return self.inner.forward(call, attend)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]) as trace:
            out = self.inner.forward(call, attend)
        self.times = times_of(trace.key_averages(), self.cuda)
        return out


def times_of(events: Iterable[Any], cuda: bool) -> dict[str, tuple[float, int]]:
    """By operator its own microseconds, on the device or on the processor, and calls. Kernels of the device, which stand in the list too, are left
    out: their time is that of the operators that launch them."""
    operators = [one for one in events if one.device_type.name == "CPU"]
    return {one.key: (one.self_device_time_total if cuda else one.self_cpu_time_total, one.count) for one in operators}


def profiled(bundle: Bundle, job: Job, count: int) -> list[dict[str, Any]]:
    """The operators that take most of one evaluation's time on the device, with their part of it (`Traced`)."""
    made: list[Traced] = []
    sampling = Arm().sampling(bundle, job, NEVER)

    def adapter(inner: ModelAdapter, sigmas: Any) -> ModelAdapter:
        made.append(Traced(inner, sampling.schedule.chunks, bundle.like.is_cuda))
        return sampling(cast(ModelAdapter, made[-1]), sigmas)

    Arm().run(bundle, job, adapter)
    times = made[0].times
    total = sum(us for us, _ in times.values())
    first = sorted(times.items(), key=lambda one: -one[1][0])[:count]
    return [{"operator": name, "calls": calls, "ms": round(us / 1000, 3), "part": round(us / total, 4)} for name, (us, calls) in first]
