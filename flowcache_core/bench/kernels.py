"""`bench kernels`: every operation of a chunk-step that is no matrix product with weights, at the sizes of released models.

Each is timed alone, in the dtype of computation, beside what `torch.compile` makes of it, and set against the ceiling that bounds it, measured in
the same process: the rate of one large copy for what moves bytes, of one large product for attention. Bytes are the fewest that
it has to move: every input read once, every output written once. On CUDA the cache is cold at every repetition.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device import device_name
from ..kernels.attention import attending, attention, kernel_for
from ..kernels.columns import column_sums, in_blocks
from ..kernels.segments import attention_with_lse, merge
from ..kernels.similarity import mean_similarity
from ..kernels.weighted import weighted
from ..kv.evict import select
from ..models.skyreels import HEAD_DIM, gated, modulated, rope_table, rotate
from .model import GEOMETRIES, Geometry, ceiling

NAME = "kernels"
WEIGHT = math.log(4)
COLD = 2**28
"""Bytes that are written between repetitions on CUDA, more than any cache holds."""


@dataclass(frozen=True)
class Sizes:
    """Of one branch: tokens of a chunk and of the whole window, latent frames of a chunk, heads."""

    tokens: int
    keys: int
    frames: int
    grid: tuple[int, int]
    heads: int

    @classmethod
    def of(cls, geometry: Geometry) -> Sizes:
        height, width = (side // 16 for side in geometry.job.picture)
        frames = geometry.layout.chunk_frames
        tokens = frames * height * width
        return cls(tokens, tokens * geometry.layout.window, frames, (height, width), geometry.config.heads)

    @property
    def dim(self) -> int:
        return self.heads * HEAD_DIM


@dataclass(frozen=True)
class Operation:
    """`make`: inputs -> the call that is timed; `moved`: elements that it reads and writes at least; `products`: floating-point operations."""

    name: str
    inputs: Callable[[Sizes, Callable[..., Tensor]], tuple[Any, ...]]
    call: Callable[..., Any]
    moved: Callable[[Sizes], int]
    products: Callable[[Sizes], int] | None = None


def _tokens(s: Sizes, new: Callable[..., Tensor]) -> Tensor:
    return new(1, s.tokens, s.dim)


def _chunk_kv(s: Sizes, new: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return new(1, s.heads, s.tokens, HEAD_DIM), new(1, s.heads, s.keys, HEAD_DIM), new(1, s.heads, s.keys, HEAD_DIM)


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
    Operation("attention to the window", _chunk_kv, attention, lambda s: 2 * s.dim * (s.tokens + s.keys), lambda s: 4 * s.dim * s.tokens * s.keys),
    Operation("the same in two segments, merged", _chunk_kv, _two_segments, lambda s: 2 * s.dim * (s.tokens + s.keys),
              lambda s: 4 * s.dim * s.tokens * s.keys),
    Operation("attention with weights, in one call", _chunk_kv, _weighted, lambda s: 2 * s.dim * (s.tokens + s.keys),
              lambda s: 4 * s.dim * s.tokens * s.keys),
    Operation("attention with weights, in segments", _chunk_kv, _weighted_in_segments, lambda s: 2 * s.dim * (s.tokens + s.keys),
              lambda s: 4 * s.dim * s.tokens * s.keys),
    Operation("norm of queries", lambda s, new: (_tokens(s, new), new(s.dim)),
              lambda x, weight: torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6), lambda s: 2 * s.tokens * s.dim),
    Operation("rotary positions", lambda s, new: (new(1, s.heads, s.tokens, HEAD_DIM), rope_table(0, s.frames, *s.grid, device=new(1).device)),
              rotate, lambda s: 2 * s.tokens * s.dim),
    Operation("norm and modulation", lambda s, new: (_tokens(s, new), new(1, s.frames, s.dim), new(1, s.frames, s.dim)),
              lambda x, shift, scale: modulated(torch.nn.functional.layer_norm(x, x.shape[-1:]), shift, scale), lambda s: 2 * s.tokens * s.dim),
    Operation("gate and residual", lambda s, new: (_tokens(s, new), _tokens(s, new), new(1, s.frames, s.dim)), gated, lambda s: 3 * s.tokens * s.dim),
    Operation("gelu", lambda s, new: (new(1, s.tokens, 4 * s.dim),), lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
              lambda s: 8 * s.tokens * s.dim),
    Operation("writing keys into the cache", lambda s, new: (new(1, s.heads, s.keys, HEAD_DIM), new(1, s.heads, s.tokens, HEAD_DIM)),
              lambda cache, k: cache[:, :, -k.shape[2] :].copy_(k), lambda s: 2 * s.tokens * s.dim),
    Operation("column sums, Triton where it is", lambda s, new: (new(1, s.heads, 256, HEAD_DIM), new(1, s.heads, s.keys, HEAD_DIM)), column_sums,
              lambda s: s.keys * s.dim, lambda s: 2 * 256 * s.keys * s.dim),
    Operation("column sums, PyTorch", lambda s, new: (new(1, s.heads, 256, HEAD_DIM), new(1, s.heads, s.keys, HEAD_DIM)), in_blocks,
              lambda s: s.keys * s.dim, lambda s: 2 * 256 * s.keys * s.dim),
    Operation("redundancy of keys", lambda s, new: (new(1, s.heads, s.keys, HEAD_DIM),), mean_similarity, lambda s: 2 * s.keys * s.dim),
    Operation("choice of a quarter, and moving it",
              lambda s, new: (new(1, s.heads, s.keys, HEAD_DIM), new(1, s.keys).float(), new(1, s.keys) > 9), _evict,
              lambda s: s.keys * s.dim // 2 + s.keys),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="smoke", help="whose sizes the inputs have (default %(default)s)")
    parser.add_argument("--operations", default="", help="only those whose name has this in it")
    parser.add_argument("--seconds", type=float, default=0.5, help="of repetitions per operation, after three to warm up (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="time what torch.compile makes of each, too; needs a compiler")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows"}: per operation the median in microseconds, the 20th and 80th percentile, and the rate. Raises ValueError for a name of none."""
    device, dtype, sizes = torch.device(args.device), getattr(torch, args.dtype), Sizes.of(GEOMETRIES[args.geometry])
    wanted = [operation for operation in OPERATIONS if args.operations in operation.name]
    if not wanted:
        raise ValueError(f"no operation has {args.operations!r} in its name: there are {', '.join(one.name for one in OPERATIONS)}")
    big = device.type == "cuda"
    product, copy = ceiling(dtype, device, 8192 if big else 1024), copying(device, 2**30 if big else 2**26)
    rng = torch.Generator(device).manual_seed(0)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device).to(dtype)

    kernel = kernel_for(device, dtype, HEAD_DIM)
    with attending(kernel):
        rows = [_row(operation, sizes, operation.inputs(sizes, new), args, product, copy) for operation in wanted]
    return {
        "geometry": args.geometry, "dtype": args.dtype, "device": device_name(), "torch": torch.__version__, "attention": kernel.name,
        "product_tflops": round(product / 1e12, 3), "copy_gb_s": round(copy / 1e9, 2), "rows": rows,
    }  # fmt: skip


