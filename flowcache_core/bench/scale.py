"""`bench scale`: one film on one device and on all that torchrun has started, in every way that they can share it.

`torchrun --nproc-per-node N -m flowcache_core bench scale`. The network has random weights: nothing is said about films. The film of one device is
timed while the others wait, in turn with those of all of them; what was expected follows from products and messages that are timed before.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from ..device import device_name
from ..models.bundle import Bundle
from ..models.skyreels import HEAD_DIM, SkyReelsConfig
from ..models.skyreels_family import SKYREELS
from ..ranks.cost import Machine, Mesh, Work, fastest, mean, meshes, ratio, seconds, sent_bytes
from ..ranks.group import Traffic, shares
from ..ranks.launch import add_arguments as add_ranks
from ..ranks.launch import sharded, world
from ..ranks.world import ONE, World, network_of, steps_of, timed_machine
from ..run.generate import Job, generate
from ..run.report import RunReport
from .cards import GIB, HALF
from .geometries import GEOMETRIES, Geometry, Sized, sized
from .measured import SCALE, data, origin, table
from .model import MIB

NAME = "scale"
CARDS = (1, 2, 4, 8)
REPEATS = 3
TIMED, PAUSE = 4, 0.5
"""How often the machine is timed again, and seconds between."""
RATE, READS = 4e14, 2.5e12
"""Assumed of a card: operations per second in 16 bits, and bytes per second from its memory; about 40 % and 75 % of what an H100 is sold
with."""
LINKS = {"NVLink": Machine(RATE, RATE, READS, 3e11, 2e-5), "PCIe": Machine(RATE, RATE, READS, 2e10, 3e-5)}
"""Assumed of a link: 300 and 20 GB per second that a card sends, and 20 and 30 microseconds for a collective of nothing."""


MODELS = ("skyreels-1.3b", "skyreels-14b", "magi-4.5b", "magi-24b")


def work_of(geometry: Geometry) -> Work:
    """A chunk that sees all of its window, as far as its steps allow, with the branches of each, in 16 bits. From a network of one layer on the
    meta device: no memory is needed."""
    family, job, layers, layout = geometry.family, geometry.job, geometry.config.layers, geometry.layout
    one = family.network(geometry.shortened(1).config, device="meta", dtype=torch.bfloat16)
    adapter, latent = family.adapter(one, None), [side // family.latents.spatial for side in job.picture]
    network = network_of(family, adapter, latent)
    network = replace(network, layers=layers, weights=layers * network.weights, stored=layers * network.stored)
    frame, guidance, bundle = adapter.tokens_per_frame(*latent), family.guidance, Sized.of(geometry)
    chunk, steps = layout.chunk_frames * frame, steps_of(family, adapter, job.schedule(bundle), frame, job.cfg, job.sigmas(bundle))
    remembered = len(guidance.remembered(job.cfg)) if guidance.inside else None
    return Work(network, len(guidance.branches(job.cfg)), chunk, layout.window * chunk, geometry.words, HALF, remembered=remembered, steps=steps)


def meshes_of(work: Work, count: int) -> list[Mesh]:
    return meshes(count, work.branches, work.network.heads)


def cards() -> str:
    """Seconds of one evaluation, and how many times as fast as one card, by the arithmetic of `ranks/cost.py`."""
    lines = []
    for name in MODELS:
        geometry = GEOMETRIES[name]
        work, picture = work_of(geometry), f"{geometry.job.width} x {geometry.job.size}"
        for count in CARDS:
            mesh = {link: fastest(work, meshes_of(work, count), machine) for link, machine in LINKS.items()}
            each = (f"{sum(seconds(work, mesh[link], LINKS[link])):.2f} s, {ratio(work, mesh[link], LINKS[link]):.2f}x" for link in LINKS)
            one = mesh["PCIe"]
            sent, kept = mean(work, partial(sent_bytes, mesh=one)) / MIB, cache_bytes(work, one) / GIB
            lines.append((name, picture, count, f"{one.branches} x {one.heads}", *each, f"{sent:.0f} MiB", f"{kept:.1f} GiB"))
    head = ["model", "picture", "cards", "branches x heads", *LINKS, "each card sends for an evaluation", "KV cache of the window on each"]
    return table(head, lines)


def cache_bytes(work: Work, mesh: Mesh) -> int:
    """Keys and values of all that a chunk sees, on the device that holds most of them."""
    network = work.network
    heads, branches = max(shares(network.heads, mesh.heads)), max(shares(work.with_history, mesh.branches))
    return 2 * network.layers * heads * network.head_dim * work.seen * branches * work.itemsize


def measured() -> str:
    """What `bench scale` found, with processes of one machine."""
    lines = []
    for name in SCALE:
        alone, *shared = data(name)["rows"]
        for one in shared:
            seconds = (f"{row['seconds']:.1f} s, {row['cpu_s']:.1f} s" for row in (alone, one))
            ratios = f"{one['ratio']:.2f}x", f"{one['expected']:.2f}x", f"{one['deviation']:+.0%}", f"{one['cpu_ratio']:.2f}x"
            sent, kept = f"{one['mib_per_evaluation']:.2f} MiB", f"{one['kv_mib']:.0f} MiB"
            lines.append((one["devices"], f"{one['branches']} x {one['heads']}", *seconds, *ratios, sent, kept))
    way = ["processes", "branches x heads", "one process: clock, processor", "all: clock, processor of each"]
    head = [*way, "ratio", "expected", "deviation", "ratio of the processor", "each sends for an evaluation", "KV cache of each"]
    return table(head, lines) + "\n" + "\n".join(map(origin, SCALE))


FIGURES: dict[str, Callable[[], str]] = {"scale-cards": cards, "scale-measured": measured}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels (default %(default)s)")
    parser.add_argument("--frames", type=int, default=37, help="pixel frames (default %(default)s: two chunks)")
    parser.add_argument("--steps", type=int, default=3, help="steps per chunk (default %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="of the network, a multiple of 128, the size of a head (default %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the network (default %(default)s)")
    add_ranks(parser)


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows"}: for one device and every mesh of all of them seconds of the film, how many times as fast as one device it was and was expected
    to be, `efficiency` by device, and what the first device sent. Raises ValueError for what cannot work.

    All ways take turns, and the median run of each counts. `cpu_s`: of the first device, by the clock of its process, which stands still while
    other processes have its core. Every process keeps to one core, so that no two are put on the same one while there are others.
    """
    geometry = asked(args)
    keep_to_a_core()
    with world() as devices:
        choices = meshes(devices.devices, len(SKYREELS.guidance.branches(geometry.job.cfg)), geometry.config.heads)
        whole, bundle = (sized(geometry, geometry.config.layers, torch.float32, "cpu") for _ in range(2))
        devices = sharded(replace(devices, machine=timed_again(devices.machine)), bundle.network, SKYREELS.blocks, args)
        shared = [(bundle, replace(devices, branches=mesh.branches)) for mesh in choices if mesh.devices > 1]
        ways = [*([(whole, ONE)] if devices.first else []), *shared]
        timed = [[Timed.of(network, geometry.job, way) for network, way in ways] for _ in range(1 + REPEATS)][1:]
    each = [sorted(runs, key=lambda one: one.report.wall_s)[REPEATS // 2] for runs in zip(*timed, strict=True)]
    return {"device": device_name(), "torch": torch.__version__, "job": asdict(geometry.job), "config": asdict(geometry.config),
            "rows": [row(one, each[0]) for one in each]}  # fmt: skip


def keep_to_a_core() -> None:
    """Of this process and all of its threads to come, where there is one of torch and the system can."""
    if torch.get_num_threads() == 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", "0")) % len(cores)]})


def timed_again(machine: Machine | None) -> Machine | None:
    """A few times, some seconds in all, since films take the machine as long: the median of each of its values."""
    if machine is None:
        return None
    found = [astuple(machine)]
    for _ in range(TIMED):
        time.sleep(PAUSE)
        found.append(astuple(timed_machine()))
    return Machine(*map(median, zip(*found, strict=True)))


@dataclass(frozen=True)
class Timed:
    report: RunReport
    cpu_s: float

    @classmethod
    def of(cls, bundle: Bundle, job: Job, world: World) -> Timed:
        began = time.process_time()
        _, report = generate(bundle, job, world=world)
        return cls(report, time.process_time() - began)


def asked(args: argparse.Namespace) -> Geometry:
    """Raises ValueError, before anything is made."""
    if args.width % HEAD_DIM or not HEAD_DIM <= args.width <= 8192 or not 1 <= args.layers <= 100:
        raise ValueError(
            f"a network of width {args.width} with {args.layers} layers was asked for: width is a multiple of {HEAD_DIM}, layers 1 to 100"
        )
    job = Job("", args.frames, args.steps, size=args.size, ar_step=args.steps)
    geometry = Geometry(SKYREELS, SkyReelsConfig(args.width, 2 * args.width, args.layers, text_dim=64), job, 16)
    job.schedule(Sized.of(geometry))
    return geometry


def row(timed: Timed, alone: Timed) -> dict[str, Any]:
    """`deviation`: of the ratio that came from the one that was expected."""
    report = timed.report
    came, devices = alone.report.wall_s / report.wall_s, report.devices or asdict(Mesh()) | {"expected_ratio": 1.0} | asdict(Traffic())
    weights = devices.get("weights", asdict(Traffic()))
    evaluations, count = report.chunk_steps_computed + report.commits, devices["branches"] * devices["heads"]
    return {
        "devices": count, "branches": devices["branches"], "heads": devices["heads"], "seconds": round(report.wall_s, 3), "ratio": round(came, 3),
        "efficiency": round(came / count, 3), "expected": devices["expected_ratio"], "deviation": round(came / devices["expected_ratio"] - 1, 3),
        "cpu_s": round(timed.cpu_s, 3), "cpu_ratio": round(alone.cpu_s / timed.cpu_s, 3),
        "mib_per_evaluation": round(devices["bytes"] / evaluations / MIB, 3), "sending_s": round(devices["seconds"], 3),
        "weights_mib_per_evaluation": round(weights["bytes"] / evaluations / MIB, 3), "gathering_s": round(weights["seconds"], 3),
        "kv_mib": round(report.kv_peak_bytes / MIB, 2),
    }  # fmt: skip
