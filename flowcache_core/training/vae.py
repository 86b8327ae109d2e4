"""Trains the small Wan VAE: an autoencoder first, then each half on the latents of `basis.py`.

The encoder learns to produce those latents and the decoder to invert them, independently, so the network can be trained at
the same time. The decoder sees its neighbours and is not linear, so it draws edges that principal components leave out. The
autoencoder only serves as a start: halves that begin from nothing take several times longer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import whole
from ..models.wan_vae import LATENT_CHANNELS, LATENT_MEAN, LATENT_STD, AttentionBlock, ResidualBlock, WanVAE
from .basis import Basis, load_or_fit
from .loop import Loop, optimisers
from .scenes import HELD_OUT, Scene, make_scene, render

DIM = 12
AUTOENCODER_STEPS, ENCODER_STEPS, DECODER_STEPS = 2500, 1000, 1500
SHORT = 1760
"""Steps of the autoencoder on small short crops, before the long ones."""
NOISE = 0.04
"""Standard deviation of the noise on the decoder's latents: room for what the encoder and the network get wrong."""


def crops(step: int, batch: int, frames: int, size: int) -> Tensor:
    """-> [batch, 3, frames, size, size] in -1..1, channels last: random places and times of fresh clips."""
    out = []
    for i in range(batch):
        seed = step * batch + i
        pick = torch.Generator().manual_seed(seed)
        scene = make_scene(seed)
        start, top, left = (int(torch.randint(0, n + 1, (1,), generator=pick)) for n in (57 - frames, 128 - size, 128 - size))
        out.append(render(scene, start, frames)[:, :, top : top + size, left : left + size])
    return (torch.stack(out).transpose(1, 2) * 2 - 1).contiguous(memory_format=torch.channels_last_3d)


