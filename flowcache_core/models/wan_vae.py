"""The Wan 2.1 video VAE: causal in time, 8x in space, 4x in time, 16 latent channels.

Frames 4n+1 become n+1 latent frames: the first pixel frame stands alone, every later latent frame covers four.
A film may be decoded in one call or piece by piece: `past` carries the last frames that each causal
convolution has seen, so the pieces join without a seam and equal the single call exactly.
Parameter names are those of the released checkpoint (`encoder.downsamples.0.residual.2.weight`, ...).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Past = dict[nn.Module, Tensor]

LATENT_CHANNELS = 16
SPATIAL, TEMPORAL = 8, 4
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


class RMSNorm(nn.Module):
    """Each position is scaled to unit root mean square over its channels. [B, C, ...] -> same."""

    def __init__(self, dim: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
        return x * (x.shape[1] ** 0.5 / length).to(x.dtype) * self.gamma


class CausalConv3d(nn.Conv3d):
    """A convolution that pads time on the left only, with zeros or with what `past` remembers."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        k = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_dim, out_dim, k, stride=stride, padding=(0, k[1] // 2, k[2] // 2))

    def remember(self, x: Tensor, past: Past) -> Tensor:
        """[B, C, T, H, W] -> the same with the k-1 frames before it in front."""
        depth = self.kernel_size[0] - 1
        if depth == 0:
            return x
        before = past.get(self)
        if before is None:
            before = x.new_zeros(x.shape[0], x.shape[1], depth, *x.shape[3:])
        x = torch.cat([before, x], 2)
        past[self] = x[:, :, -depth:].clone()  # a view would keep all of x
        return x

    def step(self, x: Tensor, past: Past) -> Tensor:
        return self(self.remember(x, past))


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim, 3), nn.SiLU(), CausalConv3d(in_dim, out_dim, 3),
            RMSNorm(out_dim, 3), nn.SiLU(), nn.Dropout(0.0), CausalConv3d(out_dim, out_dim, 3),
        )  # fmt: skip
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def step(self, x: Tensor, past: Past) -> Tensor:
        return run(self.residual, x, past) + self.shortcut(x)


