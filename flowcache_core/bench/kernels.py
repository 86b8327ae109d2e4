"""`bench kernels`: every operation of a chunk-step that is no matrix product with weights, at the sizes of released models.

Each is timed alone, in the dtype of computation, beside plain PyTorch and what `torch.compile` makes of that, and set against the ceiling that
bounds it, measured in the same process: the rate of one large copy for what moves bytes, of one large product for attention. Bytes are the
fewest that it has to move: every input read once, every output written once. On CUDA the cache is cold at every repetition.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device import device_name
from ..kernels import head_rotation, modulation, rotation, swiglu
from ..kernels.attention import SCORES_AT_MOST, attending, attention, kernel_for, products
from ..kernels.columns import column_sums, in_blocks
from ..kernels.segments import attention_with_lse, merge
from ..kernels.similarity import mean_similarity
from ..kernels.tokens import frame_difference, normalised, pooled, relative_change
from ..kernels.weighted import weighted
from ..kv.evict import select
from ..models import magi, skyreels
from ..models.magi import MagiConfig
from ..models.skyreels import HEAD_DIM, SkyReelsConfig
from .geometries import GEOMETRIES, Geometry
from .model import ceiling

NAME = "kernels"
WEIGHT = math.log(4)
COLD = 2**28
"""Bytes that are written between repetitions on CUDA, more than any cache holds."""
QUERIES = 256
"""Of a chunk, that attention is added up for."""


@dataclass(frozen=True)
class Sizes:
    """Of one branch: tokens of a chunk and of the whole window, latent frames of a chunk, height and width of one in tokens, heads of queries
    and of keys, channels between the two products of a feed-forward layer."""

    tokens: int
    keys: int
    frames: int
    grid: tuple[int, int]
    heads: int
    kv_heads: int
    ffn: int

    @classmethod
    def of(cls, geometry: Geometry) -> Sizes:
        config, frames = geometry.config, geometry.layout.chunk_frames
        height, width = (side // geometry.family.latents.multiple for side in geometry.job.picture)
        tokens, heads = frames * height * width, config.dim // HEAD_DIM
        shared = config.heads // getattr(config, "kv_heads", config.heads)
        return cls(tokens, tokens * geometry.layout.window, frames, (height, width), heads, max(heads // shared, 1), config.ffn_dim)

    @property
    def dim(self) -> int:
        return self.heads * HEAD_DIM

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * HEAD_DIM

    @property
    def latent(self) -> tuple[int, ...]:
        return 1, 16, self.frames, 2 * self.grid[0], 2 * self.grid[1]

    @property
    def cells(self) -> int:
        """Numbers of a chunk's latents."""
        return math.prod(self.latent)

    @property
    def some(self) -> int:
        """Tokens of a refresh."""
        return self.tokens // 4


New = Callable[..., Tensor]
"""Sizes -> random numbers in the dtype of computation, on the device."""


@dataclass(frozen=True)
class Operation:
    """`inputs`: what the call takes; `moved`: elements that it reads and writes at least; `products`: floating-point operations; `eager`: the
    same in plain PyTorch, where the call is, or may be, a kernel of our own; `only`: configuration of
    the networks that have it, None where all do."""

    name: str
    inputs: Callable[[Sizes, New], tuple[Any, ...]]
    call: Callable[..., Any]
    moved: Callable[[Sizes], int]
    products: Callable[[Sizes], int] | None = None
    eager: Callable[..., Any] | None = None
    only: type | None = None

    def is_of(self, geometry: Geometry) -> bool:
        return self.only is None or isinstance(geometry.config, self.only)


def _tokens(s: Sizes, new: New) -> Tensor:
    return new(1, s.tokens, s.dim)


def _keys(s: Sizes, new: New) -> Tensor:
    return new(1, s.kv_heads, s.keys, HEAD_DIM)


def _chunk_kv(s: Sizes, new: New) -> tuple[Tensor, Tensor, Tensor]:
    return new(1, s.heads, s.tokens, HEAD_DIM), _keys(s, new), _keys(s, new)


def _wan_phases(s: Sizes, new: New) -> Tensor:
    return skyreels.rope_table(0, s.frames, *s.grid, device=new(1).device)