def channels_last(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def initialise(vae: WanVAE) -> None:
    """Residual branches start at zero, which trains several times faster; the latents' variance output stays fixed."""
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            for p in module.residual[6].parameters():
                p.zero_()
        elif isinstance(module, AttentionBlock):
            nn.init.zeros_(module.proj.weight)
    vae.conv1.weight[LATENT_CHANNELS:] = 0.0
    assert vae.conv1.bias is not None
    vae.conv1.bias[LATENT_CHANNELS:] = -6.0


def train(out: Path, autoencoder_steps: int, encoder_steps: int, decoder_steps: int, start: dict[str, Tensor] | None = None) -> None:
    """Writes `vae.pt`, `encoder.pt` and `decoder.pt` (resumable) and `vae.safetensors` into `out`.

    `start`: weights of an earlier VAE, with whose halves this one begins; there is no autoencoder and no `vae.pt` then.
    """
    begun = unfold(start) if start else _autoencoder(out / "vae.pt", autoencoder_steps)
    basis = load_or_fit(out)
    weights: dict[str, Tensor] = {}
    for half, total, loss, names in (
        ("encoder", encoder_steps, _encoder_loss, ("encoder.", "conv1.")),
        ("decoder", decoder_steps, _decoder_loss, ("decoder.", "conv2.")),
    ):
        loop = _loop(out / f"{half}.pt", total, 0.995, names, begun)
        loop.run(partial(loss, loop.model, basis), [p for p in loop.model.parameters() if p.requires_grad])
        weights |= {k: v for k, v in loop.average.items() if k.startswith(names)}
    save(fold(weights), out / "vae.safetensors")


def _loop(path: Path, steps: int, decay: float, trained: tuple[str, ...], start: dict[str, Tensor] | None = None) -> Loop[WanVAE]:
    """A fresh VAE, or one with the weights `start`, of which the parameters named `trained`... are trained."""
    torch.manual_seed(0)
    vae = WanVAE(DIM)
    channels_last(vae)
    initialise(vae)
    if start:
        vae.load_state_dict(start)
    for name, p in vae.named_parameters():
        p.requires_grad_(name.startswith(trained))
    return Loop(vae, path, steps, optimisers(vae, 2e-3, 8e-3), decay)


def _autoencoder(path: Path, steps: int) -> dict[str, Tensor]:
    """-> its averaged weights."""
    loop = _loop(path, steps, 0.99, ("",))
    loop.run(lambda step: _autoencoder_loss(loop.model, step), loop.model.parameters())
    return loop.average


def _autoencoder_loss(vae: WanVAE, step: int) -> Tensor:
    batch, frames, size = (4, 5, 64) if step < SHORT else (1, 49, 64) if step % 3 else (1, 17, 128)
    film = crops(step, batch, frames, size)
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = vae.moments(film)
        z = mean + torch.randn_like(mean) * (0.03 * mean.detach().std())
        back = vae.decoder(vae.conv2(z), {})
    return error(back, film, 1.0, 2.0)


def error(back: Tensor, film: Tensor, absolute: float, squared: float) -> Tensor:
    """L1 plus squared error; saturated pixels, which are the sprites, count more."""
    weight = 1 + 2 * (film.amax(1, keepdim=True) - film.amin(1, keepdim=True))
    error = back.float() - film
    return (weight * (absolute * error.abs() + squared * error.square())).mean()


def _clips(step: int) -> Tensor:
    """Small crops of long clips, then whole pictures: quality far from the first frame is decided by long clips."""
    return crops(step, 1, 49, 64) if step % 3 else crops(step, 1, 17, 128)


def _latents(basis: Basis, film: Tensor) -> Tensor:
    return torch.stack([basis.encode(clip) for clip in film])


def _encoder_loss(vae: WanVAE, basis: Basis, step: int) -> Tensor:
    film = _clips(step)
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = vae.moments(film)
    return (mean.float() - _latents(basis, film)).square().mean()


def _decoder_loss(vae: WanVAE, basis: Basis, step: int) -> Tensor:
    film = _clips(step)
    z = _latents(basis, film)
    with torch.autocast("cpu", torch.bfloat16):
        back = vae.decoder(vae.conv2(z + NOISE * torch.randn_like(z)), {})
    return error(back, film, 0.2, 4.0)


def fold(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moves unit-variance latents to the statistics of the Wan 2.1 VAE by changing the two 1x1x1 convolutions only.

    With this the standard Wan latent format gives unit variance, and decoding is unchanged.
    """
    return _rescaled(weights, torch.tensor(LATENT_STD), torch.tensor(LATENT_MEAN))


def unfold(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `fold` was given."""
    gain = 1 / torch.tensor(LATENT_STD)
    return _rescaled(weights, gain, -gain * torch.tensor(LATENT_MEAN))


def _rescaled(weights: dict[str, Tensor], gain: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Latents become `gain` times what they were, plus `shift`, and are decoded as before; one of each per channel."""
    out, like, c = dict(weights), weights["conv1.bias"], LATENT_CHANNELS
    gain, shift = gain.to(like), shift.to(like)
    weight, bias = weights["conv1.weight"].clone(), weights["conv1.bias"].clone()
    weight[:c] *= gain.view(-1, 1, 1, 1, 1)
    bias[:c] = bias[:c] * gain + shift
    bias[c:] += 2 * gain.log()
    out["conv1.weight"], out["conv1.bias"] = weight, bias
    back = weights["conv2.weight"] / gain.view(1, -1, 1, 1, 1)
    out["conv2.weight"] = back
    out["conv2.bias"] = weights["conv2.bias"] - back.flatten(1) @ shift
    return out


def save(weights: dict[str, Tensor], path: Path) -> None:
    with whole(path) as partial:
        save_file({k: v.half().contiguous() for k, v in weights.items()}, partial)


class Codes(Protocol):
    """A VAE."""

    def encode(self, film: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


@torch.no_grad()
def reconstruction(vae: Codes, clips: int = 16, scene: Callable[[int], Scene] = make_scene) -> float:
    """Mean PSNR in dB over held-out clips as `scene` draws them up: by default 57 frames at 128x128."""
    total = 0.0
    for i in range(clips):
        film = render(scene(HELD_OUT + i)).transpose(0, 1)[None]
        back = (vae.decode(vae.encode(film * 2 - 1)) / 2 + 0.5).clamp(0, 1)
        total += float(-10 * (back - film).square().mean().log10())
    return total / clips
