"""MAGI-1: a transformer whose layers look at earlier chunks and at the text side by side, with grouped-query heads and learned rotary bands.

As in `skyreels.py` the network knows neither chunks nor caches: it is given `attend`. Parameter names are those of the released checkpoints
(`videodit_blocks.layers.0.self_attention.linear_qkv.q.weight`, ...). Text enters by cross-attention alone; time enters through gates alone,
so a layer has neither shift nor scale.
Architecture: MAGI-1 report (arXiv 2505.13211), section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.attention import attention
from ..kernels.head_rotation import rotate_halves, wide
from ..kernels.swiglu import swiglu
from ..network import Attend, LayerAttention
from .layers import Attention, OnePlusNorm, attended, by_heads, post_normed, projected, turned
from .skyreels import FREQUENCIES, sinusoid

PATCH = 2
LATENT_CHANNELS = 16
EPS = 1e-6
GROUPS = 8
"""Both halves of what the output projection is given, attention to chunks and to text, are cut into so many parts and interleaved."""
RESCALE = 0.1
"""By how much a network that takes every latent channel twice makes its latents smaller."""
REFERENCE = 256
"""Tokens of the frame whose positions in height and width are one apart."""
TIME_SCALE = 1000

KV = tuple[Tensor, Tensor]
LayerText = Callable[[int], KV]
"""Layer -> keys and values of one branch's text, each [films, key heads, words, head_dim]."""


@dataclass(frozen=True, slots=True)
class MagiConfig:
    """Sizes, all of them readable from the shapes of a checkpoint. `gated`: the feed-forward layer multiplies two halves (24B)."""

    dim: int
    ffn_dim: int
    layers: int
    kv_heads: int
    head_dim: int = 128
    channels: int = 16
    text_dim: int = 4096
    caption: int = 800
    gated: bool = False

    @property
    def heads(self) -> int:
        return self.dim // self.head_dim

    @property
    def bands(self) -> int:
        return self.head_dim // 8

    @property
    def doubled(self) -> bool:
        """Whether the network takes every latent channel twice, and smaller (24B)."""
        return self.channels == 2 * LATENT_CHANNELS


