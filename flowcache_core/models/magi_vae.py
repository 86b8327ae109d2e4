"""The MAGI-1 VAE: two transformers, 4x in time, 8x in space, 16 latent channels. Films have 4n frames.

Every patch of a tile sees every other, so a film goes through in tiles: of 12 frames of 256x256 pixels, as released.
Parameter names are those of the released checkpoint (`encoder.blocks.0.attn.qkv.weight`, ...).
Architecture: MAGI-1 report (arXiv 2505.13211), section 2.2.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.attention import attention
from ..sampling.frames import FOUR_N
from ..untrusted import short
from .tiles import Sizes, Tiling, in_tiles

PATCH: Sizes = (4, 8, 8)
"""Pixels of a latent cell along time, height and width."""
HEAD_DIM = 64
LATENT_SCALE = 0.18215
"""Raw latents times this are those of the network."""
PLACED_FRAMES = 4
"""Latent frames for which places are learned; other sizes are interpolated."""
EPS = 1e-5
TILING = Tiling(frames=3, side=32, common=8)
"""Of the released settings: 12 frames, 256 pixels a side, a quarter of them in common."""
WIDEST, DEEPEST = 1 << 20, 256
"""Sizes and layers beyond any model: a file that says more would only keep the machine busy."""
WHERE = "the released one is ckpt/vae/diffusion_pytorch_model.safetensors of MAGI-1"


@dataclass(frozen=True, slots=True)
class MagiVAEConfig:
    """Sizes, all of them readable from the shapes of a checkpoint. `side`: latent cells along the square for which places are learned."""

    dim: int = 1024
    ffn_dim: int = 4096
    layers: int = 24
    channels: int = 16
    side: int = 32

    @property
    def grid(self) -> Sizes:
        return PLACED_FRAMES, self.side, self.side

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> MagiVAEConfig:
        """`shapes`: key -> shape. Raises ValueError with the reason when they are not those of this VAE."""
        asked = {"encoder.patch_embed.proj.weight": 5, "encoder.blocks.0.mlp.fc1.weight": 2, "encoder.pos_embed": 3, "decoder.proj_in.weight": 2}
        for key, axes in asked.items():
            if key not in shapes:
                raise ValueError(f"this is not a MAGI-1 VAE: the key {key} is missing; {WHERE}")
            if len(shapes[key]) != axes or not all(1 <= size <= WIDEST for size in shapes[key]):
                raise ValueError(f"this is not a whole MAGI-1 VAE: {key} has shape {tuple(shapes[key])}; download it again")
        patches, hidden, places, latents = (shapes[key] for key in asked)
        dim, side = patches[0], math.isqrt((places[1] - 1) // PLACED_FRAMES)
        if dim % math.prod(PATCH):
            raise ValueError(f"this is not a MAGI-1 VAE: its width {dim} is not a multiple of {math.prod(PATCH)}, the pixels of a patch; {WHERE}")
        if places[1] != 1 + PLACED_FRAMES * side**2:
            raise ValueError(
                f"this is not a MAGI-1 VAE: {places[1] - 1} learned places do not make {PLACED_FRAMES} latent frames of a square; {WHERE}"
            )
        layers = 1 + max(int(number) for number in (k.split(".")[2] for k in shapes if k.startswith("encoder.blocks.")) if number.isdecimal())
        if layers > DEEPEST:
            raise ValueError(f"this is not a MAGI-1 VAE: a key names block {layers - 1}, and at most {DEEPEST} are known; {WHERE}")
        return cls(dim, hidden[0], layers, latents[1], side)


class Attention(nn.Module):
    """Each head's queries, keys and values are standardised, in the place of a norm in front."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = standardised(self.qkv(x).unflatten(-1, (3, -1, HEAD_DIM))).permute(2, 0, 3, 1, 4)
        y: Tensor = self.proj(attention(q, k, v).transpose(1, 2).flatten(2))
        return y


