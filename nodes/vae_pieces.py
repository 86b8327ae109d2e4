"""A host's VAE decodes a film piece by piece: exactly where it is the Wan 2.1 VAE, whose memory can be carried, or that of MAGI-1, in whole tiles,
else in overlapping pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.ldm.wan.vae
import comfy.model_management
import torch

from ..flowcache_core.models.magi_vae import TILING, MagiVAE
from ..flowcache_core.show.pieces import AFTER, BEFORE, TAKE, Decode, InSuccession, InTiles, Overlapping, Pieces, all_of

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
    return all_of(decoder_of(vae, samples.shape), samples)


def decoder_of(vae: Any, shape: torch.Size, made: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents) -> Pieces:
    """For latents of this shape, of one film. `made`: what the VAE takes of them."""
    if is_tiled(vae):
        return InTiles(lambda piece: vae.decode(made(piece))[0], TILING.frames)
    if not is_carried(vae):
        return Overlapping(lambda piece: vae.decode(made(piece))[0], frames_by(vae))
    step = _carried(vae, shape)
    return InSuccession(lambda piece: step(made(piece)))


def frames_by(vae: Any) -> Callable[[int], int]:
    """How many frames so many latent frames become."""
    in_time = vae.upscale_ratio[0] if isinstance(vae.upscale_ratio, tuple) else 1
    return in_time if callable(in_time) else lambda latents: latents * in_time


def _carried(vae: Any, shape: torch.Size) -> Decode:
    """The host's own way through the Wan 2.1 VAE, in the same pieces and on the same device, without joining them."""
    host, model = comfy.model_management, vae.first_stage_model
    memory = [None] * comfy.ldm.wan.vae.count_cache_layers(model.decoder) if shape[2] > 1 else None

    def step(piece: torch.Tensor) -> torch.Tensor:
        host.load_models_gpu([vae.patcher], memory_required=vae.memory_used_decode(shape, vae.vae_dtype), force_full_load=vae.disable_offload)
        latents = model.conv2(piece.to(device=vae.device, dtype=vae.vae_dtype))
        out = model.decoder(latents, feat_cache=memory, feat_idx=[0])
        film = torch.cat(out, 2) if isinstance(out, list) else out  # older hosts return the film itself
        film = film.to(device=vae.output_device, dtype=vae.vae_output_dtype(), copy=True)
        vae.process_output(film)
        return film[0].movedim(0, -1)

    return step
