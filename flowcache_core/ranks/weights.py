"""The weights of a network over all devices of a film, by FSDP2 (`torch.distributed.fsdp.fully_shard`): each device holds its share, and all of a
layer's only while that layer runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from .group import Group

OUTSIDE = nn.Linear, nn.Conv3d
"""What is shared of the parts of a network that are no layers; what else they have is small, and whole on every device."""


@dataclass(frozen=True)
class Gather:
    """How the weights of a layer come together: as FSDP2 does it, counted, and with `DeviceLost` where a device has ended."""

    group: Group

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: object, async_op: bool = False) -> None:
        self.group.gather_into(output_tensor, input_tensor)


def shard_weights(network: nn.Module, layers: str, devices: int) -> Group:
    """In place, for good: from now on all devices have to call the network as often, and in the same order. -> what its weights are gathered in.

    `layers`: how the names of the parameters of its layers begin. A layer is gathered as a whole, a linear layer or a convolution outside of them by
    itself. Raises ValueError where PyTorch is too old.
    """
    from torch.distributed import fsdp

    if not hasattr(getattr(fsdp, "FSDPModule", None), "set_custom_all_gather"):
        raise ValueError(
            f"weights are shared by FSDP2 with set_custom_all_gather, which PyTorch {torch.__version__} lacks: use PyTorch 2.13, or --fsdp off"
        )
    place = next(network.parameters()).device.type
    mesh, parts = init_device_mesh(place, (devices,)), list(parts_of(network, layers))
    methods = [(part, name) for part in (network, *parts) for name in called(type(part))]
    whole = set(network.parameters()).difference(*(part.parameters() for part in parts))
    for part in parts:
        fsdp.fully_shard(part, mesh=mesh, reshard_after_forward=True)
    fsdp.fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for part, method in methods:
        fsdp.register_fsdp_forward_method(part, method)
    gather = Gather(Group(mesh.get_group()))
    for part in parts:
        part.set_custom_all_gather(gather)  # type: ignore[operator]
    return gather.group


def parts_of(network: nn.Module, layers: str) -> Iterator[nn.Module]:
    """Those that are gathered one by one."""
    for name, part in network.named_modules():
        within = name.startswith(layers)
        if (within and "." not in name.removeprefix(layers)) or (not within and isinstance(part, OUTSIDE)):
            yield part


def called(kind: type[nn.Module]) -> list[str]:
    """Methods of a network or a layer by which it is run, beside `forward`."""
    public = (name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_"))
    return [name for name in public if not hasattr(nn.Module, name) and kind.__module__.split(".")[0] != "torch"]
