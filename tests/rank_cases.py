"""Films that several processes share, beside the same films of one: python -m tests.rank_cases FOLDER prints JSON as `test_ranks` reads it.

One process imports PyTorch and makes the films of one device; the devices are its forks.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.kv.scores.salience import HeadInfo, Salience, SalienceHead
from flowcache_core.models.bundle import Bundle
from flowcache_core.models.family import Bundled, ChunkLayout
from flowcache_core.models.magi import MagiConfig
from flowcache_core.models.magi_family import MAGI
from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import Motion
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.ranks.cost import Machine
from flowcache_core.ranks.world import ONE, World
from flowcache_core.run.generate import NOTHING, Given, Job, generate
from flowcache_core.run.report import RunReport
from tests.forked import forked
from tests.rank_ends import ended, free_port, scaled
from tests.rank_states import Film, resumed
from tests.rank_weights import Watched
from tests.tiny_magi import tiny_magi
from tests.toy_family import no_vae, words

MACHINE = Machine(1e9, 1e9, 1e9, 1e9, 1e-4)
JOB = Job("a text", frames=57, steps=2, seed=3, size=32, cfg=3.0, ar_step=1)
"""Three chunks of 5 latent frames of 4 tokens, of which a chunk sees two."""
DECIDED = replace(JOB, steps=6, ar_step=3)
MAGI_JOB = replace(JOB, frames=72, steps=4, cfg=7.5, shift=3.0, solver="euler", addnoise=0)
MAGI_LONGER = replace(MAGI_JOB, steps=8, ar_step=2)
BASE = Chunkwise(1.6, 1, max_reuse=3)
FINE: dict[str, Any] = {"base": BASE, "coarse": 0.2, "min_refresh": 0.0}
LATENT = replace(BASE, signature="latent", replay="residual")
"""A rule for a network without a time modulation."""
HEAD, TOKENS = "head.safetensors", 20


@dataclass(frozen=True)
class Case:
    """`branches`: along how many devices they are shared; `dtype`: float64 unless that is not what is tested; `family`, `heads`: of the network."""

    policy: CachePolicy | None = None
    compressor: Compressor | None = None
    job: Job = JOB
    branches: int = 1
    prefix: int = 0
    dtype: str = "float64"
    family: str = SKYREELS.name
    heads: int = 4
    sharded: bool = False
    """Whether each device holds its share of the weights."""


def kv(name: str, **settings: Any) -> Compressor:
    policy = next(kind for kind in KV_POLICIES if kind.name == name)
    return Compressor(policy(), 1.5, **settings)


CASES: dict[str, Case] = {
    "uncached": Case(),
    "uncached, branches apart": Case(branches=2),
    "uncached, float32": Case(dtype="float32"),
    "planned": Case(Planned(share=0.5), job=DECIDED, branches=2),
    "seconds": Case(Planned(seconds=100.0)),
    "rule": Case(replace(BASE, replay="residual"), job=DECIDED, branches=2),
    "motion": Case(Motion(1.6, **FINE), job=DECIDED, branches=2),
    "motion by output": Case(Motion(1.6, **{**FINE, "base": replace(BASE, replay="residual")}, measure="output"), job=DECIDED, branches=2),
    "motion by change": Case(Motion(1.6, **FINE, measure="change"), job=DECIDED, branches=2),
    "part": Case(Multirate(share=0.5), job=replace(JOB, steps=8, ar_step=4), branches=2),
    "prefix": Case(prefix=3),
    "kv scores": Case(compressor=kv("importance-redundancy")),
    "kv scores, three heads": Case(compressor=kv("importance-redundancy"), heads=3),
    "kv int8": Case(compressor=kv("r-kv", dtype="int8"), branches=2),
    "kv means": Case(compressor=kv("h2o", soft=0.2)),
    "kv frames, rule": Case(BASE, kv("importance-redundancy", granularity="frame"), DECIDED, branches=2),
    "magi": Case(job=MAGI_JOB, family=MAGI.name),
    "magi, branches apart": Case(job=MAGI_JOB, branches=2, family=MAGI.name),
    "magi planned": Case(Planned(share=0.6), job=MAGI_LONGER, branches=2, family=MAGI.name),
    "magi rule": Case(LATENT, job=MAGI_LONGER, branches=2, family=MAGI.name),
    "magi motion": Case(Motion(1.6, **{**FINE, "base": LATENT}), job=MAGI_LONGER, branches=2, family=MAGI.name),
    "magi part": Case(Multirate(share=0.6), job=replace(MAGI_LONGER, steps=12, ar_step=3), branches=2, family=MAGI.name),
    "magi kv": Case(compressor=kv("importance-redundancy", dtype="int8"), job=MAGI_JOB, branches=2, family=MAGI.name),
    "sharded": Case(branches=2, sharded=True),
    "sharded by heads": Case(Planned(share=0.5), kv("r-kv"), sharded=True),
    "magi sharded": Case(Motion(1.6, **{**FINE, "base": LATENT}), job=MAGI_LONGER, branches=2, family=MAGI.name, sharded=True),
}  # fmt: skip


OF_MAGI = tuple(name for name, case in CASES.items() if name.startswith("magi ") and not case.sharded)
SIZES = (2, 3, 4)
SOME = {2: (*CASES, "kv salience"), 3: OF_MAGI, 4: ("rule", "motion", "kv scores", "magi", "magi, branches apart")}
"""Cases by number of devices."""


class Words(Bundle):
    def text(self, prompt: str) -> Tensor:
        return words(prompt, self.network.config.text_dim).to(self.like)


@cache
def bundle_of(family: str, dtype_name: str, heads: int = 4) -> Bundle:
    dtype = getattr(torch, dtype_name)
    if family == MAGI.name:
        network = tiny_magi(MagiConfig(256, 96, 2, 4, head_dim=32, text_dim=12, caption=60)).to(dtype)
        network.dtype = dtype
        return Words(replace(MAGI, bundled=Bundled("tiny", "tiny", no_vae, words)), network, nn.Identity(), MAGI.layout)
    torch.manual_seed(0)
    net = SkyReelsV2(SkyReelsConfig(128 * heads, 64, 2, 16), dtype=dtype)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.05)
    return Words(SKYREELS, net.requires_grad_(False), nn.Identity(), ChunkLayout(5, 2, 24))


def film(case: Case, world: World = ONE, bundle: Bundle | None = None) -> tuple[Tensor, RunReport]:
    bundle, given = bundle or bundle_of(case.family, case.dtype, case.heads), NOTHING
    if case.prefix:
        given = Given(start=torch.randn(1, 16, case.prefix, 4, 4, generator=torch.Generator().manual_seed(1)))
    return generate(bundle, case.job, case.policy, compressor=case.compressor, given=given, world=replace(world, branches=case.branches))


def close_to(mine: Tensor, reference: Tensor) -> float:
    return float((mine - reference).abs().max() / reference.abs().max())


def counts(report: RunReport, case: Case) -> dict[str, Any]:
    """All that does not depend on the clock, nor on how much one device holds. Places of history are the mean of a device's branches."""
    values = report.as_dict()
    history = {key: value for key, value in values["history"].items() if key == "tokens" or (key == "frames" and case.branches == 1)}
    return {**{key: values[key] for key in ("map", "shares", "drift", "tokens_computed", "commits", "host_syncs")}, "history": history}


