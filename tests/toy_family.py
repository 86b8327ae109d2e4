"""A family for tests, as unlike the first as the seam allows, in one file: chunks of 6 latent frames, films of 4n frames, three branches of
guidance inside the run, a text for every chunk, grouped-query heads, a range of history that depends on step and branch, a commit level
above 0. Nothing elsewhere knows of it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowcache_core.models.adapter import Call
from flowcache_core.models.family import Bundled, ChunkLayout, Family, Latents, Loaders, Shapes
from flowcache_core.network import Attend, Rotary
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.frames import Frames

CHANNELS, PATCH, HEAD_DIM = 16, 2, 8


@dataclass(frozen=True)
class ToyConfig:
    dim: int
    layers: int
    text_dim: int
    kv_heads: int

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM


class Block(nn.Module):
    def __init__(self, config: ToyConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        d, kv = config.dim, config.kv_heads * HEAD_DIM
        self.q, self.k, self.v, self.o = ops.Linear(d, d, **kw), ops.Linear(d, kv, **kw), ops.Linear(d, kv, **kw), ops.Linear(d, d, **kw)
        self.time, self.text = ops.Linear(1, d, **kw), ops.Linear(d, d, **kw)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, rope: Tensor, attend: Any) -> Tensor:
        y = torch.nn.functional.layer_norm(x, x.shape[-1:]) + self.time(t) + self.text(text)
        q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in (self.q(y), self.k(y), self.v(y)))
        out: Tensor = self.o(attend(turned(q, rope), turned(k, rope), v, y).transpose(1, 2).flatten(2))
        return x + torch.tanh(out)


class ToyNet(nn.Module):
    def __init__(self, config: ToyConfig, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype or torch.get_default_dtype()
        kw, d = {"device": device, "dtype": dtype}, config.dim
        self.toy_in = operations.Linear(CHANNELS * PATCH * PATCH, d, **kw)
        self.toy_text = operations.Linear(config.text_dim, d, **kw)
        self.toy_null = nn.Parameter(torch.empty(1, config.text_dim, **kw))
        self.blocks = nn.ModuleList(Block(config, operations, **kw) for _ in range(config.layers))
        self.toy_out = operations.Linear(d, CHANNELS * PATCH * PATCH, **kw)

    def stack(self, tokens: Tensor, t: Tensor, text: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, t, text, rope, lambda q, k, v, x, layer=layer: attend(layer, q, k, v, x))
        return tokens


def turned(x: Tensor, phases: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phases).flatten(-2).type_as(x)


class TimeRotary:
    """Positions turn along time alone."""

    def phases(self, start: int, frames: int, grid: tuple[int, int]) -> Tensor:
        angle = torch.arange(start, start + frames)[:, None] * 0.3 ** torch.arange(HEAD_DIM // 2)
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64).repeat_interleave(math.prod(grid), 0)

    def shift(self, frames: int) -> Tensor:
        return self.phases(frames, 1, (1, 1))

    def turn(self, x: Tensor, phases: Tensor) -> Tensor:
        return turned(x, phases.to(x.device))


class ToyAdapter:
    name: ClassVar[str] = "toy"

    def __init__(self, network: Any, dtype: torch.dtype | None = None) -> None:
        self.network, self.dtype = network, dtype or network.dtype
        config = network.config
        self.layers, self.heads, self.head_dim, self.width = config.layers, config.kv_heads, HEAD_DIM, config.dim
        self.query_heads, self.text_channels = config.heads, config.dim
        self.rotary: Rotary = TimeRotary()
        self.calls: list[tuple[Chunk, float, int]] = []
        """(chunk, timestep, branches) of every evaluation."""

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        if height % PATCH or width % PATCH:
            raise ValueError(f"latents of {width}x{height} do not divide into patches of {PATCH}")
        return height // PATCH, width // PATCH

    def tokens_per_frame(self, height: int, width: int) -> int:
        return math.prod(self.token_grid(height, width))

    def text(self, context: Tensor) -> Tensor:
        return self.network.toy_text(context)

    def text_of(self, text: Tensor, chunk: Chunk, chunks: int) -> Tensor:
        """Another first word for every chunk: how much of the film is left."""
        return text.mean(1, keepdim=True) + 0.1 * (chunks - chunk.index)

    def branch_texts(self, context: Tensor, branches: Sequence[str]) -> Tensor:
        null = self.network.toy_null.to(context).expand(len(context), 1, -1)
        whole = context.mean(1, keepdim=True)
        return torch.cat([whole if branch == "text" else null for branch in branches])

    def words(self, prompt: int, branches: Sequence[str]) -> int:
        return len(branches)

    def seen(self, chunk: Chunk, branch: Hashable) -> int | None:
        return 1 if branch == "alone" else self.reach(chunk)

    def reach(self, chunk: Chunk) -> int | None:
        if chunk.committing:
            return 1
        return 3 if chunk.step < chunk.steps // 2 else 2

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        grid = (call.chunk.frames, *self.token_grid(*call.x.shape[3:]))
        tokens = self._embed(call.x)
        out = self._run(call, tokens, self.rotary.phases(call.chunk.start, grid[0], grid[1:]), attend)
        return self._unfold(self.network.toy_out(out), grid), out - tokens

    def refresh(self, call: Call, tokens: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        grid = (call.chunk.frames, *self.token_grid(*call.x.shape[3:]))
        some = self._embed(call.x)[:, tokens]
        out = self._run(call, some, self.rotary.phases(call.chunk.start, grid[0], grid[1:])[tokens], attend)
        patches = self.network.toy_out(out)
        whole = patches.new_zeros(len(patches), math.prod(grid), patches.shape[2]).index_copy_(1, tokens, patches)
        return self._unfold(whole, grid), out - some

    def replay(self, call: Call, residual: Tensor) -> Tensor:
        grid = (call.chunk.frames, *self.token_grid(*call.x.shape[3:]))
        return self._unfold(self.network.toy_out(self.output(call, residual)), grid)

    def output(self, call: Call, residual: Tensor) -> Tensor:
        return self._embed(call.x) + residual

    def _run(self, call: Call, tokens: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        timestep = TOY.noise.timestep(call.sigma)
        self.calls.append((call.chunk, timestep, len(call.x)))
        t = torch.full((1, 1, 1), timestep).to(tokens)
        return self.network.stack(tokens, t, call.text, rope.to(tokens.device), attend)

    def _embed(self, x: Tensor) -> Tensor:
        patches = x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [B, C, F, h, p, w, p]
        return self.network.toy_in(patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3).to(self.dtype))

    def _unfold(self, y: Tensor, grid: tuple[int, int, int]) -> Tensor:
        f, h, w = grid
        y = y.view(-1, f, h, w, CHANNELS, PATCH, PATCH)
        return y.permute(0, 4, 1, 2, 5, 3, 6).reshape(-1, CHANNELS, f, h * PATCH, w * PATCH)


@dataclass(frozen=True)
class ToyNoise:
    """Clean at time 1; committed chunks are shown at a little noise."""

    shift: float = 3.0
    commit: float = 0.05

    def levels(self, steps: int, shift: float, denoise: float = 1.0) -> tuple[float, ...]:
        return (*((1 - (i / steps) ** 2) * denoise for i in range(steps)), 0.0)

    def timestep(self, sigma: float) -> float:
        return 1 - sigma


@dataclass(frozen=True)
class ThreeBranches:
    """(1 - p) alone + (p - w) null + w text; p and w fall with the noise."""

    inside: bool = True

    def branches(self, scale: float) -> tuple[str, ...]:
        return "text", "null", "alone"

    def needed(self, scale: float, sigma: float) -> tuple[str, ...]:
        return self.branches(scale)

    def remembered(self, scale: float) -> tuple[str, ...]:
        return self.branches(scale)

    def combine(self, velocities: Sequence[Tensor], scale: float, sigma: float) -> Tensor:
        text, null, alone = velocities
        p, w = (1.5, scale) if sigma > 0.5 else (1.0, 1.0)
        return (1 - p) * alone + (p - w) * null + w * text


def config_of(shapes: Shapes, name: str) -> ToyConfig:
    layers = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks."))
    return ToyConfig(shapes["toy_in.weight"][0], layers, shapes["toy_text.weight"][1], shapes["blocks.0.k.weight"][0] // HEAD_DIM)


def original_names(keys: Iterable[str], keep: Iterable[str] = ()) -> dict[str, str]:
    return {key: key for key in keys}


def words(prompt: str, width: int) -> Tensor:
    return torch.randn(1, 4, width, generator=torch.Generator().manual_seed(sum(map(ord, prompt))))


def no_vae(state: Mapping[str, Tensor]) -> nn.Module:
    return nn.Identity()


TOY = Family(
    name="toy", title="Toy", network=ToyNet, adapter=ToyAdapter, original_names=original_names,
    claims=lambda shapes: "toy_in.weight" in shapes, config_of=config_of, release=lambda config: "Toy",
    layout=ChunkLayout(chunk_frames=6, window=4, fps=24, causal=True), frames=Frames(4, 4), latents=Latents(CHANNELS, 8, PATCH, "Wan21"),
    noise=ToyNoise(), guidance=ThreeBranches(), rates=(24,), takes_rate=lambda config: False,
    loaders=Loaders("Load Toy Text", "Load Toy VAE"), bundled=Bundled("toy", "toy", no_vae, words),
)  # fmt: skip


def toy_network(text_dim: int = 8, seed: int = 0) -> ToyNet:
    torch.manual_seed(seed)
    network = ToyNet(ToyConfig(32, 2, text_dim, 2))
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    return network.eval().requires_grad_(False)
