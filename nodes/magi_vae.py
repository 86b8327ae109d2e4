"""The MAGI-1 VAE as a VAE of the host, which does not know it: films of 4n frames, in tiles, raw latents."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from ..flowcache_core.models.magi_vae import PATCH, TILING, MagiVAE, denormalise, normalise
from ..flowcache_core.sampling.frames import FOUR_N

HELD = 32
"""Numbers that a token of a tile needs at most, in units of the width: the hidden layer, and queries, keys and values in float32."""


class RawVAE(MagiVAE):
    """Its latents are those that the host keeps, before the scale of its latent format."""

    def encode(self, film: torch.Tensor, *unused: Any) -> torch.Tensor:
        return denormalise(super().encode(film))

    def decode(self, latents: torch.Tensor, *unused: Any) -> torch.Tensor:
        """The film is put together where the host wants it, so that beside the weights one tile is held."""
        return super().decode(normalise(latents.float().to(comfy.model_management.intermediate_device())))

    def held(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes for a tile of latents [B, C, F, h, w]."""
        frames, height, width = shape[2:]
        tokens = 1 + min(frames, TILING.frames) * min(height, TILING.side) * min(width, TILING.side)
        wide = HELD * self.config.dim + 8 * self.config.ffn_dim
        return shape[0] * tokens * wide * comfy.model_management.dtype_size(dtype)


class MagiHostVAE(comfy.sd.VAE):
    """`weights`: of the released file. Raises ValueError, with the reason, for those of another VAE."""

    def __init__(self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
        vae = RawVAE.from_state_dict(weights)
        with _unwarned():
            super().__init__(sd={})
        host, (each, height, width) = comfy.model_management, PATCH
        self.latent_channels, self.latent_dim, self.disable_offload = vae.config.channels, 3, True
        self.upscale_ratio, self.upscale_index_formula = (FOUR_N.pixel, height, width), PATCH
        self.downscale_ratio, self.downscale_index_formula = (lambda frames: frames // each, height, width), PATCH
        self.memory_used_decode = vae.held
        self.memory_used_encode = lambda shape, dtype: vae.held(_cells(shape), dtype) + torch.Size(shape).numel() * host.dtype_size(dtype)
        self.device, self.output_device = host.vae_device(), host.intermediate_device()
        self.vae_dtype = dtype or host.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model = vae.to(self.vae_dtype)
        self.patcher = comfy.model_patcher.ModelPatcher(vae, load_device=self.device, offload_device=host.vae_offload_device())
        self.model_size()


def _cells(shape: Sequence[int]) -> tuple[int, ...]:
    """A film [B, 3, T, H, W] in latent cells."""
    return (*shape[:2], *(-(-length // per) for length, per in zip(shape[2:], PATCH, strict=True)))


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without the warning that the host has for weights that it does not know."""

    def known(record: logging.LogRecord) -> bool:
        return "No VAE weights detected" not in record.getMessage()

    log = logging.getLogger()
    log.addFilter(known)
    try:
        yield
    finally:
        log.removeFilter(known)