def standardised(x: Tensor) -> Tensor:
    """To mean 0 and standard deviation 1 over the last axis, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    std, mean = torch.std_mean(wide, -1, correction=0, keepdim=True)
    return ((wide - mean) / (std + EPS)).to(x.dtype)


class Block(nn.Module):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, ffn_dim), act=nn.GELU(), fc2=nn.Linear(ffn_dim, dim)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """One token per latent cell, and one more that belongs to none."""

    def __init__(self, config: MagiVAEConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(config.grid), config.dim))
        self.blocks = nn.ModuleList(Block(config.dim, config.ffn_dim) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, eps=EPS)

    def places(self, grid: Sequence[int]) -> Tensor:
        """The learned places, interpolated to a grid of another size, behind that of the token without a cell: [1, 1 + tokens, dim]."""
        learned = self.pos_embed[:, 1:].unflatten(1, self.grid).movedim(-1, 1)
        if tuple(grid) != self.grid:
            learned = F.interpolate(learned, size=tuple(grid), mode="trilinear", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], learned.flatten(2).transpose(1, 2)], 1)

    def stack(self, x: Tensor) -> Tensor:
        """[B, dim, f, h, w] -> [B, f * h * w, dim]."""
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + self.places(x.shape[2:])
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.norm(tokens[:, 1:])
        return out


class Encoder(Transformer):
    def __init__(self, config: MagiVAEConfig) -> None:
        super().__init__(config)
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv3d(3, config.dim, PATCH, stride=PATCH)))
        self.last_layer = nn.Linear(config.dim, 2 * config.channels)

    def forward(self, film: Tensor) -> Tensor:
        """[B, 3, 4f, 8h, 8w] -> mean and log variance, one after the other, [B, 2 * channels, f, h, w]."""
        patches = self.patch_embed(film)
        out: Tensor = self.last_layer(self.stack(patches))
        return out.transpose(1, 2).unflatten(2, patches.shape[2:])


class Decoder(Transformer):
    def __init__(self, config: MagiVAEConfig) -> None:
        super().__init__(config)
        self.proj_in = nn.Linear(config.channels, config.dim)
        self.last_layer = nn.Conv3d(config.dim // math.prod(PATCH), 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Raw latents [B, channels, f, h, w] -> [B, 3, 4f, 8h, 8w]."""
        tokens = self.stack(self.proj_in(z.movedim(1, -1)).movedim(-1, 1))
        pixels = tokens.unflatten(2, (*PATCH, -1)).unflatten(1, z.shape[2:])  # [B, f, h, w, 4, 8, 8, C]
        film: Tensor = self.last_layer(pixels.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3))
        return film


class MagiVAE(nn.Module):
    """Latents here are those of the network; a tile is computed in the dtype and place of the weights."""

    def __init__(self, config: MagiVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config or MagiVAEConfig()
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, Tensor]) -> MagiVAE:
        """Sizes are read from the shapes, and the tensors are taken as they are. Raises ValueError for a dict that is not a whole MAGI-1 VAE."""
        with torch.device("meta"):
            vae = cls(MagiVAEConfig.from_shapes({key: weight.shape for key, weight in weights.items()}))
        _require_whole(weights, vae.state_dict())
        vae.load_state_dict(dict(weights), assign=True)
        return vae.eval().requires_grad_(False)

    def moments(self, film: Tensor) -> tuple[Tensor, Tensor]:
        """One tile [B, 3, 4f, 8h, 8w] in -1..1 -> mean, log variance of its raw latents, each [B, channels, f, h, w]."""
        mean, log_var = self.encoder(film).chunk(2, dim=1)
        return mean, log_var

    def encode(self, film: Tensor, tiling: Tiling | None = TILING) -> Tensor:
        """[B, 3, 4n, H, W] in -1..1, or a single frame, which then stands still for four -> latents [B, channels, n, H/8, W/8].

        `tiling`: None for the whole film at once. Raises ValueError for a film that does not divide into cells.
        """
        film = film.expand(-1, -1, PATCH[0], -1, -1) if film.shape[2] == 1 else film
        _require_cells(film)
        return self._through(film, tiling, lambda part: normalise(self.moments(part)[0]), self.config.channels, PATCH, (1, 1, 1))

    def decode(self, latents: Tensor, tiling: Tiling | None = TILING) -> Tensor:
        """Latents [B, channels, f, h, w] -> film [B, 3, 4f, 8h, 8w] in about -1..1. `tiling`: None for the whole film at once.

        Pieces of whole tiles in time, without frames in common, make the film that one call makes.
        """
        return self._through(latents, tiling, lambda part: self.decoder(denormalise(part)), 3, (1, 1, 1), PATCH)

    def _through(self, x: Tensor, tiling: Tiling | None, run: Callable[[Tensor], Tensor], channels: int, taken: Sizes, made: Sizes) -> Tensor:
        weight = self.decoder.proj_in.weight
        if tiling is None:
            return run(x.to(weight)).to(x)
        return in_tiles(x, tiling, lambda part: run(part.to(weight)), channels, taken, made)


def normalise(raw: Tensor) -> Tensor:
    """Raw latents -> the space in which the network works."""
    return raw * LATENT_SCALE


def denormalise(latents: Tensor) -> Tensor:
    return latents / LATENT_SCALE


def _require_cells(film: Tensor) -> None:
    FOUR_N.require(film.shape[2])
    height, width = film.shape[3:]
    if height % PATCH[1] or width % PATCH[2]:
        raise ValueError(f"a picture of {width}x{height} does not divide into cells of {PATCH[1]} pixels: use sides that are multiples of {PATCH[1]}")


def _require_whole(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for keys, what in ((wanted.keys() - weights.keys(), "missing"), (weights.keys() - wanted.keys(), "unknown")):
        if keys:
            raise ValueError(f"this is not a whole MAGI-1 VAE: {len(keys)} of {len(wanted)} keys are {what}, such as {short(min(keys))}; {WHERE}")
    for key, weight in wanted.items():
        if not weights[key].is_floating_point():
            kind = str(weights[key].dtype).removeprefix("torch.")
            raise ValueError(f"this is not a whole MAGI-1 VAE: {key} is stored as {kind}, and its weights are floating-point numbers; {WHERE}")
        if weights[key].shape != weight.shape:
            raise ValueError(
                f"this is not a whole MAGI-1 VAE: {key} has shape {tuple(weights[key].shape)}, its other sizes ask for {tuple(weight.shape)}; {WHERE}"
            )
