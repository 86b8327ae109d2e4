"""A film decoded piece by piece, so that no more than a piece of it is ever held. What decodes it is unknown here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

from torch import Tensor

Decode = Callable[[Tensor], Tensor]
"""Latents [1, C, F, h, w] -> frames [T, H, W, 3] in 0..1."""
AT_ONCE = 2
"""Latent frames of a piece where the decoder remembers the one before: as many as ComfyUI's Wan VAE takes itself."""
TAKE, BEFORE, AFTER = 8, 4, 2
"""Latent frames that an overlapping piece is good for, and that it sees before and after these."""


def in_succession(step: Decode, latents: Tensor) -> Iterator[Tensor]:
    """Latents [1, C, F, h, w] -> the film in pieces [T, H, W, 3]; `step` carries what a causal decoder remembers from piece to piece.

    The first latent frame comes alone, as it stands for a single frame of film.
    """
    for piece in (latents[:, :, :1], *latents[:, :, 1:].split(AT_ONCE, 2)):
        if piece.shape[2]:
            yield step(piece)


def in_tiles(decode: Decode, latents: Tensor, size: int) -> Iterator[Tensor]:
    """Latents [1, C, F, h, w] -> the film in pieces [T, H, W, 3], exactly as decoded whole, of a decoder whose tiles have no frames in common.

    `size`: latent frames of a tile. What is left at the end, and fills none, goes with the tile before it.
    """
    total = latents.shape[2]
    ends = [*range(size, total // size * size, size), total]
    for start, end in pairwise([0, *ends]):
        yield decode(latents[:, :, start:end])


def overlapping(decode: Decode, latents: Tensor, frames: Callable[[int], int]) -> Iterator[Tensor]:
    """Latents [1, C, F, h, w] -> the film in pieces [T, H, W, 3]; each is decoded anew with some latent frames around it, and these are cut off.

    `frames`: how many frames of film so many latent frames become, 0 of 0. At the joints the film may differ a little from one that was decoded
    whole. Raises ValueError for a decoder that makes another number.
    """
    total = latents.shape[2]
    for start in range(0, total, TAKE):
        end, first, last = min(start + TAKE, total), max(start - BEFORE, 0), min(start + TAKE + AFTER, total)
        film = decode(latents[:, :, first:last])
        if len(film) != frames(last - first):
            raise ValueError(
                f"this VAE made {len(film)} frames of {last - first} latent frames instead of {frames(last - first)}: is it the VAE of the model? "
                "If so, use VAE Decode and connect images"
            )
        yield film[frames(start - first) : frames(end - first)]
