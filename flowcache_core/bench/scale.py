"""`bench scale`: one film on one device and on all that torchrun has started, in every way that they can share it.

`torchrun --nproc-per-node N -m flowcache_core bench scale`. The network has random weights: nothing is said about films. The film of one device is
timed while the others wait, in turn with those of all of them; what was expected follows from a product and a message that are timed before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..device import device_name
from ..models.bundle import Bundle
from ..models.family import ChunkLayout, Family
from ..models.magi import MagiConfig
from ..models.magi_family import MAGI
from ..models.skyreels import HEAD_DIM, SkyReelsConfig
from ..models.skyreels_family import SKYREELS
from ..ranks.cost import Machine, Mesh, Work, fastest, meshes, ratio, seconds, sent_bytes
from ..ranks.group import Traffic, shares
from ..ranks.launch import world
from ..ranks.world import ONE, World, network_of
from ..run.generate import Job, generate
from ..run.report import RunReport
from .measured import SCALE, data, origin, table
from .model import GIB, HALF, MIB, Geometry, Sized, sized

NAME = "scale"
LAYOUT = ChunkLayout(5, 2, 24)
CARDS = (1, 2, 4, 8)
REPEATS = 3
RATE, READS = 4e14, 2.5e12
"""Assumed of a card: operations per second in 16 bits, and bytes per second from its memory; about 40 % and 75 % of what an H100 is sold
with."""
LINKS = {"NVLink": Machine(RATE, RATE, READS, 3e11, 2e-5), "PCIe": Machine(RATE, RATE, READS, 2e10, 3e-5)}
"""Assumed of a link: 300 and 20 GB per second that a card sends, and 20 and 30 microseconds for a collective of nothing."""


@dataclass(frozen=True)
class Released:
    """A published model, and the evaluation that is counted: a chunk that sees all of its window, every branch of guidance.

    `frames`: of a chunk; `seen`: latent frames; `latent`: height and width of one.
    """

    family: Family
    config: Any
    frames: int
    seen: int
    latent: tuple[int, int]
    words: int
    cfg: float

    @property
    def cached(self) -> int:
        """Branches with a KV cache."""
        guidance = self.family.guidance
        return len(guidance.remembered(self.cfg) if guidance.inside else guidance.branches(self.cfg))

    def work(self) -> Work:
        """From a network of one layer on the meta device: no memory is needed."""
        layers = self.config.layers
        one = self.family.network(replace(self.config, layers=1), device="meta", dtype=torch.bfloat16)
        adapter = self.family.adapter(one, None)
        network = network_of(self.family, adapter, self.latent)
        network = replace(network, layers=layers, weights=layers * network.weights)
        frame, branches = adapter.tokens_per_frame(*self.latent), len(self.family.guidance.branches(self.cfg))
        return Work(network, branches, self.frames * frame, self.seen * frame, self.words, HALF)


MODELS = {
    "SkyReels-V2 1.3B, 960 x 544": Released(SKYREELS, SkyReelsConfig(1536, 8960, 30, fps=True), 5, 25, (68, 120), 512, 6.0),
    "SkyReels-V2 14B, 960 x 544": Released(SKYREELS, SkyReelsConfig(5120, 13824, 40), 5, 25, (68, 120), 512, 6.0),
    "MAGI-1 4.5B, 720 x 720": Released(MAGI, MagiConfig(3072, 12288, 34, 8), 6, 30, (90, 90), 800, 7.5),
    "MAGI-1 24B, 1280 x 720": Released(MAGI, MagiConfig(6144, 16384, 48, 8, channels=32, gated=True), 6, 30, (90, 160), 800, 7.5),
}  # fmt: skip


def cards() -> str:
    """Seconds of one evaluation, and how many times as fast as one card, by the arithmetic of `ranks/cost.py`."""
    lines = []
    for name, released in MODELS.items():
        work = released.work()
        for count in CARDS:
            inside = released.family.guidance.inside
            choices = meshes(count, 1 if inside else work.branches, work.network.heads)
            mesh = {link: fastest(work, choices, machine) for link, machine in LINKS.items()}
            each = (f"{sum(seconds(work, mesh[link], LINKS[link])):.2f} s, {ratio(work, mesh[link], LINKS[link]):.2f}x" for link in LINKS)
            one = mesh["PCIe"]
            sent, kept = sent_bytes(work, one) / MIB, cache_bytes(work, one, released.cached) / GIB
            lines.append((name, count, f"{one.rows} x {one.columns}", *each, f"{sent:.0f} MiB", f"{kept:.1f} GiB"))
    head = ["model", "cards", "branches x heads", *LINKS, "each card sends for an evaluation", "KV cache of the window on each"]
    return table(head, lines)


def cache_bytes(work: Work, mesh: Mesh, branches: int) -> int:
    """Keys and values of all that a chunk sees, in so many branches, on the device that holds most of them."""
    network = work.network
    heads, branches = max(shares(network.heads, mesh.columns)), max(shares(branches, mesh.rows))
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
    head = [
        "processes",
        "branches x heads",
        "one process",
        "all",
        "ratio",
        "expected",
        "deviation",
        "each sends for an evaluation",
        "KV cache of each",
    ]
    return table(head, lines) + "\n" + "\n".join(map(origin, SCALE))


FIGURES: dict[str, Callable[[], str]] = {"scale-cards": cards, "scale-measured": measured}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels (default %(default)s)")
    parser.add_argument("--frames", type=int, default=37, help="pixel frames (default %(default)s: two chunks)")
    parser.add_argument("--steps", type=int, default=3, help="steps per chunk (default %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="of the network, a multiple of 128, the size of a head (default %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the network (default %(default)s)")


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows"}: for one device and every mesh of all of them seconds of the film, how many times as fast as one device it was and was expected
    to be, `efficiency` by device, and what the first device sent. Raises ValueError for what cannot work.

    All ways take turns, and the fastest run of each counts. `cpu_s`: of the first device, by the clock of its process, which stands still while
    other processes have its core.
    """
    geometry = asked(args)
    with world() as devices:
        choices = meshes(devices.devices, len(SKYREELS.guidance.branches(geometry.job.cfg)), geometry.config.heads)
        bundle = sized(geometry, geometry.config.layers, torch.float32, "cpu")
        shared = [replace(devices, rows=mesh.rows) for mesh in choices if mesh.devices > 1]
        ways = [*([ONE] if devices.first else []), *shared]
        timed = [[Timed.of(bundle, geometry.job, way) for way in ways] for _ in range(1 + REPEATS)][1:]
    each = [min(runs, key=lambda one: one.report.wall_s) for runs in zip(*timed, strict=True)]
    return {"device": device_name(), "torch": torch.__version__, "job": asdict(geometry.job), "config": asdict(geometry.config),
            "rows": [row(one, each[0]) for one in each]}  # fmt: skip


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
    job.schedule(Sized(SKYREELS, None, None, LAYOUT))
    return Geometry(SkyReelsConfig(args.width, 2 * args.width, args.layers, text_dim=64), LAYOUT, job, 16)


def row(timed: Timed, alone: Timed) -> dict[str, Any]:
    """`deviation`: of the ratio that came from the one that was expected."""
    report = timed.report
    came, devices = alone.report.wall_s / report.wall_s, report.devices or asdict(Mesh()) | {"expected_ratio": 1.0} | asdict(Traffic())
    evaluations, count = report.chunk_steps_computed + report.commits, devices["rows"] * devices["columns"]
    return {
        "devices": count, "branches": devices["rows"], "heads": devices["columns"], "seconds": round(report.wall_s, 3), "ratio": round(came, 3),
        "efficiency": round(came / count, 3), "expected": devices["expected_ratio"], "deviation": round(came / devices["expected_ratio"] - 1, 3),
        "cpu_s": round(timed.cpu_s, 3), "cpu_ratio": round(alone.cpu_s / timed.cpu_s, 3),
        "mib_per_evaluation": round(devices["bytes"] / evaluations / MIB, 3), "sending_s": round(devices["seconds"], 3),
        "kv_mib": round(report.kv_peak_bytes / MIB, 2),
    }  # fmt: skip