class Projections(nn.Module):
    """Queries for chunks and for text, keys and values, all of one normed input."""

    def __init__(self, config: MagiConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        d, kv = config.dim, config.kv_heads * config.head_dim
        self.layer_norm = ops.LayerNorm(d, eps=EPS, **kw)
        self.q, self.qx = (ops.Linear(d, d, bias=False, **kw) for _ in range(2))
        self.k, self.v = (ops.Linear(d, kv, bias=False, **kw) for _ in range(2))


class ParallelAttention(nn.Module):
    """Attention to chunks and to text, from the same input, through one output projection."""

    def __init__(self, config: MagiConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.linear_qkv = Projections(config, ops, **kw)
        self.linear_kv_xattn = ops.Linear(config.dim, 2 * config.kv_heads * config.head_dim, bias=False, **kw)
        self.linear_proj = ops.Linear(2 * config.dim, config.dim, bias=False, **kw)
        self.q_layernorm, self.q_layernorm_xattn = (OnePlusNorm(config.head_dim, EPS, **kw) for _ in range(2))
        self.k_layernorm, self.k_layernorm_xattn = (OnePlusNorm(config.head_dim, EPS, **kw) for _ in range(2))

    def text_kv(self, words: Tensor) -> KV:
        """[B, L, dim] -> keys and values [B, key heads, L, head_dim], the same at every step of a run."""
        k, v = by_heads(self.linear_kv_xattn(words), 2 * self.head_dim).chunk(2, -1)
        return self.k_layernorm_xattn(k).to(v), v.contiguous()

    def forward(self, x: Tensor, text: Sequence[KV], rope: Tensor, attend: Attention) -> Tensor:
        y = self.linear_qkv.layer_norm(x)
        q = turned(self.q_layernorm, self.linear_qkv.q(y), rope, self.head_dim)
        seen = attended(attend, q, self.k_layernorm, self.linear_qkv.k(y), self.linear_qkv.v(y), y, rope, self.head_dim)
        out: Tensor = self.linear_proj(interleaved(joined(seen), joined(self.look_up(y, text))))
        return out

    def look_up(self, y: Tensor, text: Sequence[KV]) -> Tensor:
        """Attention to the text, of which every branch has its own length."""
        q = turned(self.q_layernorm_xattn, self.linear_qkv.qx(y), None, self.head_dim)
        return torch.cat([attention(mine, *kv) for mine, kv in zip(q.chunk(len(text)), text, strict=True)])


class FeedForward(nn.Module):
    def __init__(self, config: MagiConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.layer_norm = ops.LayerNorm(config.dim, eps=EPS, **kw)
        self.linear_fc1 = ops.Linear(config.dim, (1 + config.gated) * config.ffn_dim, bias=False, **kw)
        self.linear_fc2 = ops.Linear(config.ffn_dim, config.dim, bias=False, **kw)
        self.gated = config.gated

    def forward(self, x: Tensor) -> Tensor:
        y = projected(self.linear_fc1, self.layer_norm(x), "none" if self.gated else "gelu-erf")
        out: Tensor = self.linear_fc2(swiglu(y) if self.gated else y)
        return out


class Gates(nn.Module):
    """What time says to a layer: factors between -1 and 1 for attention and feed-forward."""

    def __init__(self, dim: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(ops.Linear(dim // 4, 2 * dim, **kw))

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """[B, F, d / 4] -> twice [B, F, d]."""
        return torch.tanh(wide(self.proj(F.silu(condition)))).chunk(2, -1)


class Layer(nn.Module):
    def __init__(self, config: MagiConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.ada_modulate_layer = Gates(config.dim, ops, **kw)
        self.self_attention = ParallelAttention(config, ops, **kw)
        self.self_attn_post_norm = OnePlusNorm(config.dim, EPS, **kw)
        self.mlp = FeedForward(config, ops, **kw)
        self.mlp_post_norm = OnePlusNorm(config.dim, EPS, **kw)

    def text_kv(self, words: Tensor) -> KV:
        return self.self_attention.text_kv(words)

    def forward(self, x: Tensor, condition: Tensor, text: Sequence[KV], rope: Tensor, attend: Attention) -> Tensor:
        to_attention, to_mlp = self.ada_modulate_layer(condition)
        x = post_normed(self.self_attn_post_norm, x, self.self_attention(x, text, rope, attend), to_attention)
        return post_normed(self.mlp_post_norm, x, self.mlp(x), to_mlp)


class Blocks(nn.Module):
    def __init__(self, config: MagiConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, ops, **kw) for _ in range(config.layers))
        self.final_layernorm = OnePlusNorm(config.dim, EPS, **kw)


class TimeEmbedder(nn.Module):
    def __init__(self, dim: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.mlp = nn.Sequential(ops.Linear(FREQUENCIES, dim // 4, **kw), nn.SiLU(), ops.Linear(dim // 4, dim // 4, **kw))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Times of any shape -> [..., d / 4]."""
        y: Tensor = self.mlp(sinusoid(TIME_SCALE * t).to(dtype))
        return y


class CaptionEmbedder(nn.Module):
    def __init__(self, config: MagiConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.null_caption_embedding = nn.Parameter(torch.empty(config.caption, config.text_dim, **kw))
        self.y_proj_xattn = nn.Sequential(ops.Linear(config.text_dim, config.dim, **kw), nn.SiLU())
        self.y_proj_adaln = nn.Sequential(ops.Linear(config.text_dim, config.dim // 4, **kw))

    def dropped_flags(self, dropped: Sequence[bool], like: Tensor) -> Tensor:
        """Whether each branch's text is left out -> [branches, 1, d / 4]; two rows of the null caption say so."""
        last, before = self.null_caption_embedding[-1].to(like), self.null_caption_embedding[-2].to(like)
        y: Tensor = self.y_proj_adaln(torch.stack([last if one else before for one in dropped]).unsqueeze(1))
        return y


class Bands(nn.Module):
    """In float32 at least, whatever the network computes in: positions multiply them, so that 16 bits would turn far tokens wrongly."""

    def __init__(self, size: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.bands = nn.Parameter(torch.empty(size, device=device, dtype=wide))


class Final(nn.Module):
    def __init__(self, dim: int, out: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.linear = ops.Linear(dim, out, bias=False, **kw)


def joined(x: Tensor) -> Tensor:
    """[B, heads, T, head_dim] -> [B, T, heads * head_dim]."""
    return x.transpose(1, 2).flatten(2)


def interleaved(seen: Tensor, read: Tensor) -> Tensor:
    """[B, T, d] twice -> [B, T, 2 d]: in turn a part of the heads of one and of the other."""
    return torch.stack([part.unflatten(-1, (GROUPS, -1)) for part in (seen, read)], 3).flatten(2)


def rope_table(bands: Tensor, start: int, frames: int, height: int, width: int, device: torch.device | str) -> Tensor:
    """Phases of a grid of tokens, complex64 [frames * height * width, 3 * bands]: those of time, height and width.

    `start`: position of the first frame. Height and width are counted from the middle, in units of a picture of `REFERENCE` tokens of the
    same shape.
    """
    bands, scale = bands.detach().to(device, torch.float64), math.sqrt(height * width / REFERENCE)
    places = [torch.arange(start, start + frames, dtype=torch.float64, device=device)]
    places += [_centred(count, count / scale, device) for count in (height, width)]
    angles = torch.stack(torch.meshgrid(*places, indexing="ij"), -1).unsqueeze(-1) * bands
    angles = angles.flatten(0, 2).flatten(1)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def _centred(count: int, reference: float, device: torch.device | str) -> Tensor:
    """`count` places around 0 that reach as far as `reference` places one apart."""
    where = torch.arange(count, dtype=torch.float64, device=device) - (count - 1) / 2
    return where * ((reference - 1) / max(count - 1, 1))


class Rope:
    """Rotary positions of the family, as `network.Rotary` wants them; `bands` are read when they are first needed."""

    def __init__(self, bands: Callable[[], Tensor]) -> None:
        self._bands = bands

    def phases(self, start: int, frames: int, grid: tuple[int, int]) -> Tensor:
        bands = self._bands()
        return rope_table(bands, start, frames, *grid, bands.device)

    def shift(self, frames: int) -> Tensor:
        angles = frames * self._bands().detach().double()
        angles = torch.cat([angles, torch.zeros(2 * len(angles), dtype=angles.dtype, device=angles.device)])[None]
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def turn(self, x: Tensor, phases: Tensor) -> Tensor:
        return rotate_halves(x, phases.to(x.device)).type_as(x)


class Magi(nn.Module):
    """The transformer. `operations` supplies Linear, LayerNorm and Conv3d; torch.nn is the default."""

    def __init__(self, config: MagiConfig, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype or torch.get_default_dtype()
        kw, d = {"device": device, "dtype": dtype}, config.dim
        self.x_embedder = operations.Conv3d(config.channels, d, (1, PATCH, PATCH), stride=(1, PATCH, PATCH), bias=False, **kw)
        self.t_embedder = TimeEmbedder(d, operations, **kw)
        self.y_embedder = CaptionEmbedder(config, operations, **kw)
        self.rope = Bands(config.bands, device, self.dtype)
        self.videodit_blocks = Blocks(config, operations, **kw)
        self.final_linear = Final(d, config.channels * PATCH * PATCH, operations, **kw)

    @property
    def _layers(self) -> list[Layer]:
        return cast(list[Layer], list(self.videodit_blocks.layers))

    def embed(self, x: Tensor) -> Tensor:
        """Latents [B, 16, F, h, w] -> tokens [B, F * h/2 * w/2, d]."""
        if self.config.doubled:
            x = torch.cat([x, x], 1) * RESCALE
        tokens: Tensor = self.x_embedder(x)
        return tokens.flatten(2).transpose(1, 2).contiguous()

    def embed_some(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The same for the listed tokens [n] alone -> [B, n, d]: their patches pass through as so many frames of one patch."""
        patches = x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH)).transpose(4, 5).flatten(2, 4)
        return self.embed(patches[:, :, tokens])

    def condition(self, t: Tensor, dropped: Sequence[bool], films: int, dt: float | None, dtype: torch.dtype) -> Tensor:
        """What the gates are made of, [branches * films, F, d / 4].

        Times t [F] (0 noise, 1 clean; one for all frames, or one each); whether each branch's text is left out; `dt`: what a distilled
        network is told of the length of its steps.
        """
        y = self.t_embedder(t, dtype)
        if dt is not None:
            y = y + self.t_embedder(torch.full_like(t, dt), dtype)
        return (y + self.y_embedder.dropped_flags(dropped, y)).repeat_interleave(films, 0)

    def text_kv(self, text: Tensor) -> list[KV]:
        """Text embeddings [B, L, text_dim] -> keys and values of every layer."""
        words = self.y_embedder.y_proj_xattn(text)
        return [layer.text_kv(words) for layer in self._layers]

    def null_text(self, words: int) -> Tensor:
        """The first words of the learned caption that stands for no text, [1, words, text_dim]."""
        caption: Tensor = self.y_embedder.null_caption_embedding
        return caption[None, :words]

    def stack(self, tokens: Tensor, condition: Tensor, text: Sequence[LayerText], rope: Tensor, attend: Attend) -> Tensor:
        """All layers. tokens [B, T, d], condition [B, F, d / 4] with F dividing T; text: of every branch; rope [T, n] -> [B, T, d]."""
        for number, layer in enumerate(self._layers):
            texts = [one(number) for one in text]
            tokens = layer(tokens, condition, texts, rope, LayerAttention(attend, number))
        return tokens

    def head(self, tokens: Tensor) -> Tensor:
        """[B, T, d] -> the output per token, [B, T, 4 * channels]."""
        y: Tensor = self.final_linear.linear(self.videodit_blocks.final_layernorm(tokens).to(tokens.dtype))
        return y

    def velocity(self, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens [B, T, d] -> velocity (noise - clean) [B, 16, F, h, w]; `grid`: frames, h/2, w/2."""
        return self.unfold(self.head(tokens), grid)

    def unfold(self, y: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """What the head says, which is of clean - noise, [B, T, 4 * channels] -> [B, 16, F, h, w]."""
        f, h, w = grid
        y = -y.view(-1, f, h, w, PATCH, PATCH, self.config.channels)[..., :LATENT_CHANNELS]
        y = y.permute(0, 6, 1, 2, 4, 3, 5).reshape(-1, LATENT_CHANNELS, f, h * PATCH, w * PATCH)
        return y / RESCALE if self.config.doubled else y
