"""Faults on purpose: the stages of a run, the ways to make one, and an exception of any kind at any call of any stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowcache_core.kernels.transfer import Inbox
from flowcache_core.kv import cache, keeper
from flowcache_core.kv.cache import CachedAttention, KVCache, KVStore
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.keeper import Keeper
from flowcache_core.kv.named import policy_named
from flowcache_core.kv.packed import PackedCache
from flowcache_core.kv.scores.importance import ImportanceRedundancy
from flowcache_core.kv.waiting import Waiting
from flowcache_core.models import skyreels_adapter
from flowcache_core.models.bundle import Bundle
from flowcache_core.models.family import ChunkLayout
from flowcache_core.models.skyreels import Block, Head, SkyReelsConfig, SkyReelsV2
from flowcache_core.models.skyreels_adapter import WanAdapter
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.models.wan_vae import Decoder, WanVAE
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import Motion
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.policies.state import ChunkState
from flowcache_core.run import run as run_module
from flowcache_core.run.clock import Clock
from flowcache_core.run.generate import Job, Steps, decode, generate, generate_upstream
from flowcache_core.run.history import HistoryLog
from flowcache_core.run.report import RunReport
from flowcache_core.run.sections import SectionSession
from flowcache_core.run.session import Session
from flowcache_core.run.signals import StepSignals
from flowcache_core.sampling.solvers import Multistep, UniPC
from flowcache_core.sampling.walk import CellWalk
from flowcache_core.show import plot

TEXT = 64


class Interrupted(Exception):
    """Of a kind that nobody here knows, as a callback of the host may raise."""


class Stopped(BaseException):
    """As the host's InterruptProcessingException: no Exception."""


KINDS: dict[str, Callable[[], BaseException]] = {
    "error": lambda: RuntimeError("a fault on purpose"),
    "out of memory": lambda: torch.OutOfMemoryError("a fault on purpose"),
    "interrupt": lambda: Interrupted("a fault on purpose"),
    "keyboard": lambda: KeyboardInterrupt("a fault on purpose"),
    "base": lambda: Stopped("a fault on purpose"),
}


def tiny_bundle(seed: int = 0, window: int = 3) -> Bundle:
    """Random weights all over; chunks of two latent frames."""
    torch.manual_seed(seed)
    network = SkyReelsV2(SkyReelsConfig(128, 128, 2, TEXT, fps=True))
    for weight in network.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.05)
    vae = WanVAE(2).eval().requires_grad_(False)
    return Bundle(SKYREELS, network.eval().requires_grad_(False), vae, ChunkLayout(2, window, causal=True))


@dataclass(frozen=True)
class Made:
    """What a run came to."""

    latents: Tensor
    film: Tensor
    """Its first frame."""
    report: RunReport
    told: str

    def same(self, other: Made) -> bool:
        """Bit for bit, seconds left out."""
        counted = [{k: v for k, v in one.report.as_dict().items() if k not in ("wall_s", "seconds", "notes")} for one in (self, other)]
        return torch.equal(self.latents, other.latents) and torch.equal(self.film, other.film) and counted[0] == counted[1]


SHORT = Job("red circle moves right", frames=13, steps=5, seed=3, size=16, ar_step=2, overlap=5)
LONGER = replace(SHORT, frames=21, steps=4)
KV = Compressor(policy_named("importance-redundancy", ""), 1.5)
MOTION = Motion(0.05, alpha=0.1, base=Chunkwise(0.05, 1, signature="latent"), coarse=0.2, measure="output", min_refresh=0.0)


@dataclass(frozen=True)
class Mode:
    """A way to make a film, from the prompt to picture and report."""

    policy: CachePolicy | None = None
    compressor: Compressor | None = None
    bidirectional: bool = False
    job: Job = SHORT

    def make(self, bundle: Bundle, on_step: Callable[[Any], None] = lambda chunk: None) -> Made:
        if self.bidirectional:
            latents, report = generate_upstream(bundle, self.job, on_step, policy=self.policy)
        else:
            latents, report = generate(bundle, self.job, self.policy, on_step, compressor=self.compressor)
        film = decode(bundle, latents[:, :, :1])
        plot.chunk_map(report)
        return Made(latents, film, report, f"{report.text()} {report.as_dict()}")


MODES = {
    "block-causal": Mode(),
    "plan": Mode(Planned(share=0.7)),
    "threshold": Mode(Chunkwise(0.6, 2, signature="latent", replay="residual")),
    "KV Compressor": Mode(None, KV, job=LONGER),
    "KV Compressor, int8": Mode(None, replace(KV, dtype="int8"), job=LONGER),
    "Motion": Mode(MOTION, job=replace(SHORT, steps=6, size=32)),
    "Motion by a plan": Mode(Multirate(share=0.7)),
    "bidirectional": Mode(bidirectional=True),
}
MAIN = ("block-causal", "bidirectional", "KV Compressor", "Motion")
CAUSAL = ("block-causal", "KV Compressor", "Motion")
OUTSIDE = ("block-causal", "bidirectional")
"""For stages that know nothing of how a film is made."""
BOUNDED = ("KV Compressor", "KV Compressor, int8")


@dataclass(frozen=True)
class Stage:
    """Where a fault can be put: `attribute` of `owner`, which the runs of these modes call."""

    owner: Any
    attribute: str
    modes: tuple[str, ...] = MAIN


