"""The devices of a film: how they share it, what is expected of that, and what came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ..kv.compressor import Compressor
from ..kv.policy import LearntKVPolicy
from ..models.adapter import ModelAdapter, reach_of
from ..models.family import Family
from ..policies.motion import BUCKETS
from ..policies.protocol import CachePolicy, PartPolicy, TokenPolicy
from ..sampling.schedule import ChunkSchedule
from .cost import Machine, Mesh, Network, Step, Work, fastest, mean, meshes, ratio, seconds, sent_bytes, weight_bytes
from .group import Group, Traffic, shares
from .split import split_adapter, split_policy
from .weights import shard_weights

MIB = 2**20
SIDE, ROWS, WEIGHTS, PIECE = 512, 256, 32, 2**20
"""Products by which a machine is timed: of so many rows with each of so many matrices, which lie in memory as those of a network do; numbers of
the message."""
REPEATS, ROUNDS = 10, 3
"""Of a message in a row; of all, whose median counts."""
TICK = 1e-9


@dataclass(frozen=True)
class Spread:
    """How one film is shared. `branches`: the devices that have the other branches of this one's tokens; `heads`: those that have the other tokens
    of its branches."""

    branches: Group = field(default_factory=Group)
    heads: Group = field(default_factory=Group)
    work: Work | None = None
    machine: Machine | None = None
    weights: Group = field(default_factory=Group)
    """What the weights are gathered in, where each device holds its share of them."""
    before: Traffic = field(default_factory=Traffic)
    """Of the weights, for films before this one."""

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.branches.size, self.heads.size)

    @property
    def place(self) -> int | None:
        """Of this device in the mesh; None for a device alone."""
        return None if self.mesh.devices == 1 else self.branches.rank * self.heads.size + self.heads.rank

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
        """The key heads of this device, as a part of those of the device that has most."""
        each = shares(heads, self.heads.size)
        return each[self.heads.rank] / max(each)

    def own(self, branches: int) -> slice:
        """Of so many branches those that this device evaluates: dealt out in turn, so that the first so many of them are shared evenly too."""
        return slice(self.branches.rank, branches, self.branches.size)

    def most(self, branches: int) -> int:
        """How many of so many branches a device evaluates at most."""
        return max(shares(branches, self.branches.size))

    def joined(self, each: Tensor, branches: int, films: int = 1) -> Tensor:
        """Velocities of this device's branches [own branches x films, C, F, h, w] -> of all, in their order."""
        devices = self.branches.size
        if devices == 1:
            return each
        whole = self.branches.gathered(each, 0, [films * count for count in shares(branches, devices)]).split(films)
        order = [branch for device in range(devices) for branch in range(device, branches, devices)]
        return torch.cat([velocity for _, velocity in sorted(zip(order, whole, strict=True), key=lambda one: one[0])])

    def agreed(self, value: float) -> float:
        """The largest that any device has measured: what all go by."""
        return largest(self.branches, largest(self.heads, value))

    @property
    def expectation(self) -> str:
        """In one sentence; "" on one device."""
        if self.work is None or self.machine is None:
            return ""
        mesh, computing_sending = self.mesh, seconds(self.work, self.mesh, self.machine)
        size = mean(self.work, lambda one: sent_bytes(one, mesh, (self.branches.rank, self.heads.rank)) + weight_bytes(one, mesh)) / MIB
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
    def gathered(self) -> Traffic:
        """The same for weights."""
        return self.weights.traffic - self.before

    @property
    def line(self) -> str:
        """What came of it, in one sentence; "" on one device."""
        if self.mesh.devices == 1:
            return ""
        sent = self.traffic
        of_weights = f", and {self.gathered.bytes / MIB:.3g} MiB of weights, {self.gathered.seconds:.3g} s" if self.weights.size > 1 else ""
        took = f"sent {sent.bytes / MIB:.3g} MiB in {sent.calls} collectives, which took {sent.seconds:.3g} s"
        return f"this device of {self.mesh.devices} {took}{of_weights}"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; {} on one device."""
        if self.work is None or self.machine is None or self.mesh.devices == 1:
            return {}
        expected = ratio(self.work, self.mesh, self.machine)
        weights = {"weights": asdict(self.gathered)} if self.weights.size > 1 else {}
        return {**asdict(self.mesh), "expected_ratio": round(expected, 3), **asdict(self.traffic), **weights}


ALONE = Spread()


@dataclass(frozen=True)
class World:
    """All devices of the command. `machine`: as timed when they came together; None: this one alone."""

    devices: int = 1
    rank: int = 0
    machine: Machine | None = None
    branches: int | None = None
    """Along how many of them branches are shared; None: as is fastest."""
    weights: Group = field(default_factory=Group)
    """What the weights of the network are gathered in, where each device holds its share of them."""

    def sharded(self, network: nn.Module, layers: str) -> World:
        """These devices, each with its share of the weights of a network, which is changed in place. Raises ValueError."""
        return replace(self, weights=shard_weights(network, layers, self.devices)) if self.devices > 1 else self

    @property
    def first(self) -> bool:
        """Whether this device prints and writes."""
        return self.rank == 0

    def spread(self, family: Family, adapter: ModelAdapter, schedule: ChunkSchedule, latent: Sequence[int], branches: int, words: int,
               itemsize: int, policy: CachePolicy | None = None, scale: float = 1.0, sigmas: Sequence[float] = ()) -> Spread:  # fmt: skip
        """The mesh for a film. `latent`: height and width of a frame; `branches`: of guidance; `words`: of each one's text; `scale` of guidance
        and noise levels `sigmas` say which branches run at which step, where guidance is inside the run. Raises ValueError, with the way out,
        where the devices cannot share it."""
        if self.machine is None:
            return ALONE
        frame = adapter.tokens_per_frame(*latent)
        spans = [schedule.span(k)[1] * frame for k in range(schedule.chunks)]
        seen = min(schedule.horizon, schedule.frames) * frame
        steps = steps_of(family, adapter, schedule, frame, scale, sigmas)
        work = Work(network_of(family, adapter, latent), branches, max(spans), seen, words, itemsize, residual=wants_residual(policy),
                    remembered=len(family.guidance.remembered(scale)) if family.guidance.inside else None, steps=steps,
                    sharded=self.weights.size > 1)  # fmt: skip
        shared = min((step.branches for step in steps), default=branches) if work.sharded else branches
        choices = meshes(self.devices, shared if shares_branches(policy) else 1, adapter.heads)
        choices = [mesh for mesh in choices if self.branches in (None, mesh.branches)] or choices
        mesh = fastest(work, choices, self.machine)
        self._require_tokens(min(spans), mesh, policy)
        return Spread(**self.groups(mesh), work=work, machine=self.machine, weights=self.weights, before=replace(self.weights.traffic))

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


def shares_branches(policy: CachePolicy | None) -> bool:
    """Whether devices may have different branches: not where a policy looks at what the network made of one branch or of all, since then its
    decisions would differ."""
    return not isinstance(policy, TokenPolicy) or policy.watches in ("clean", "noisy")


def steps_of(family: Family, adapter: ModelAdapter, schedule: ChunkSchedule, frame_tokens: int, scale: float,
             sigmas: Sequence[float]) -> tuple[Step, ...]:  # fmt: skip
    """The evaluations of a chunk that sees all that its steps allow; () where they are alike."""
    guidance, last = family.guidance, schedule.chunks - 1
    if not guidance.inside or not sigmas:
        return ()
    reach, most = reach_of(adapter) or (lambda chunk: None), min(schedule.horizon, schedule.frames)
    chunks = [reach(schedule.at(last, step)) for step in range(len(sigmas))]
    *seen, alone = (most if count is None else min(count * schedule.chunk_frames, most) for count in chunks)
    steps = [Step(len(guidance.needed(scale, sigma)), frames * frame_tokens) for sigma, frames in zip(sigmas[:-1], seen, strict=True)]
    commit = [Step(len(guidance.remembered(scale)), alone * frame_tokens, committing=True)] if family.clean_pass else []
    return *steps, *commit


def network_of(family: Family, adapter: ModelAdapter, latent: Sequence[int]) -> Network:
    """Weights that multiply the text alone are not counted."""
    network: Any = getattr(adapter, "network", None)
    named = network.named_parameters() if network is not None else ()
    of_layers = [weight for name, weight in named if name.startswith(family.blocks)]
    weights = sum(weight.numel() for weight in of_layers if weight.ndim > 1)
    cells = family.latents.channels * latent[0] * latent[1] // adapter.tokens_per_frame(*latent)
    of_text = adapter.text_channels * adapter.width
    return Network(adapter.layers, adapter.width, adapter.heads, adapter.query_heads, adapter.head_dim, max(weights - of_text, 1), cells,
                   sum(weight.numel() for weight in of_layers))  # fmt: skip


def timed_machine(device: torch.device | str = "cpu") -> Machine:
    """What each of the devices computes and sends: a fraction of a second, on the first alone and then on all of them at once, in turn, so that
    other work on the machine falls on both."""
    group = Group(dist.group.WORLD)
    weights = torch.randn(WEIGHTS, SIDE, SIDE, device=device)
    slowest = torch.stack([_round(group, weights) for _ in range(ROUNDS)])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    alone, together, copy, sending, nothing = slowest.median(0).values.tolist()
    products, sent = 2 * ROWS * weights.numel(), weights.element_size() * PIECE * (group.size - 1) // group.size
    return Machine(products / together, products / min(alone, together), 2 * weights.nbytes / copy, sent / max(sending - nothing, TICK), nothing)


def _round(group: Group, weights: Tensor) -> Tensor:
    """Seconds of the products on the first device alone (0 on the others) and on all at once, of a copy, of a message, and of one of nothing."""
    x, other, message = weights[0, :ROWS], torch.empty_like(weights), [weights.new_zeros(PIECE // group.size)] * group.size

    def products() -> None:
        for weight in weights:
            x @ weight

    dist.barrier()
    alone = _mean(products, x, 1) if group.rank == 0 else 0.0
    dist.barrier()
    together, copy = _mean(products, x, 1), _mean(lambda: other.copy_(weights), x, 1)
    sending = _mean(lambda: group.exchange(message, [message[0].shape] * group.size), x, REPEATS)
    nothing = _mean(lambda: group.exchange([x[0, :1]] * group.size, [(1,)] * group.size), x, REPEATS)
    return torch.tensor([alone, together, copy, sending, nothing], dtype=torch.float64, device=x.device)


def _mean(call: Callable[[], object], like: Tensor, repeats: int) -> float:
    """Seconds of a call."""
    _wait(like)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(like)
    return (time.perf_counter() - began) / repeats


def _wait(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


def largest(group: Group, value: float) -> float:
    return float(group.gathered(torch.full((1,), value, dtype=torch.float64), 0, [1] * group.size).max())
