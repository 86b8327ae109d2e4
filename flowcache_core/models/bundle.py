"""The bundled tiny-skyreels: a network, a VAE and a text encoder that together need no download."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import load_skyreels, read
from .skyreels import SkyReelsV2
from .wan_vae import WanVAE
from .word_text import encode_prompt

WEIGHTS = Path(__file__).parent / "weights"
NETWORK, VAE = WEIGHTS / "tiny-skyreels.safetensors", WEIGHTS / "tiny-wan-vae.safetensors"
NAME = "tiny-skyreels"


@dataclass(frozen=True)
class Bundle:
    """`chunk_frames` latent frames are one chunk; `window` chunks are the trained horizon."""

    network: SkyReelsV2
    vae: WanVAE
    chunk_frames: int
    window: int

    def text(self, prompt: str) -> Tensor:
        """-> [1, 32, text_dim] in the network's dtype and place."""
        like = self.network.patch_embedding.weight
        return encode_prompt(prompt, self.network.config.text_dim).to(like)


def load_bundle(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Bundle:
    weights, metadata = read(NETWORK)
    network = load_skyreels(weights, NETWORK.name, dtype, device)
    vae = WanVAE.from_state_dict(read(VAE)[0]).to(device, dtype).requires_grad_(False)
    return Bundle(network, vae, int(metadata["chunk_frames"]), int(metadata["window_chunks"]))


def weights_id() -> str:
    """Names the bundled weights: what was measured on others does not speak of these."""
    return hashlib.sha256(NETWORK.read_bytes() + VAE.read_bytes()).hexdigest()[:12]
