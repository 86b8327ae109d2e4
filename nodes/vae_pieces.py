"""A host's VAE decodes a film piece by piece: exactly where it is the Wan 2.1 VAE, whose memory can be carried, or that of MAGI-1, in whole tiles,
else in overlapping pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.ldm.wan.vae
import comfy.model_management
import torch

from ..flowcache_core.models.magi_vae import TILING, MagiVAE
from ..flowcache_core.show.pieces import AFTER, BEFORE, TAKE, in_succession, in_tiles, overlapping

OVERLAPS = (f"this VAE keeps nothing from piece to piece, so the film was decoded in pieces of {TAKE} latent frames, each with {BEFORE} before and "
            f"{AFTER} after it: at the joints it may differ a little from a film decoded whole")  # fmt: skip


def is_carried(vae: Any) -> bool:
    """Whether what the VAE remembers of earlier frames can be carried from piece to piece: the film then equals one decoded whole."""
    return isinstance(vae.first_stage_model, comfy.ldm.wan.vae.WanVAE)


def is_tiled(vae: Any) -> bool:
    """Whether the VAE decodes in tiles that have no frames in common: pieces of whole tiles then make the film that is decoded whole."""
    return isinstance(vae.first_stage_model, MagiVAE)


def pieces_of(vae: Any, samples: torch.Tensor) -> Iterator[torch.Tensor]:
    """Latents [1, C, F, h, w] of one film -> its frames in pieces [T, H, W, 3] in 0..1."""
    if is_carried(vae):
        return _carried(vae, samples)
    if is_tiled(vae):
        return in_tiles(lambda piece: vae.decode(piece)[0], samples, TILING.frames)
    return overlapping(lambda piece: vae.decode(piece)[0], samples, frames_by(vae))


def frames_by(vae: Any) -> Callable[[int], int]:
    """How many frames so many latent frames become."""
    in_time = vae.upscale_ratio[0] if isinstance(vae.upscale_ratio, tuple) else 1
    return in_time if callable(in_time) else lambda latents: latents * in_time


def _carried(vae: Any, samples: torch.Tensor) -> Iterator[torch.Tensor]:
    """The host's own way through the Wan 2.1 VAE, in the same pieces and on the same device, without joining them."""
    host, model = comfy.model_management, vae.first_stage_model
    host.load_models_gpu([vae.patcher], memory_required=vae.memory_used_decode(samples.shape, vae.vae_dtype), force_full_load=vae.disable_offload)
    memory = [None] * comfy.ldm.wan.vae.count_cache_layers(model.decoder) if samples.shape[2] > 1 else None

    def step(piece: torch.Tensor) -> torch.Tensor:
        out = model.decoder(piece, feat_cache=memory, feat_idx=[0])
        film = torch.cat(out, 2) if isinstance(out, list) else out  # older hosts return the film itself
        film = film.to(device=vae.output_device, dtype=vae.vae_output_dtype(), copy=True)
        vae.process_output(film)
        return film[0].movedim(0, -1)

    return in_succession(step, model.conv2(samples.to(device=vae.device, dtype=vae.vae_dtype)))
