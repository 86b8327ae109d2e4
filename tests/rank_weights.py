"""A network whose weights several processes share, watched: what a process holds, and what it sends; `rank_cases` runs it for `test_ranks`."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from flowcache_core.models.bundle import Bundle
from flowcache_core.ranks.weights import parts_of
from flowcache_core.ranks.world import World


@dataclass
class Watched:
    """`most`: bytes of weights that the process held while a layer ran; `sent`: as its parts were called, and layers once more for every text."""

    bundle: Bundle
    world: World
    whole: int
    layer: int
    most: int = 0
    sent: int = 0

    @classmethod
    def of(cls, bundle: Bundle, world: World) -> Watched:
        network, layers = deepcopy(bundle.network), bundle.family.blocks
        parts = list(parts_of(network, layers))
        of_layer = [one for name, one in network.named_modules() if name.startswith(layers) and "." not in name.removeprefix(layers)]
        shares = {part: (world.devices - 1) * share(part, world.devices) for part in parts}
        watched = cls(replace(bundle, network=network), world, resident(network), max(resident(one) for one in of_layer))
        watched.world = world.sharded(network, layers)
        texts = 2 if bundle.family.guidance.inside else 1
        watched.sent = texts * sum(shares[layer] for layer in of_layer)

        def called(part: nn.Module, _: object) -> None:
            watched.most, watched.sent = max(watched.most, resident(network)), watched.sent + shares[part]

        for part in parts:
            part.register_forward_pre_hook(called)
        return watched

    def as_dict(self) -> dict[str, Any]:
        return {"whole": self.whole, "layer": self.layer, "most": self.most, "after": resident(self.bundle.network), "sent": self.sent}


def resident(network: nn.Module) -> int:
    """Bytes of the weights that this process holds now."""
    return sum((weight.to_local() if isinstance(weight, DTensor) else weight).nbytes for weight in network.parameters())


def share(part: nn.Module, devices: int) -> int:
    """Bytes of a part of a network that each process has: of every weight so many rows that all have as many."""
    return sum(-(-len(weight) // devices) * weight[:1].nbytes for weight in part.parameters())