def same(report: RunReport, alone: RunReport, case: Case) -> bool:
    """A device without a KV cache, since it evaluates other branches, has no history, and waits for none."""
    mine, whole = counts(report, case), counts(alone, case)
    left_out = () if report.kv_peak_bytes else ("history", "host_syncs")
    return all(mine[key] == whole[key] for key in mine if key not in left_out)


def device(rank: int, devices: int, folder: Path, cases: dict[str, Case], references: dict[str, tuple[Tensor, RunReport]]) -> None:
    """One of the processes: every case, and what came of it as a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{devices}", rank=rank, world_size=devices, timeout=timedelta(seconds=60))
    world, out = World(devices, rank, MACHINE), {}
    for name, case in cases.items():
        watched = Watched.of(bundle_of(case.family, case.dtype, case.heads), world) if case.sharded else None
        case = replace(case, branches=devices) if devices == 3 else case
        latents, report = film(case, watched.world, watched.bundle) if watched else film(case, world)
        reference, alone = references[name]
        out[name] = {
            "deviation": close_to(latents, reference), "same": same(report, alone, case), "kv": report.kv_peak_bytes,
            "kv_alone": alone.kv_peak_bytes, "devices": report.devices,
            "tokens": (alone.shares * (24 if case.family == MAGI.name else TOKENS)).round().astype(int).ravel().tolist(), "commits": alone.commits,
            "notes": report.notes[-2:], "weights": watched and watched.as_dict(),
        }  # fmt: skip
    (folder / f"{devices}-{rank}.json").write_text(json.dumps(out))
    dist.destroy_process_group()


def to_resume(references: dict[str, tuple[Tensor, RunReport]]) -> dict[str, tuple[Film, World]]:
    """By way of `rank_states.WAYS`: which film, and how it is shared."""

    def one(name: str, stop: int) -> tuple[Film, World]:
        case = CASES[name]
        film = Film(bundle_of(case.family, case.dtype), case.job, case.policy, case.compressor, stop, references[name][0])
        return film, World(2, 0, MACHINE, case.branches)

    return {"as it was": one("magi kv", 10), "other mesh": one("kv int8", 5), "lost": one("kv int8", 5), "full disk": one("uncached", 0)}


def with_head(folder: Path) -> dict[str, Case]:
    """The cases, and one with a salience head of random weights."""
    torch.manual_seed(0)
    head = SalienceHead(HeadInfo(2, 512, 8, 5, "model", "sum", "teacher", 1, "licence"))
    head.save(folder / HEAD)
    return {**CASES, "kv salience": Case(compressor=Compressor(Salience(path=str(folder / HEAD)), 1.5))}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    cases = with_head(folder)
    references = {name: film(case) for name, case in cases.items()}
    for devices in SIZES:
        some = {name: cases[name] for name in SOME[devices]}
        statuses = forked(devices, partial(device, devices=devices, folder=folder, cases=some, references=references))
        assert statuses == [0] * devices, statuses
    films = {n: [json.loads((folder / f"{n}-{rank}.json").read_text()) for rank in range(n)] for n in SIZES}
    assert forked(2, partial(scaled, port=free_port(), folder=folder)) == [0, 0]
    scale = {"rows": json.loads((folder / "scale.json").read_text())["rows"], "others": (folder / "scale-1.txt").read_text()}
    print(json.dumps({"states": resumed(to_resume(references), folder), "films": films, "ends": ended(folder), "scale": scale}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
