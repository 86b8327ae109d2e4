"""The devices of a film: how they share it, what is expected of that, and what came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ..kv.compressor import Compressor
from ..kv.policy import LearntKVPolicy
from ..models.adapter import ModelAdapter
from ..models.family import Family
from ..policies.motion import BUCKETS
from ..policies.protocol import CachePolicy, PartPolicy, TokenPolicy
from ..sampling.schedule import ChunkSchedule
from .cost import Machine, Mesh, Network, Work, fastest, meshes, ratio, seconds, sent_bytes
from .group import Group, Traffic, shares
from .split import parts, split_adapter, split_policy

MIB = 2**20
SIDE, PIECE, REPEATS = 512, 2**20, 10
"""Of the product and of the message, in numbers, by which a machine is timed, and how often."""
TICK = 1e-9


@dataclass(frozen=True)
class Spread:
    """How one film is shared. `branches`: the devices that have the other branches of this one's tokens; `heads`: those that have the other tokens
    of its branches."""

    branches: Group = field(default_factory=Group)
    heads: Group = field(default_factory=Group)
    work: Work | None = None
    machine: Machine | None = None

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.branches.size, self.heads.size)

    def adapter(self, adapter: ModelAdapter, policy: CachePolicy | None, compressor: Compressor | None) -> ModelAdapter:
        """For this device's share of tokens and heads. Raises ValueError."""
        learnt = compressor is not None and isinstance(compressor.policy, LearntKVPolicy)
        return split_adapter(adapter, self.heads, wants_residual(policy), learnt)

    def compressor(self, compressor: Compressor | None, heads: int) -> Compressor | None:
        """`heads`: of keys, of the whole network. A budget in GiB is that of the device that holds most; all of them keep as many slots."""
        if compressor is None or self.mesh.devices == 1:
            return compressor
        mine = compressor.budget * (self._part_of_most(heads) if compressor.unit == "GiB" else 1)
        return replace(compressor, policy=split_policy(compressor.policy, self.heads, heads), budget=mine)

    def _part_of_most(self, heads: int) -> float:
        """What this device holds of each slot, as a part of what the device holds that has most heads and branches."""
        each = shares(heads, self.heads.size), shares(self.work.branches if self.work else 1, self.branches.size)
        return each[0][self.heads.rank] / max(each[0]) * each[1][self.branches.rank] / max(each[1])

    def own(self, branches: int) -> slice:
        """Of so many branches those that this device evaluates."""
        return parts(shares(branches, self.branches.size))[self.branches.rank]

    def joined(self, each: Tensor, branches: int) -> Tensor:
        """Velocities of this device's branches [own branches, C, F, h, w] -> of all."""
        return self.branches.gathered(each, 0, shares(branches, self.branches.size))

    def agreed(self, value: float) -> float:
        """The largest that any device has measured: what all go by."""
        return _largest(self.branches, _largest(self.heads, value))

    @property
    def expectation(self) -> str:
        """In one sentence; "" on one device."""
        if self.work is None or self.machine is None:
            return ""
        mesh, computing_sending = self.mesh, seconds(self.work, self.mesh, self.machine)
        size = sent_bytes(self.work, mesh, (self.branches.rank, self.heads.rank)) / MIB
        return (
            f"{mesh.devices} devices, {mesh.branches} for the branches of guidance x {mesh.heads} for heads: an evaluation of a chunk is expected to "
            f"take {computing_sending[0]:.3g} s of computing and {computing_sending[1]:.3g} s of sending {size:.3g} MiB from each device, "
            f"{ratio(self.work, mesh, self.machine):.2f}x as fast as one device"
        )

    @property
    def traffic(self) -> Traffic:
        """Of this device so far."""
        return self.branches.traffic + self.heads.traffic

    @property
    def line(self) -> str:
        """What came of it, in one sentence; "" on one device."""
        if self.mesh.devices == 1:
            return ""
        sent = self.traffic
        return f"this device of {self.mesh.devices} sent {sent.bytes / MIB:.3g} MiB in {sent.calls} collectives, which took {sent.seconds:.3g} s"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; {} on one device."""
        if self.work is None or self.machine is None or self.mesh.devices == 1:
            return {}
        expected = ratio(self.work, self.mesh, self.machine)
        return {**asdict(self.mesh), "expected_ratio": round(expected, 3), **asdict(self.traffic)}


ALONE = Spread()


@dataclass(frozen=True)
class World:
    """All devices of the command. `machine`: as timed when they came together; None: this one alone."""

    devices: int = 1
    rank: int = 0
    machine: Machine | None = None
    branches: int | None = None
    """Along how many of them branches are shared; None: as is fastest."""

    @property
    def first(self) -> bool:
        """Whether this device prints and writes."""
        return self.rank == 0

    def spread(self, family: Family, adapter: ModelAdapter, schedule: ChunkSchedule, latent: Sequence[int], branches: int, words: int,
               itemsize: int, policy: CachePolicy | None = None) -> Spread:  # fmt: skip
        """The mesh for a film. `latent`: height and width of a frame; `branches`: of guidance; `words`: of each one's text. Raises ValueError,
        with the way out, where the devices cannot share it."""
        if self.machine is None:
            return ALONE
        frame = adapter.tokens_per_frame(*latent)
        spans = [schedule.span(k)[1] * frame for k in range(schedule.chunks)]
        seen = min(schedule.horizon, schedule.frames) * frame
        work = Work(network_of(family, adapter, latent), branches, max(spans), seen, words, itemsize, residual=wants_residual(policy))
        choices = meshes(self.devices, branches if shares_branches(family, policy) else 1, adapter.heads)
        choices = [mesh for mesh in choices if self.branches in (None, mesh.branches)] or choices
        mesh = fastest(work, choices, self.machine)
        self._require_tokens(min(spans), mesh, policy)
        return Spread(**self.groups(mesh), work=work, machine=self.machine)

    def groups(self, mesh: Mesh) -> dict[str, Group]:
        """Of this device, by what they share. All devices call it."""
        groups = init_device_mesh("cpu", (mesh.branches, mesh.heads), mesh_dim_names=("branches", "heads"))
        return {name: Group(groups.get_group(name)) for name, size in asdict(mesh).items() if size > 1}

    def _require_tokens(self, fewest: int, mesh: Mesh, policy: CachePolicy | None) -> None:
        lengths = BUCKETS if isinstance(policy, TokenPolicy | PartPolicy) else 1
        if -(-fewest // lengths) < mesh.heads:
            raise ValueError(
                f"the shortest chunk has {fewest} tokens, which run at least {-(-fewest // lengths)} at a time, and {mesh.heads} devices share "
                "them: use fewer devices or a larger picture"
            )


ONE = World()


def wants_residual(policy: CachePolicy | None) -> bool:
    """Whether the session looks at what the blocks add to their input."""
    return policy is not None and (policy.keeps == "residual" or (isinstance(policy, TokenPolicy) and policy.watches == "output"))


def shares_branches(family: Family, policy: CachePolicy | None) -> bool:
    """Whether devices may have different branches: not where guidance is combined inside the run, nor where a policy looks at what the network made
    of one branch or of all, since then its decisions would differ."""
    watches = policy.watches if isinstance(policy, TokenPolicy) else "clean"
    return not family.guidance.inside and watches in ("clean", "noisy")


def network_of(family: Family, adapter: ModelAdapter, latent: Sequence[int]) -> Network:
    """Weights that multiply the text alone are not counted."""
    network: Any = getattr(adapter, "network", None)
    named = network.named_parameters() if network is not None else ()
    weights = sum(weight.numel() for name, weight in named if name.startswith(family.blocks) and weight.ndim > 1)
    cells = family.latents.channels * latent[0] * latent[1] // adapter.tokens_per_frame(*latent)
    of_text = adapter.text_channels * adapter.width
    return Network(adapter.layers, adapter.width, adapter.heads, adapter.query_heads, adapter.head_dim, max(weights - of_text, 1), cells)


def timed_machine(device: torch.device | str = "cpu") -> Machine:
    """What each of the devices computes and sends: a fraction of a second, on the first alone and then on all of them at once."""
    group = Group(dist.group.WORLD)
    a = torch.randn(SIDE, SIDE, device=device)
    message = [torch.zeros(PIECE // group.size, device=device)] * group.size
    alone = _mean(lambda: a @ a, a) if group.rank == 0 else 0.0
    dist.barrier()
    together = _mean(lambda: a @ a, a)
    copy = _mean(a.clone, a)
    sending = _mean(lambda: group.exchange(message, [message[0].shape] * group.size), a)
    nothing = _mean(lambda: group.exchange([a[0, :1]] * group.size, [(1,)] * group.size), a)
    slowest = torch.tensor([alone, together, copy, sending, nothing], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    alone, together, copy, sending, nothing = slowest.tolist()
    product, sent = 2 * SIDE**3, a.element_size() * PIECE * (group.size - 1) // group.size
    return Machine(product / together, product / min(alone, together), 2 * a.nbytes / copy, sent / max(sending - nothing, TICK), nothing)


def _mean(call: Callable[[], object], like: Tensor) -> float:
    """Seconds of a call, after a first one."""
    call()
    _wait(like)
    began = time.perf_counter()
    for _ in range(REPEATS):
        call()
    _wait(like)
    return (time.perf_counter() - began) / REPEATS


def _wait(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


def _largest(group: Group, value: float) -> float:
    return float(group.gathered(torch.full((1,), value, dtype=torch.float64), 0, [1] * group.size).max())