STAGES = {
    "text encoder": Stage(Bundle, "text", OUTSIDE),
    "text in the network": Stage(WanAdapter, "text"),
    "plan": Stage(Planned, "plan", ("plan",)),
    "plan by token": Stage(Multirate, "plan", ("Motion by a plan",)),
    "memory of the run": Stage(run_module, "footprint", OUTSIDE),
    "session": Stage(Session, "__init__", CAUSAL),
    "session of windows": Stage(SectionSession, "__init__", ("bidirectional",)),
    "what is known before": Stage(Session, "forecast", CAUSAL),
    "observer begins": Stage(Steps, "begin", OUTSIDE),
    "observer": Stage(Steps, "step"),
    "embedding": Stage(SkyReelsV2, "embed"),
    "time embedding": Stage(SkyReelsV2, "modulation"),
    "block": Stage(Block, "forward"),
    "attention": Stage(CachedAttention, "look", CAUSAL),
    "attention over windows": Stage(skyreels_adapter, "bidirectional", ("bidirectional",)),
    "attention kernel": Stage(cache, "attention", CAUSAL),
    "head": Stage(Head, "forward"),
    "replay": Stage(WanAdapter, "replay", ("threshold",)),
    "refresh": Stage(WanAdapter, "refresh", ("Motion", "Motion by a plan")),
    "policy": Stage(Chunkwise, "decide", ("threshold", "Motion")),
    "policy by token": Stage(Motion, "decide", ("Motion",)),
    "choice of tokens": Stage(Multirate, "choose", ("Motion by a plan",)),
    "signature": Stage(StepSignals, "change", ("threshold", "Motion")),
    "motion": Stage(StepSignals, "motion", ("Motion",)),
    "wait for the device": Stage(Inbox, "get", ("threshold", *BOUNDED, "Motion")),
    "state of a chunk": Stage(ChunkState, "keep", ("threshold", "Motion")),
    "solver": Stage(UniPC, "step", ("block-causal", "threshold", *BOUNDED, "Motion", "bidirectional")),
    "solver that skips": Stage(Multistep, "step", ("plan",)),
    "solver by cell": Stage(CellWalk, "step", ("Motion by a plan",)),
    "keys and values": Stage(KVCache, "slots", CAUSAL),
    "tokens that wait": Stage(Waiting, "write", ("Motion by a plan",)),
    "buffers": Stage(KVCache, "layer", CAUSAL),
    "finished chunk": Stage(Session, "commit", CAUSAL),
    "history": Stage(KVStore, "settle", CAUSAL),
    "KV score": Stage(ImportanceRedundancy, "score", BOUNDED),
    "KV scores in": Stage(Keeper, "observe", BOUNDED),
    "eviction": Stage(Keeper, "settle", BOUNDED),
    "selection": Stage(keeper, "select", BOUNDED),
    "slots moved": Stage(KVCache, "keep", ("KV Compressor",)),
    "slots moved, packed": Stage(PackedCache, "keep", ("KV Compressor, int8",)),
    "history packed": Stage(PackedCache, "join", ("KV Compressor, int8",)),
    "history located": Stage(Keeper, "locate", BOUNDED),
    "report of history": Stage(HistoryLog, "kept", BOUNDED),
    "report of a step": Stage(RunReport, "decided", CAUSAL),
    "report of a row": Stage(RunReport, "whole_row", ("bidirectional",)),
    "report closed": Stage(RunReport, "close"),
    "clock": Stage(Clock, "measure"),
    "clock stopped": Stage(Clock, "stop", OUTSIDE),
    "decoder": Stage(WanVAE, "decode", OUTSIDE),
    "inside the decoder": Stage(Decoder, "forward", OUTSIDE),
    "map": Stage(plot, "chunk_map", OUTSIDE),
    "report as text": Stage(RunReport, "text", OUTSIDE),
    "report as JSON": Stage(RunReport, "as_dict", OUTSIDE),
}


@dataclass
class Fault:
    """Raises at the `at`-th call, counted from 1; 0: never, it only counts."""

    at: int = 0
    kind: Callable[[], BaseException] = KINDS["error"]
    calls: int = 0

    def here(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.kind()


def calls_of(mode: Mode, bundle: Bundle) -> dict[str, int]:
    """By stage: how often a run goes by it."""
    with ExitStack() as opened:
        counted = {name: opened.enter_context(at_stage(stage, Fault())) for name, stage in STAGES.items()}
        mode.make(bundle)
    return {name: fault.calls for name, fault in counted.items()}


@contextmanager
def at_stage(stage: Stage, fault: Fault) -> Iterator[Fault]:
    """While it is open, every call of the stage goes by the fault first."""
    original = stage.owner.__dict__[stage.attribute]

    def faulty(*args: Any, **kwargs: Any) -> Any:
        fault.here()
        return original(*args, **kwargs)

    setattr(stage.owner, stage.attribute, faulty)
    try:
        yield fault
    finally:
        setattr(stage.owner, stage.attribute, original)


def attempt(call: Callable[[], object]) -> type[BaseException] | None:
    """-> the kind of exception that it ended in, of which nothing is kept: a traceback would hold the tensors of its frames."""
    try:
        call()
    except BaseException as raised:
        return type(raised)
    return None
