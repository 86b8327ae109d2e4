"""SkyReels-V2 diffusion forcing: the Wan 2.1 transformer with a noise level per latent frame and an embedding for the frame rate.

The network knows neither chunks nor caches. Whoever calls it hands over `attend`, which receives the rotated queries
and keys of one layer and returns the attention output: bidirectional, block-causal, or against a KV cache.
Parameter names are those of the released checkpoints (`blocks.0.self_attn.q.weight`, `fps_projection.2.bias`, ...).
Architecture: Wan 2.1 report section 4.2, SkyReels-V2 report section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.modulation import gated
from ..kernels.rotation import rotate
from ..network import Attend, LayerAttention
from .layers import Attention, attended, by_heads, fed_forward, modulated_norm, projected, turned

PATCH = 2
HEAD_DIM = 128
FREQUENCIES = 256
EPS = 1e-6
FPS = (16, 24)
"""Frame rates in the order of their rows in `fps_embedding`."""

TextKV = Sequence[tuple[Tensor, Tensor]]
"""Per layer: text keys and values, [B, heads, L, head_dim]."""

WIDEST, DEEPEST = 1 << 20, 256
"""Sizes and layers beyond any model: a file that says more would only keep the machine busy."""


@dataclass(frozen=True, slots=True)
class SkyReelsConfig:
    """Sizes, all of them readable from the shapes of a checkpoint."""

    dim: int
    ffn_dim: int
    layers: int
    text_dim: int = 4096
    channels: int = 16
    fps: bool = False

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> SkyReelsConfig:
        """`shapes`: key -> shape. Raises ValueError with the reason when they are not those of this network."""
        missing = [k for k in ("patch_embedding.weight", "text_embedding.0.weight", "blocks.0.ffn.0.weight", "head.modulation") if k not in shapes]
        if missing:
            raise ValueError(f"this is not a SkyReels-V2 or Wan 2.1 checkpoint: it has no {missing[0]}")
        for key, axes in (("patch_embedding.weight", 5), ("text_embedding.0.weight", 2), ("blocks.0.ffn.0.weight", 2)):
            if len(shapes[key]) != axes or not all(1 <= size <= WIDEST for size in shapes[key]):
                raise ValueError(f"this is not a whole SkyReels-V2 checkpoint: {key} has shape {shapes[key]}; download it again")
        dim, channels = shapes["patch_embedding.weight"][:2]
        if dim % HEAD_DIM:
            raise ValueError(f"the width {dim} is not a multiple of {HEAD_DIM}, the size of a head in this family")
        layers = 1 + max(int(number) for number in (k.split(".")[1] for k in shapes if k.startswith("blocks.")) if number.isdecimal())
        if layers > DEEPEST:
            raise ValueError(
                f"this is not a SkyReels-V2 checkpoint: a key names block {layers - 1}, and at most {DEEPEST} are known; choose another file"
            )
        return cls(dim, shapes["blocks.0.ffn.0.weight"][0], layers, shapes["text_embedding.0.weight"][1], channels,
                   "fps_embedding.weight" in shapes)  # fmt: skip


class SelfAttention(nn.Module):
    def __init__(self, dim: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (ops.Linear(dim, dim, **kw) for _ in range(4))
        self.norm_q, self.norm_k = (ops.RMSNorm(dim, eps=EPS, **kw) for _ in range(2))

    def forward(self, x: Tensor, rope: Tensor, attend: Attention) -> Tensor:
        q = turned(self.norm_q, projected(self.q, x), rope, HEAD_DIM)
        y = attended(attend, q, self.norm_k, projected(self.k, x), projected(self.v, x), x, rope, HEAD_DIM)
        return projected(self.o, y.transpose(1, 2).flatten(2))


class CrossAttention(SelfAttention):
    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, dim] -> keys and values [B, heads, L, head_dim], the same at every step of a run."""
        return by_heads(self.norm_k(self.k(text)), HEAD_DIM), by_heads(self.v(text), HEAD_DIM)

    def look_up(self, x: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        q = turned(self.norm_q, projected(self.q, x), None, HEAD_DIM)
        return projected(self.o, attention(q, *kv).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, ffn_dim: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.norm1 = ops.LayerNorm(dim, eps=EPS, elementwise_affine=False, **kw)
        self.self_attn = SelfAttention(dim, ops, **kw)
        self.norm3 = ops.LayerNorm(dim, eps=EPS, elementwise_affine=True, **kw)
        self.cross_attn = CrossAttention(dim, ops, **kw)
        self.norm2 = ops.LayerNorm(dim, eps=EPS, elementwise_affine=False, **kw)
        self.ffn = nn.Sequential(ops.Linear(dim, ffn_dim, **kw), nn.GELU(approximate="tanh"), ops.Linear(ffn_dim, dim, **kw))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim, **kw))

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.cross_attn.text_kv(text)

    def forward(self, x: Tensor, e0: Tensor, text: tuple[Tensor, Tensor], rope: Tensor, attend: Attention) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation.to(e0) + e0).unbind(2)
        x = gated(x, self.self_attn(modulated_norm(self.norm1, x, shift_a, scale_a), rope, attend), gate_a)
        x = x + self.cross_attn.look_up(self.norm3(x), text)
        return gated(x, fed_forward(self.ffn, modulated_norm(self.norm2, x, shift_f, scale_f)), gate_f)


