"""Makes the small VAE of MAGI-1: set to the principal components of `basis.py`, then its decoder trained.

Both halves end in a norm, which takes the mean and the size of a token away. A large fixed pattern beside the signal makes that size nearly
constant; signs that change from pixel to pixel make the mean nearly nothing. So the encoder gives the latents of the basis and the decoder
starts from their least-squares picture. Training then lets it see neighbouring cells and bend edges, as `vae.py` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.magi_vae import LATENT_SCALE, PATCH, TILING, MagiVAE, MagiVAEConfig
from .basis import Basis, load_or_fit
from .loop import Loop, optimisers
from .magi import BASIS_CLIPS, scene
from .scenes import render
from .vae import NOISE, error, save

CONFIG = MagiVAEConfig(dim=3 * math.prod(PATCH), ffn_dim=256, layers=1, channels=16, side=8)
"""Three channels per pixel before the last convolution: with fewer it could not carry colour."""
DECODER_STEPS, BATCH, FRAMES = 600, 2, PATCH[0] * TILING.frames
TO_ENCODE, TO_DECODE = 16.0, 7.0
"""Sizes of the fixed patterns. That of the decoder lies on the pixels themselves, where bfloat16 has to resolve both."""
LOG_VAR = -6.0
OUTER = ("encoder.patch_embed", "encoder.last_layer", "decoder.proj_in", "decoder.last_layer")


@torch.no_grad()
def solution(basis: Basis) -> MagiVAE:
    """The VAE whose latents are those of the basis, and whose pictures are its least-squares pictures nearly."""
    torch.manual_seed(0)
    vae = MagiVAE(CONFIG)
    for name, p in vae.named_parameters():
        if name.endswith("pos_embed"):
            nn.init.normal_(p, std=0.02)
        elif ".attn.proj." in name or ".mlp.fc2." in name:
            nn.init.zeros_(p)
    weights = dict(vae.named_parameters())
    _set_encoder(weights, basis)
    _set_decoder(weights, basis)
    return vae


def _set_encoder(weights: Mapping[str, Tensor], basis: Basis) -> None:
    """A token is its latents, their negatives and the pattern; attention and feed-forward layer add nothing."""
    n = CONFIG.channels
    for name, p in weights.items():
        if name.startswith(("encoder.blocks", "encoder.patch_embed", "encoder.last_layer", "encoder.pos_embed")):
            nn.init.zeros_(p)
    to, shift = basis.to.view(n, PATCH[0], 3, *PATCH[1:]).transpose(1, 2), basis.to @ basis.mean
    weights["encoder.patch_embed.proj.weight"][: 2 * n] = torch.cat([to, -to])
    pattern = TO_ENCODE * _alternating(CONFIG.dim - 2 * n)
    weights["encoder.patch_embed.proj.bias"].copy_(torch.cat([-shift, shift, pattern]))
    size = float((pattern.square().sum() + 2 * n).div(CONFIG.dim).sqrt()) / LATENT_SCALE / 2
    weights["encoder.last_layer.weight"][:n, : 2 * n] = torch.cat([torch.eye(n), -torch.eye(n)], 1) * size
    weights["encoder.last_layer.bias"][n:] = LOG_VAR


def _set_decoder(weights: Mapping[str, Tensor], basis: Basis) -> None:
    """A token is its pixels, with signs like those of a chessboard, and stripes, which the norm's bias takes away again."""
    t, y, x = (torch.arange(length) for length in PATCH)
    board = (1 - 2 * ((t[:, None, None] + y[:, None] + x) % 2)).flatten().repeat_interleave(3).float()
    stripes = TO_DECODE * (1 - 2 * (x % 2)).expand(PATCH).flatten().repeat_interleave(3).float()
    back, mean = (_by_pixel(part) for part in (basis.back, basis.mean[:, None]))
    size = (TO_DECODE**2 + float(back.square().sum() + mean.square().sum()) / CONFIG.dim) ** 0.5
    for name, value in {
        "proj_in.weight": board[:, None] * back * LATENT_SCALE,
        "proj_in.bias": board * mean[:, 0] + stripes,
        "norm.weight": board * size,
        "norm.bias": -board * stripes,
        "last_layer.weight": nn.functional.pad(torch.eye(3)[:, :, None, None, None], (1, 1) * 3),
        "last_layer.bias": torch.zeros(3),
    }.items():
        weights[f"decoder.{name}"].copy_(value)


def _by_pixel(x: Tensor) -> Tensor:
    """[768, n] in the basis's order, frame, colour, place, -> in the decoder's, frame, place, colour."""
    return x.view(PATCH[0], 3, *PATCH[1:], -1).permute(0, 2, 3, 1, 4).flatten(0, 3)


def _alternating(length: int) -> Tensor:
    return (1 - 2 * (torch.arange(length) % 2)).float()


def tiles(step: int) -> Tensor:
    """[BATCH, 3, 12, 128, 128] in -1..1: of fresh clips, as many frames as a tile has, from any of them on."""
    out = []
    for seed in range(step * BATCH, (step + 1) * BATCH):
        clip = scene(seed)
        start = int(torch.randint(0, clip.frames - FRAMES + 1, (1,), generator=torch.Generator().manual_seed(seed)))
        out.append(render(clip, start, FRAMES))
    return torch.stack(out).transpose(1, 2) * 2 - 1


def train(out: Path, decoder_steps: int, start: dict[str, Tensor] | None = None) -> None:
    """Writes `decoder.pt` (resumable) and `vae.safetensors` into `out`.

    `start`: weights of an earlier VAE, of the same basis, with whose decoder this one begins.
    """
    basis = load_or_fit(out, BASIS_CLIPS, scene)
    vae = solution(basis)
    if start:
        vae.load_state_dict(start)
    if decoder_steps:
        vae.encoder.requires_grad_(False)
        loop = Loop(vae, out / "decoder.pt", decoder_steps, optimisers(vae, 5e-4, 2e-3, OUTER), decay=0.99)
        loop.run(partial(_loss, vae, basis), list(_trained(vae)))
        vae.load_state_dict(loop.average)
    save(vae.state_dict(), out / "vae.safetensors")


def _trained(vae: MagiVAE) -> Iterable[nn.Parameter]:
    return (p for p in vae.parameters() if p.requires_grad)


def _loss(vae: MagiVAE, basis: Basis, step: int) -> Tensor:
    film = tiles(step)
    z = torch.stack([basis.encode(clip) for clip in film]) / LATENT_SCALE
    with torch.autocast("cpu", torch.bfloat16):
        back = vae.decoder(z + NOISE / LATENT_SCALE * torch.randn_like(z))
    return error(back, film, 0.2, 4.0)