def copying(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of one large copy."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / min(timings(lambda: target.copy_(source), device, 0.2))


def _row(operation: Operation, sizes: Sizes, inputs: tuple[Any, ...], args: argparse.Namespace, product: float, copy: float) -> dict[str, Any]:
    device, itemsize = torch.device(args.device), getattr(torch, args.dtype).itemsize
    times = timings(lambda: operation.call(*inputs), device, args.seconds)
    median, tenths = statistics.median(times), statistics.quantiles(times, n=10)
    moved, products = operation.moved(sizes) * itemsize, operation.products(sizes) if operation.products else 0
    floor = max(moved / copy, products / product)
    row = {
        "operation": operation.name, "us": round(median * 1e6, 1), "us_p20": round(tenths[1] * 1e6, 1), "us_p80": round(tenths[7] * 1e6, 1),
        "gb_s": round(moved / median / 1e9, 2), "tflops": round(products / median / 1e12, 3), "of_ceiling": round(floor / median, 3),
        "bound": "product" if products / product > moved / copy else "copy",
    }  # fmt: skip
    if args.compile:
        compiled = torch.compile(operation.call)
        row["us_compiled"] = round(statistics.median(timings(lambda: compiled(*inputs), device, args.seconds)) * 1e6, 1)
    return row


def timings(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Seconds of every repetition, at least five: by the device's clock, with a cold cache, on CUDA."""
    for _ in range(3):
        call()
    return list(_on_cuda(call, seconds) if device.type == "cuda" else _on_processor(call, seconds))


def _on_processor(call: Callable[[], object], seconds: float) -> Iterator[float]:
    end, count = time.perf_counter() + seconds, 0
    while count < 5 or time.perf_counter() < end:
        began, count = time.perf_counter(), count + 1
        call()
        yield time.perf_counter() - began


def _on_cuda(call: Callable[[], object], seconds: float) -> Iterator[float]:
    cold, end, count = torch.empty(COLD, dtype=torch.uint8, device="cuda"), time.perf_counter() + seconds, 0
    while count < 5 or time.perf_counter() < end:
        cold.zero_()
        begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        done.record()
        done.synchronize()
        count += 1
        yield begin.elapsed_time(done) / 1000