class Head(nn.Module):
    def __init__(self, dim: int, out: int, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.norm = ops.LayerNorm(dim, eps=EPS, elementwise_affine=False, **kw)
        self.head = ops.Linear(dim, out, **kw)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim, **kw))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation.to(e) + e.unsqueeze(2)).unbind(2)
        y: Tensor = self.head(modulated_norm(self.norm, x, shift, scale))
        return y


class Rope:
    """Rotary positions of the family, as `network.Rotary` wants them."""

    def phases(self, start: int, frames: int, grid: tuple[int, int]) -> Tensor:
        return rope_table(start, frames, *grid)

    @staticmethod
    @lru_cache(maxsize=1024)
    def shift(frames: int) -> Tensor:
        return rope_table(frames, 1, 1, 1)

    def turn(self, x: Tensor, phases: Tensor) -> Tensor:
        return rotate(x, phases.to(x.device))


def rope_table(start: int, frames: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Phases of a grid of tokens, complex64 [frames * height * width, head_dim / 2]; `start`: position of the first frame.

    The head is split 44/42/42 between time, height and width; base 10000 each.
    """
    side = 2 * (HEAD_DIM // 6)
    phases = []
    for axis, (first, count, size) in enumerate(((start, frames, HEAD_DIM - 2 * side), (0, height, side), (0, width, side))):
        shape = [1, 1, 1, size // 2]
        shape[axis] = count
        phases.append(_axis_phases(first, count, size, device).view(shape).expand(frames, height, width, -1))
    return torch.cat(phases, -1).flatten(0, 2)


def _axis_phases(first: int, count: int, size: int, device: torch.device | str) -> Tensor:
    """Of the places `first`.. along one axis that has `size` channels of the head: complex64 [count, size / 2], made where it is needed."""
    where = torch.arange(first, first + count, dtype=torch.float64, device=device)
    angles = torch.outer(where, 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64, device=device) / size))
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def sinusoid(t: Tensor) -> Tensor:
    """Timesteps of any shape -> [..., 256]: 128 cosines, then 128 sines."""
    half = FREQUENCIES // 2
    angle = t.double().unsqueeze(-1) * torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device, dtype=torch.float64) / half)
    return torch.cat([angle.cos(), angle.sin()], -1)


class SkyReelsV2(nn.Module):
    """The transformer. `operations` supplies Linear, LayerNorm, RMSNorm, Conv3d and Embedding; torch.nn is the default."""

    def __init__(self, config: SkyReelsConfig, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype or torch.get_default_dtype()
        kw, d = {"device": device, "dtype": dtype}, config.dim
        self.patch_embedding = operations.Conv3d(config.channels, d, (1, PATCH, PATCH), stride=(1, PATCH, PATCH), **kw)
        self.text_embedding = nn.Sequential(operations.Linear(config.text_dim, d, **kw), nn.GELU(approximate="tanh"), operations.Linear(d, d, **kw))
        self.time_embedding = nn.Sequential(operations.Linear(FREQUENCIES, d, **kw), nn.SiLU(), operations.Linear(d, d, **kw))
        self.time_projection = nn.Sequential(nn.SiLU(), operations.Linear(d, 6 * d, **kw))
        if config.fps:
            self.fps_embedding = operations.Embedding(2, d, **kw)
            self.fps_projection = nn.Sequential(operations.Linear(d, d, **kw), nn.SiLU(), operations.Linear(d, 6 * d, **kw))
        self.blocks = nn.ModuleList(Block(d, config.ffn_dim, operations, **kw) for _ in range(config.layers))
        self.head = Head(d, config.channels * PATCH * PATCH, operations, **kw)

    @property
    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def embed(self, x: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] -> tokens [B, F * h/2 * w/2, d], a token's channels side by side, as all that is added to them stays."""
        tokens: Tensor = self.patch_embedding(x)
        return tokens.flatten(2).transpose(1, 2).contiguous()

    def embed_some(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The same for the listed tokens [n] alone -> [B, n, d]: their patches pass through as so many frames of one patch."""
        patches = x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH)).transpose(4, 5).flatten(2, 4)
        return self.embed(patches[:, :, tokens])

    def modulation(self, t: Tensor, fps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Timesteps [B, F] (0..1000; F may be 1 for one level all over) -> for the head [B, F, d], for the blocks [B, F, 6, d]."""
        e: Tensor = self.time_embedding(sinusoid(t).to(dtype))
        e0: Tensor = self.time_projection(e).unflatten(-1, (6, -1))
        if self.config.fps:
            which = torch.full((1, 1), FPS.index(fps), dtype=torch.long, device=t.device)
            e0 = e0 + self.fps_projection(self.fps_embedding(which).to(e)).unflatten(-1, (6, -1))
        return e, e0

    def text_kv(self, text: Tensor) -> TextKV:
        """Text embeddings [B, L, text_dim] -> keys and values of every layer."""
        hidden = self.text_embedding(text)
        return [block.text_kv(hidden) for block in self._blocks]

    def stack(self, tokens: Tensor, e0: Tensor, text: TextKV, rope: Tensor, attend: Attend) -> Tensor:
        """All blocks. tokens [B, T, d], e0 [B, F, 6, d] with F dividing T, rope [T, 64] -> [B, T, d]."""
        for layer, block in enumerate(self._blocks):
            tokens = self.through(layer, block, tokens, e0, text[layer], rope, LayerAttention(attend, layer))
        return tokens

    def through(self, layer: int, block: Block, tokens: Tensor, e0: Tensor, text: tuple[Tensor, Tensor], rope: Tensor, attend: Attention) -> Tensor:
        """One block; a host may put something else in its place."""
        out: Tensor = block(tokens, e0, text, rope, attend)
        return out

    def velocity(self, tokens: Tensor, e: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens [B, T, d] -> velocity (noise - clean) [B, C, F, h, w]; `grid`: frames, h/2, w/2."""
        return self.unfold(self.head(tokens, e), grid)

    def unfold(self, y: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """What the head says per token [B, T, 4 C] -> [B, C, F, h, w]."""
        f, h, w = grid
        y = y.view(-1, f, h, w, 1, PATCH, PATCH, self.config.channels)
        return y.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(-1, self.config.channels, f, h * PATCH, w * PATCH)

    def forward(self, x: Tensor, t: Tensor, text: TextKV, attend: Attend, start: int = 0, fps: int = 24) -> Tensor:
        """Latents [B, C, F, h, w] at timesteps t [B, F or 1] -> velocity, same shape. `start`: position of the first frame."""
        grid = (x.shape[2], x.shape[3] // PATCH, x.shape[4] // PATCH)
        e, e0 = self.modulation(t, fps, x.dtype)
        rope = rope_table(start, *grid, device=x.device)
        return self.velocity(self.stack(self.embed(x), e0, text, rope, attend), e, grid)

    @torch.no_grad()
    def initialise(self) -> None:
        """Fresh weights for training: Xavier matrices, zero output and frame-rate projections, as upstream starts."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for part in (self.time_embedding, self.text_embedding):
            for module in part:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02 if part is self.time_embedding else 1 / math.sqrt(module.in_features))
        for block in self._blocks:
            nn.init.normal_(block.modulation, std=self.config.dim**-0.5)
        nn.init.normal_(self.head.modulation, std=self.config.dim**-0.5)
        nn.init.zeros_(self.head.head.weight)
        if self.config.fps:
            nn.init.zeros_(cast(nn.Linear, self.fps_projection[2]).weight)
