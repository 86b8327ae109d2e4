"""The bundled tiny models: a network, a VAE and a text encoder that together need no download."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter import ModelAdapter
from .causal_wan_family import SELF_FORCING
from .checkpoint import load_network, read
from .family import ChunkLayout, Family, Preview
from .magi_family import MAGI
from .skyreels_family import SKYREELS

WEIGHTS = Path(__file__).parent / "weights"
BUNDLED: dict[str, Family] = {family.bundled.name: family for family in (SKYREELS, MAGI, SELF_FORCING) if family.bundled}
"""Families by the names of their tiny models."""


@dataclass(frozen=True)
class Bundle:
    """A network of `family` with all that makes a film of it: the VAE, and how it was trained."""

    family: Family
    network: Any
    vae: Any
    layout: ChunkLayout

    def adapter(self) -> ModelAdapter:
        return self.family.adapter(self.network, None)

    def text(self, prompt: str) -> Tensor:
        """-> [1, words, text_dim] in the network's dtype and place."""
        assert self.family.bundled is not None
        return self.family.bundled.encode(prompt, self.network.config.text_dim).to(self.like)

    @property
    def name(self) -> str:
        """Of the tiny model, by which demo and benches choose it."""
        assert self.family.bundled is not None
        return self.family.bundled.name

    @property
    def like(self) -> Tensor:
        """An empty tensor of the dtype and in the place of the network."""
        weight: Tensor = next(self.network.parameters())
        return torch.empty(0, dtype=weight.dtype, device=weight.device)

    @property
    def dtype(self) -> str:
        """What the network computes in, in words."""
        return str(self.like.dtype).removeprefix("torch.")


def files_of(family: Family = SKYREELS) -> tuple[Path, Path]:
    """Network and VAE. Raises ValueError where the family has no bundled model."""
    if family.bundled is None:
        raise ValueError(f"no tiny model of {family.title} comes with the pack")
    return WEIGHTS / f"{family.bundled.name}.safetensors", WEIGHTS / f"{family.bundled.vae}.safetensors"


NETWORK, VAE = files_of()
NAME = NETWORK.stem


def load_bundle(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", family: Family = SKYREELS) -> Bundle:
    network_file, vae_file = files_of(family)
    assert family.bundled is not None
    weights, metadata = read(network_file)
    network = load_network(weights, network_file.name, dtype, device, family=family.name, families=(family,))
    vae = family.bundled.load_vae(read(vae_file)[0]).to(device, dtype).requires_grad_(False)
    return Bundle(family, network, vae, family.layout_of(metadata))


def preview_of(family: Family, path: Path) -> Preview | None:
    """The colours of a file's latents, where it is the bundled model of the family."""
    return family.bundled.preview if family.bundled and path == files_of(family)[0] else None


def weights_id(family: Family = SKYREELS) -> str:
    """Names the bundled weights of a family: what was measured on others does not speak of these."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files_of(family))).hexdigest()[:12]
