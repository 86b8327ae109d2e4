"""Trains the small Wan VAE: encoder and decoder together, then the decoder alone on a frozen encoder.

The encoder can be frozen early, so that a network can be trained on its latents while the decoder still improves.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.wan_vae import LATENT_CHANNELS, LATENT_MEAN, LATENT_STD, AttentionBlock, ResidualBlock, WanVAE
from .loop import Loop, optimisers
from .scenes import HELD_OUT, make_scene, render

DIM = 12
STEPS, DECODER_STEPS = 2500, 260
SHORT = 1760
"""Steps on small short crops, before the long ones."""


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


def train(out: Path, steps: int, decoder_steps: int) -> None:
    """Writes `vae.pt` (resumable) and the folded `vae.safetensors` into `out`."""
    torch.manual_seed(0)
    vae = WanVAE(DIM)
    channels_last(vae)
    initialise(vae)
    joint = Loop(vae, out / "vae.pt", steps, optimisers(vae, 2e-3, 8e-3), decay=0.99)
    moved = joint.step < steps
    joint.run(lambda step: _joint_loss(vae, step), vae.parameters())
    encoder = _frozen(out, joint.average, measure=moved)

    vae.load_state_dict(joint.average)
    for module in (vae.encoder, vae.conv1):
        module.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    alone = Loop(vae, out / "decoder.pt", decoder_steps, optimisers(vae, 1e-3, 4e-3), decay=0.995)
    alone.run(lambda step: _decoder_loss(vae, step), trained)
    weights = {**alone.average, **{k: v for k, v in encoder.items() if k.startswith(("encoder.", "conv1."))}}
    mean, std = torch.load(out / "statistics.pt", weights_only=True)
    save(fold(weights, mean, std, only_decoder=True), out / "vae.safetensors")


def _joint_loss(vae: WanVAE, step: int) -> Tensor:
    """Most steps see small short crops; the last ones whole pictures and long clips in turn, which is what decides quality
    far from the first frame. The decoder meets latents with 3 % noise."""
    batch, frames, size = (4, 5, 64) if step < SHORT else (1, 49, 64) if step % 3 else (1, 17, 128)
    film = crops(step, batch, frames, size)
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = vae.moments(film)
        z = mean + torch.randn_like(mean) * (0.03 * mean.detach().std())
        back = vae.decoder(vae.conv2(z), {})
    return _error(back, film)


def _error(back: Tensor, film: Tensor) -> Tensor:
    """L1 plus squared error; saturated pixels, which are the sprites, count more."""
    weight = 1 + 2 * (film.amax(1, keepdim=True) - film.amin(1, keepdim=True))
    error = back.float() - film
    return (weight * (error.abs() + 2 * error.square())).mean()


def _decoder_loss(vae: WanVAE, step: int) -> Tensor:
    film = crops(7_000_000 + step, 1, 57, 64) if step % 2 else crops(7_000_000 + step, 1, 17, 128)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            mean, _ = vae.moments(film)
            z = mean + torch.randn_like(mean) * (0.02 * mean.std())
        back = vae.decoder(vae.conv2(z), {})
    return _error(back, film)


def _frozen(out: Path, weights: dict[str, Tensor], measure: bool) -> dict[str, Tensor]:
    """Folds the latents' statistics in, measured anew where `measure`, and writes a first `vae.safetensors` to train a network on."""
    if measure or not (out / "statistics.pt").exists():
        vae = WanVAE(DIM)
        vae.load_state_dict(weights)
        channels_last(vae)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z = torch.cat([vae.moments(crops(9_000_000 + i, 1, 57, 128))[0].float() for i in range(32)])
        torch.save((z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))), out / "statistics.pt")
    mean, std = torch.load(out / "statistics.pt", weights_only=True)
    folded = fold(weights, mean, std)
    if measure or not (out / "vae.safetensors").exists():
        save(folded, out / "vae.safetensors")
    return folded


def fold(weights: dict[str, Tensor], mean: Tensor, std: Tensor, only_decoder: bool = False) -> dict[str, Tensor]:
    """Moves the latents' statistics to those of the Wan 2.1 VAE by changing the two 1x1x1 convolutions only.

    With this the standard Wan latent format gives unit variance, and decoding is unchanged.
    `only_decoder`: the encoder's convolution is already folded.
    """
    want_mean, want_std = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
    gain, shift = want_std / std, want_mean - mean * want_std / std
    out = dict(weights)
    if not only_decoder:
        c = LATENT_CHANNELS
        weight, bias = weights["conv1.weight"].clone(), weights["conv1.bias"].clone()
        weight[:c] *= gain.view(-1, 1, 1, 1, 1)
        bias[:c] = bias[:c] * gain + shift
        bias[c:] += 2 * gain.log()
        out["conv1.weight"], out["conv1.bias"] = weight, bias
    back = weights["conv2.weight"] / gain.view(1, -1, 1, 1, 1)
    out["conv2.weight"] = back
    out["conv2.bias"] = weights["conv2.bias"] - (back.flatten(1) @ shift)
    return out


def save(weights: dict[str, Tensor], path: Path) -> None:
    save_file({k: v.half().contiguous() for k, v in weights.items()}, path)


@torch.no_grad()
def reconstruction(vae: WanVAE, clips: int = 16) -> float:
    """Mean PSNR in dB over held-out clips of 57 frames at 128x128."""
    total = 0.0
    for i in range(clips):
        film = render(make_scene(HELD_OUT + i)).transpose(0, 1)[None]
        back = (vae.decode(vae.encode(film * 2 - 1)) / 2 + 0.5).clamp(0, 1)
        total += float(-10 * (back - film).square().mean().log10())
    return total / clips
