"""Causal Wan models as the host's own class of them, where it has one: its sampler and other packs find what they know, and AR Chunk Sampler a
model of ours. The network is the host's; what our sampler evaluates are its layers, in the order that the core knows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import comfy.model_base
import torch
from torch import nn

from ..flowcache_core.models.causal_wan_adapter import CausalWanAdapter, WholeTimesteps
from ..flowcache_core.models.family import Family
from ..flowcache_core.models.skyreels import HEAD_DIM, PATCH, SkyReelsConfig
from .host_model import HostConfig, HostModel
from .host_network import TURN, host_network

BASE = getattr(comfy.model_base, "WAN21_CausalAR", None)
"""The host's model, from version 0.21 on."""
SAMPLER, FUNCTION, BLOCK = "Sampler AR Video", "sample_ar_video", "num_frame_per_block"
"""The host's node, the function of the sampler that it makes, and its setting."""


def host_has(family: Family) -> bool:
    """Whether the host has a model of its own for the family."""
    return BASE is not None and family.adapter in (CausalWanAdapter, WholeTimesteps)


class NativeConfig(HostConfig):
    """With the sizes of the network as the host calls them."""

    def sizes(self) -> dict[str, Any]:
        config: SkyReelsConfig = self.found.config
        sizes = {"dim": config.dim, "ffn_dim": config.ffn_dim, "num_heads": config.dim // HEAD_DIM, "num_layers": config.layers}
        channels = {"in_dim": config.channels, "out_dim": config.channels, "text_dim": config.text_dim, "patch_size": (1, PATCH, PATCH)}
        return {"image_model": "wan2.1", "model_type": "t2v", **sizes, **channels}


@lru_cache
def native_model() -> type[HostModel]:
    """The class of the host's model that is one of ours too."""

    class NativeModel(HostModel, BASE):  # type: ignore[misc, valid-type]
        image_to_video = False

        @staticmethod
        def network_of(family: Family) -> type[Any]:
            return native_network(family)

        def __init__(self, model_config: Any, layout: Any, device: Any = None) -> None:
            super().__init__(model_config, layout, device)
            self.diffusion_model.keep(model_config.found.config)

        @property
        def network(self) -> Any:
            return self.diffusion_model.ours

        def begun(self) -> None:
            super().begun()
            self.diffusion_model.link()

    return NativeModel


@lru_cache
def native_network(family: Family) -> type[Any]:
    """The class of the host's network that takes turns of our sampler, which go through `ours`: the same layers as the core has them."""
    from comfy.ldm.wan.ar_model import CausalWanModel

    class NativeNetwork(CausalWanModel):  # type: ignore[misc, no-any-unimported]
        def keep(self, config: SkyReelsConfig) -> None:
            """`config`: the sizes. What they are kept in is no part of the network for those who go through its modules."""
            self.config = config
            self.patch_embedding.register_forward_pre_hook(as_stored)
            self._ours = (host_network(family)(config, dtype=self.dtype, device="meta", operations=nn),)

        @property
        def ours(self) -> Any:
            return self._ours[0]

        def link(self) -> None:
            """Puts the layers in place, as they are now: loading and patching may have put others there."""
            for holder, name, path in leaves(self.ours):
                holder._modules[name] = self.get_submodule(path)

        def through(self, *args: Any) -> torch.Tensor:
            """One block, for which other nodes may have put something else."""
            out: torch.Tensor = self.ours.through(*args)
            return out

        def forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={}, **kwargs):  # type: ignore[no-untyped-def]  # noqa: B006 (the host's signature)
            if TURN not in transformer_options:
                timestep = timestep.round() if family.adapter is WholeTimesteps else timestep
                return super().forward(x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs)
            for mine, theirs in self._modulated():
                mine._parameters["modulation"] = theirs.modulation
            return self.ours(x, timestep, context, transformer_options=transformer_options)

        def _modulated(self) -> Iterator[tuple[nn.Module, nn.Module]]:
            """Parts with a parameter that is in no layer: loading puts others in its place."""
            yield from zip((*self.ours.blocks, self.ours.head), (*self.blocks, self.head), strict=True)

    return NativeNetwork


def as_stored(layer: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """The host's network hands its patch embedding float32, whatever the weights are; layers that cast their weights are left alone."""
    return given if getattr(layer, "comfy_cast_weights", False) else (given[0].to(layer.weight.dtype),)


def leaves(network: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Every layer with weights and without parts: in which module it is, its name there, its name in the network."""
    found = []
    for path, module in network.named_modules():
        if not any(True for _ in module.children()):
            holder, _, name = path.rpartition(".")
            found.append((network.get_submodule(holder), name, path))
    return found


def frames_per_block(sampler: Any) -> int | None:
    """Of the host's sampler of such models; None for another."""
    if getattr(getattr(sampler, "sampler_function", None), "__name__", "") != FUNCTION:
        return None
    frames: int = sampler.extra_options.get(BLOCK, 1)
    return frames


def require_block(model: HostModel, frames: int) -> None:
    """Raises ValueError for a number of latent frames per block with which the network was not trained."""
    trained = model.layout.chunk_frames
    if frames != trained:
        raise ValueError(
            f"{SAMPLER}: {model.family.title} was trained with {trained} latent frame{'s' * (trained > 1)} per block, and {BLOCK} is {frames}: set "
            f"it to {trained}; if the file is of another model, choose that in the input family of Load AR Video Model"
        )