class AttentionBlock(nn.Module):
    """Single-head attention over the pixels of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def step(self, x: Tensor, past: Past) -> Tensor:
        b, c, t, h, w = x.shape
        frames = x.transpose(1, 2).reshape(b * t, c, h, w)
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        y = self.proj(y.squeeze(1).transpose(1, 2).reshape(b * t, c, h, w))
        return x + y.reshape(b, t, c, h, w).transpose(1, 2)


class Downsample(nn.Module):
    """Halves height and width, and time as well where `in_time`; the very first frame keeps its own place in time."""

    def __init__(self, dim: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def step(self, x: Tensor, past: Past) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        last = past.get(self)
        past[self] = x[:, :, -1:].clone()
        if last is not None:
            return self.time_conv(torch.cat([last, x], 2))
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], self.time_conv(x)], 2)


class Upsample(nn.Module):
    """Doubles height and width, and time as well where `in_time`; the very first frame stays one frame."""

    def __init__(self, dim: int, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1)) if in_time else None

    def step(self, x: Tensor, past: Past) -> Tensor:
        if self.time_conv is not None:
            first = x[:, :, :0]
            if self not in past:
                past[self] = x.new_empty(0)  # it has begun
                first, x = x[:, :, :1], x[:, :, 1:]
            if x.shape[2]:
                pairs = self.time_conv.step(x, past).unflatten(1, (2, -1))
                x = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            x = torch.cat([first, x], 2)
        return per_frame(self.resample, x)


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    b, c, t, h, w = x.shape
    y = layer(x.transpose(1, 2).reshape(b * t, c, h, w))
    return y.unflatten(0, (b, t)).transpose(1, 2)


def run(layers: nn.Sequential, x: Tensor, past: Past) -> Tensor:
    for layer in layers:
        step = getattr(layer, "step", None)
        x = step(x, past) if step else layer(x)
    return x


class Encoder(nn.Module):
    def __init__(self, dim: int, in_channels: int = 3) -> None:
        super().__init__()
        dims = [dim, dim, dim * 2, dim * 4, dim * 4]
        self.conv1 = CausalConv3d(in_channels, dim, 3)
        layers: list[nn.Module] = []
        for stage in range(4):
            layers += [ResidualBlock(dims[stage], dims[stage + 1]), ResidualBlock(dims[stage + 1], dims[stage + 1])]
            if stage < 3:
                layers.append(Downsample(dims[stage + 1], in_time=stage > 0))
        self.downsamples = nn.Sequential(*layers)
        self.middle = nn.Sequential(ResidualBlock(dims[4], dims[4]), AttentionBlock(dims[4]), ResidualBlock(dims[4], dims[4]))
        self.head = nn.Sequential(RMSNorm(dims[4], 3), nn.SiLU(), CausalConv3d(dims[4], 2 * LATENT_CHANNELS, 3))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = run(self.downsamples, self.conv1.step(x, past), past)
        return run(self.head, run(self.middle, x, past), past)


class Decoder(nn.Module):
    def __init__(self, dim: int, out_channels: int = 3) -> None:
        super().__init__()
        dims = [dim * 4, dim * 4, dim * 4, dim * 2, dim]
        self.conv1 = CausalConv3d(LATENT_CHANNELS, dims[0], 3)
        self.middle = nn.Sequential(ResidualBlock(dims[0], dims[0]), AttentionBlock(dims[0]), ResidualBlock(dims[0], dims[0]))
        layers: list[nn.Module] = []
        for stage in range(4):
            out = dims[stage + 1]
            before = dims[stage] if stage == 0 else dims[stage] // 2
            layers += [ResidualBlock(before, out), ResidualBlock(out, out), ResidualBlock(out, out)]
            if stage < 3:
                layers.append(Upsample(out, in_time=stage < 2))
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(RMSNorm(dim, 3), nn.SiLU(), CausalConv3d(dim, out_channels, 3))

    def forward(self, z: Tensor, past: Past) -> Tensor:
        x = run(self.middle, self.conv1.step(z, past), past)
        return run(self.head, run(self.upsamples, x, past), past)


class WanVAE(nn.Module):
    """Latents here are the raw ones of the checkpoint; `normalise` and `denormalise` give and take unit variance."""

    def __init__(self, dim: int = 96) -> None:
        super().__init__()
        self.encoder = Encoder(dim)
        self.conv1 = CausalConv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.conv2 = CausalConv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = Decoder(dim)

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, Tensor]) -> WanVAE:
        """Width is read from the shapes. Raises ValueError for a dict that is not a Wan 2.1 VAE."""
        if "decoder.head.0.gamma" not in weights:
            raise ValueError("this is not a Wan 2.1 VAE: the key decoder.head.0.gamma is missing")
        vae = cls(weights["decoder.head.0.gamma"].shape[0])
        vae.load_state_dict(dict(weights))
        return vae.eval()

    def moments(self, film: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, 4n+1, H, W] in -1..1 -> mean, log variance, each [B, 16, n+1, H/8, W/8]."""
        mean, log_var = self.conv1(self.encoder(film, {})).chunk(2, dim=1)
        return mean, log_var

    def encode(self, film: Tensor) -> Tensor:
        """[B, 3, 4n+1, H, W] in -1..1 -> unit-variance latents [B, 16, n+1, H/8, W/8]."""
        return normalise(self.moments(film)[0])

    def decode(self, latents: Tensor, past: Past | None = None) -> Tensor:
        """Unit-variance latents [B, 16, f, h, w] -> film [B, 3, T, 8h, 8w] in about -1..1.

        Without `past`: a whole film, T = 4f-3. With one dict passed to every call: the next piece of a film.
        """
        return self.decoder(self.conv2(denormalise(latents)), {} if past is None else past)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1, 1).to(like.dtype)


def normalise(raw: Tensor) -> Tensor:
    """Raw Wan latents [B, 16, ...] -> unit variance, the space in which the network works."""
    return (raw - _per_channel(LATENT_MEAN, raw)) / _per_channel(LATENT_STD, raw)


def denormalise(latents: Tensor) -> Tensor:
    return latents * _per_channel(LATENT_STD, latents) + _per_channel(LATENT_MEAN, latents)