def _magi_phases(s: Sizes, new: New) -> Tensor:
    bands = new(HEAD_DIM // 8)
    return magi.rope_table(bands, 0, s.frames, *s.grid, bands.device)


def _fresh_kv(s: Sizes, new: New) -> tuple[Tensor, Tensor, slice, Tensor, Tensor]:
    """Slots of a window, those of the newest chunk, and its keys and values as projected."""
    return _keys(s, new), _keys(s, new), slice(s.keys - s.tokens, s.keys), new(1, s.tokens, s.kv_dim), new(1, s.tokens, s.kv_dim)


def _written(write: Callable[..., None]) -> Callable[..., Tensor]:
    """The same, and what the slots of keys then hold."""

    def call(keys: Tensor, values: Tensor, at: slice, *given: Any) -> Tensor:
        write(keys, values, at, *given)
        return keys[:, :, at]

    return call


def _chosen(s: Sizes, new: New) -> Tensor:
    """A quarter of a chunk's tokens, ascending."""
    return new(s.tokens).float().topk(s.some).indices.sort().values


def _two_segments(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    half = k.shape[2] // 2
    return merge([attention_with_lse(q, k[:, :, part], v[:, :, part]) for part in (slice(half), slice(half, None))])


def _weighted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    third = k.shape[2] // 3
    return weighted(q, k, v, third, 2 * third, WEIGHT)


def _weighted_in_segments(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    third = k.shape[2] // 3
    parts = [attention_with_lse(q, k[:, :, part], v[:, :, part]) for part in (slice(third), slice(third, 2 * third), slice(2 * third, None))]
    return merge([(out, lse + WEIGHT if number == 1 else lse) for number, (out, lse) in enumerate(parts)])


def _evict(k: Tensor, scores: Tensor, protected: Tensor) -> Tensor:
    kept = select(scores, k.shape[2] // 4, protected)
    return k.gather(2, kept[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))


OPERATIONS = (
    Operation("attention to the window", _chunk_kv, attention, lambda s: 2 * (s.dim * s.tokens + s.kv_dim * s.keys),
              lambda s: 4 * s.dim * s.tokens * s.keys, products),
    Operation("the same in two segments, merged", _chunk_kv, _two_segments, lambda s: 2 * (s.dim * s.tokens + s.kv_dim * s.keys),
              lambda s: 4 * s.dim * s.tokens * s.keys),
    Operation("attention with weights, in one call", _chunk_kv, _weighted, lambda s: 2 * (s.dim * s.tokens + s.kv_dim * s.keys),
              lambda s: 4 * s.dim * s.tokens * s.keys),
    Operation("attention with weights, in segments", _chunk_kv, _weighted_in_segments, lambda s: 2 * (s.dim * s.tokens + s.kv_dim * s.keys),
              lambda s: 4 * s.dim * s.tokens * s.keys),
    Operation("norm of queries", lambda s, new: (_tokens(s, new), new(s.dim)),
              lambda x, weight: torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6), lambda s: 2 * s.tokens * s.dim, only=SkyReelsConfig),
    Operation("rotary positions", lambda s, new: (new(1, s.heads, s.tokens, HEAD_DIM), _wan_phases(s, new)), rotation.rotate,
              lambda s: 2 * s.tokens * s.dim, only=SkyReelsConfig),
    Operation("norm and rotary positions", lambda s, new: (_tokens(s, new), new(s.dim), 1e-6, _wan_phases(s, new), HEAD_DIM),
              rotation.normed_rotated, lambda s: 2 * s.tokens * s.dim, eager=rotation.in_pytorch, only=SkyReelsConfig),
    Operation("norm and rotary positions, into the cache", lambda s, new: (*_fresh_kv(s, new), new(s.kv_dim), 1e-6, _wan_phases(s, new)),
              _written(rotation.write_normed_rotated), lambda s: 4 * s.tokens * s.kv_dim, eager=_written(rotation.write_in_pytorch),
              only=SkyReelsConfig),
    Operation("norm and modulation", lambda s, new: (_tokens(s, new), new(1, s.frames, s.dim), new(1, s.frames, s.dim), 1e-6),
              modulation.normed_modulated, lambda s: 2 * s.tokens * s.dim, eager=modulation.in_pytorch, only=SkyReelsConfig),
    Operation("gate and residual", lambda s, new: (_tokens(s, new), _tokens(s, new), new(1, s.frames, s.dim)), modulation.gated,
              lambda s: 3 * s.tokens * s.dim, eager=modulation.gated_in_pytorch, only=SkyReelsConfig),
    Operation("norm of heads and rotary positions",
              lambda s, new: (_tokens(s, new), new(HEAD_DIM), new(HEAD_DIM), 1e-6, _magi_phases(s, new), HEAD_DIM),
              head_rotation.heads_normed, lambda s: 2 * s.tokens * s.dim, eager=head_rotation.in_pytorch, only=MagiConfig),
    Operation("norm of heads and rotary positions, into the cache",
              lambda s, new: (*_fresh_kv(s, new), new(HEAD_DIM), new(HEAD_DIM), 1e-6, _magi_phases(s, new)),
              _written(head_rotation.write_heads_normed), lambda s: 4 * s.tokens * s.kv_dim, eager=_written(head_rotation.write_in_pytorch),
              only=MagiConfig),
    Operation("gate, norm and residual",
              lambda s, new: (_tokens(s, new), _tokens(s, new), new(1, s.frames, s.dim).float(), new(s.dim), new(s.dim), 1e-6),
              modulation.gated_normed, lambda s: 3 * s.tokens * s.dim, eager=modulation.gated_normed_in_pytorch, only=MagiConfig),
    Operation("swiglu", lambda s, new: (new(1, s.tokens, 2 * s.ffn),), swiglu.swiglu, lambda s: 3 * s.tokens * s.ffn, eager=swiglu.in_pytorch,
              only=MagiConfig),
    Operation("gelu", lambda s, new: (new(1, s.tokens, s.ffn),), lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
              lambda s: 2 * s.tokens * s.ffn),
    Operation("writing keys into the cache", lambda s, new: (_keys(s, new), new(1, s.kv_heads, s.tokens, HEAD_DIM)),
              lambda cache, k: cache[:, :, -k.shape[2] :].copy_(k), lambda s: 2 * s.tokens * s.kv_dim),
    Operation("column sums", lambda s, new: (new(1, s.heads, QUERIES, HEAD_DIM), _keys(s, new)), column_sums,
              lambda s: s.keys * s.kv_dim, lambda s: 2 * QUERIES * s.keys * s.dim, in_blocks),
    Operation("redundancy of keys", lambda s, new: (_keys(s, new),), mean_similarity, lambda s: 2 * s.keys * s.kv_dim),
    Operation("choice of a quarter, and moving it", lambda s, new: (_keys(s, new), new(1, s.keys).float(), new(1, s.keys) > 9), _evict,
              lambda s: s.keys * s.kv_dim // 2 + s.keys),
    Operation("drift of a chunk", lambda s, new: (new(*s.latent), new(*s.latent)), relative_change, lambda s: 2 * s.cells),
    Operation("motion of tokens", lambda s, new: (new(*s.latent), new(*s.latent)[:, :, 0]),
              lambda x, before: normalised(pooled(frame_difference(x, before), (2, 2))), lambda s: s.cells),
    Operation("choice of tokens to refresh", lambda s, new: (new(s.tokens).float(), s.some),
              lambda urgency, count: urgency.topk(count, sorted=False).indices.sort().values, lambda s: 2 * s.tokens),
    Operation("gathering tokens to refresh", lambda s, new: (_tokens(s, new), _chosen(s, new)), lambda x, at: x[:, at],
              lambda s: 2 * s.some * s.dim),
    Operation("scattering refreshed rows", lambda s, new: (_tokens(s, new), _chosen(s, new), new(1, s.some, s.dim)),
              lambda x, at, fresh: x.index_copy_(1, at, fresh), lambda s: 2 * s.some * s.dim),
    Operation("scattering refreshed keys", lambda s, new: (_keys(s, new), _chosen(s, new), new(1, s.kv_heads, s.some, HEAD_DIM)),
              lambda cache, at, fresh: cache.index_copy_(2, at, fresh), lambda s: 2 * s.some * s.kv_dim),
    Operation("replay of a residual", lambda s, new: (_tokens(s, new), _tokens(s, new)), torch.add, lambda s: 3 * s.tokens * s.dim),
    Operation("extrapolation of a velocity", lambda s, new: (new(*s.latent), new(*s.latent)), lambda last, before: last + 0.5 * (last - before),
              lambda s: 3 * s.cells),
)  # fmt: skip
"""One entry for every operation, also of `kernels/`: what is listed here is timed, compared and tested."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--geometry", default="smoke", help=f"whose sizes the inputs have, one or more with commas, of {', '.join(GEOMETRIES)}; "
                        "all: all but the smokes (default %(default)s)")  # fmt: skip
    parser.add_argument("--operations", default="", help="only those whose name has this in it")
    parser.add_argument("--seconds", type=float, default=0.2, help="of repetitions per operation, after three to warm up (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="time what torch.compile makes of each, too; needs a compiler")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows"}: per geometry and operation the median in microseconds, the 20th and 80th percentile, and the rate; see `_row`. Raises ValueError
    for a name of none."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    wanted = [operation for operation in OPERATIONS if args.operations in operation.name]
    if not wanted:
        raise ValueError(f"no operation has {args.operations!r} in its name: there are {', '.join(one.name for one in OPERATIONS)}")
    pairs = [pair for pair in itertools.product(geometries(args.geometry), wanted) if pair[1].is_of(GEOMETRIES[pair[0]])]
    if not pairs:
        raise ValueError(f"{args.geometry} has no operation with {args.operations!r} in its name: choose a geometry of {', '.join(GEOMETRIES)}")
    big = device.type == "cuda"
    product, copy = ceiling(dtype, device, 8192 if big else 1024), copying(device, 2**30 if big else 2**26)
    rng = torch.Generator(device).manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device).to(dtype)

    rows, kernel = [], kernel_for(device, dtype, HEAD_DIM)
    with attending(kernel):
        for name, operation in pairs:
            sizes = Sizes.of(GEOMETRIES[name])
            rows.append({"geometry": name, **_row(operation, sizes, operation.inputs(sizes, new), args, product, copy)})
    return {
        "dtype": args.dtype, "device": device_name(device), "torch": torch.__version__, "attention": kernel.name, "cold_cache": big,
        "product_tflops": round(product / 1e12, 3), "copy_gb_s": round(copy / 1e9, 2), "rows": rows,
    }  # fmt: skip


def geometries(names: str) -> list[str]:
    """Raises ValueError for a name of none."""
    wanted = [name for name, one in GEOMETRIES.items() if not one.smoke] if names == "all" else [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in GEOMETRIES]:
        raise ValueError(f"there is no geometry {', '.join(unknown)}: choose from all, {', '.join(GEOMETRIES)}")
    return wanted


def copying(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of one large copy."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / min(timings(lambda: target.copy_(source), device, 0.2))


def _row(operation: Operation, sizes: Sizes, inputs: tuple[Any, ...], args: argparse.Namespace, product: float, copy: float) -> dict[str, Any]:
    """`of_ceiling`: the least time that a copy or a product of this size would take here, over the median; `us_eager`: of plain PyTorch, None where
    the operation is that, or for attention where key heads are shared or its scores would fill the memory; `us_compiled`: of what
    `torch.compile` makes of that."""
    device, itemsize = torch.device(args.device), getattr(torch, args.dtype).itemsize
    times = timings(lambda: operation.call(*inputs), device, args.seconds)
    median, tenths = statistics.median(times), statistics.quantiles(times, n=10)
    moved, count = operation.moved(sizes) * itemsize, operation.products(sizes) if operation.products else 0
    floor = max(moved / copy, count / product)
    return {
        "operation": operation.name, "us": round(median * 1e6, 1), "us_p20": round(tenths[1] * 1e6, 1), "us_p80": round(tenths[7] * 1e6, 1),
        "gb_s": round(moved / median / 1e9, 2), "tflops": round(count / median / 1e12, 3), "of_ceiling": round(floor / median, 3),
        "bound": "product" if count / product > moved / copy else "copy", **_beside(operation, sizes, inputs, args),
    }  # fmt: skip


def _beside(operation: Operation, sizes: Sizes, inputs: tuple[Any, ...], args: argparse.Namespace) -> dict[str, float | None]:
    device, plain = torch.device(args.device), operation.eager
    if plain is products and (sizes.heads != sizes.kv_heads or sizes.heads * sizes.tokens * sizes.keys > SCORES_AT_MOST):
        plain = None
    others = {"us_eager": plain, **({"us_compiled": torch.compile(plain or operation.call)} if args.compile else {})}
    return {name: one and round(statistics.median(_timed(one, inputs, device, args.seconds)) * 1e6, 1) for name, one in others.items()}


def _timed(call: Callable[..., Any], inputs: tuple[Any, ...], device: torch.device, seconds: float) -> list[float]:
    return timings(lambda: call(*inputs), device, seconds)


def timings(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds of every repetition, at least five: by the device's clock, with a cold cache, on CUDA."""
    for _ in range(3):
        call()
    return list(_on_cuda(call, device, seconds) if device.type == "cuda" else _on_processor(call, seconds))


def _on_processor(call: Callable[[], object], seconds: float) -> Iterator[float]:
    end, count = time.perf_counter() + seconds, 0
    while count < 5 or time.perf_counter() < end:
        began, count = time.perf_counter(), count + 1
        call()
        yield time.perf_counter() - began


def _on_cuda(call: Callable[[], object], device: torch.device, seconds: float) -> Iterator[float]:
    cold, stream = torch.empty(COLD, dtype=torch.uint8, device=device), torch.cuda.current_stream(device)
    end, count = time.perf_counter() + seconds, 0
    while count < 5 or time.perf_counter() < end:
        cold.zero_()
        begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        call()
        done.record(stream)
        done.synchronize()
        count += 1
        yield begin.elapsed_time(done) / 1000
