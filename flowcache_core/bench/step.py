"""`bench step`: how near the network of a bundled model comes to the rate of the processor's matrix products.

An uncached film is made, and one large product is timed before and after every evaluation of the network, in the same dtype and on the same threads:
what else the machine does slows both. Beside it, in turn, the same network whose layers are called one by one, as they are where somebody has hooked
them. Floating-point operations are counted by formula from the shapes of every product. Their part of the
product's rate says how much of the time goes into what is no product: norms, rotary positions, activations, copies.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..device import fast_dtype
from ..models.adapter import Call, ModelAdapter, RowAdapter
from ..models.bundle import BUNDLED, Bundle, load_bundle, weights_id
from ..models.bundle import NAME as BUNDLED_NAME
from ..network import Attend
from ..run.generate import Job, generate
from ..show.metrics import mean_and_error
from .around import Around
from .measured import STEP, data, origin, table
from .model import counter
from .prompts import PROMPTS

NAME = "step"
SIDE = 1024
FILMS = 12
Span = tuple[float, float]
"""Seconds of an evaluation, and of the product beside it."""
KINDS = {
    "products": ("addmm", "mm", "bmm", "baddbmm", "_linear_pointwise", "mkldnn_convolution", "_scaled_dot_product_flash_attention_for_cpu"),
    "softmax": ("_softmax",),
    "activations": ("gelu", "silu", "tanh", "silu_mul"),
    "norms": ("native_layer_norm", "linalg_vector_norm", "pow", "mean", "rsqrt", "rsqrt_", "div_", "sum"),
    "multiplications and additions": ("mul", "mul_", "add", "add_", "addcmul", "addcmul_", "sub"),
    "copies": ("copy_", "cat", "index_select", "index_copy_", "clone"),
}
"""Operators of PyTorch, without their namespace, by what they are for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=tuple(BUNDLED), default=BUNDLED_NAME, help="which of the bundled models (default %(default)s)")
    parser.add_argument("--frames", type=int, default=57, help="pixel frames (default %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps per chunk (default %(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="films of each arm (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: the one that the demo uses here")


class Evaluations(Around):
    """Notes of every evaluation what `before`, asked ahead of it, and `after` give."""

    def __init__(self, inner: ModelAdapter, before: Callable[[], float], after: Callable[[], float]) -> None:
        super().__init__(inner)
        self.before, self.after = before, after
        self.noted: list[tuple[float, float]] = []

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        with self._noting():
            return self.inner.forward(call, attend)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        first = self.before()
        yield
        self.noted.append((first, self.after()))


class RowEvaluations(Evaluations):
    """The same of an adapter that takes rows in one pass, each of which is an evaluation."""

    def forward_row(self, calls: Sequence[Call], attend: Attend) -> Tensor:
        with self._noting():
            return cast(RowAdapter, self.inner).forward_row(calls, attend)


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows"}: one for each arm; see `row`. Raises ValueError for a film that the model does not make."""
    if args.turns < 1:
        raise ValueError(f"{args.turns} turns were asked for: use at least 1")
    threads, dtype = torch.get_num_threads(), getattr(torch, args.dtype) if args.dtype else fast_dtype()
    torch.set_num_threads(args.threads)
    try:
        family = BUNDLED[args.model]
        clock = time.thread_time if args.threads == 1 else time.perf_counter
        bundle, job = load_bundle(dtype, family=family), Job.usual(family, PROMPTS[0], frames=args.frames, steps=args.steps)
        rows = measured(bundle, job, args.turns, dtype, clock)
    finally:
        torch.set_num_threads(threads)
    named = {"model": args.model, "threads": args.threads, "dtype": str(dtype).removeprefix("torch.")}
    return {"model": args.model, "weights": weights_id(family), "torch": torch.__version__, "rows": [{**named, **values} for values in rows]}


def measured(bundle: Bundle, job: Job, turns: int, dtype: torch.dtype, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """A row for each of `ARMS`, which take turns. `to_float32`: how far the latents of two chunks are from those in float32, as a part of
    their norm, mean and standard error over `FILMS` prompts."""
    short, spans = replace(job, frames=bundle.family.frames.pixel(bundle.layout.chunk_frames * 2)), {arm: list[Span]() for arm in ARMS}
    for arm in (*ARMS,) * turns:
        with ARMS[arm](bundle):
            spans[arm] += timed(bundle, job, dtype, clock)
    shorts = [replace(short, prompt=prompt, seed=seed) for seed, prompt in enumerate(PROMPTS[:FILMS])]
    wide, rows = load_bundle(torch.float32, family=bundle.family), []
    exact = [generate(wide, film)[0] for film in shorts]
    for arm, entered in ARMS.items():
        with entered(bundle):
            made = ((generate(bundle, film)[0] - one).norm() / one.norm() for film, one in zip(shorts, exact, strict=True))
            values = row(counted(bundle, job) * turns, spans[arm])
            rows.append({"arm": arm, **values, "to_float32": mean_and_error([float(error) for error in made]), **profiled(bundle, short)})
    return rows


@contextmanager
def one_by_one(bundle: Bundle) -> Iterator[None]:
    """Every layer of the network has a hook that does nothing: it is called, and nothing is made one operation with it."""
    hooks = [layer.register_forward_hook(lambda *_: None) for layer in bundle.network.modules() if isinstance(layer, HOOKED)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def as_it_is(bundle: Bundle) -> AbstractContextManager[None]:
    return nullcontext()


HOOKED = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
ARMS: dict[str, Callable[[Bundle], AbstractContextManager[None]]] = {"as it is": as_it_is, "layer by layer": one_by_one}


def counted(bundle: Bundle, job: Job) -> list[float]:
    """Floating-point operations of every evaluation of the film."""
    with counter() as operations:

        def so_many() -> float:
            return float(operations.get_total_flops())

        return [after - before for before, after in _noted(bundle, job, so_many, so_many)]


def timed(bundle: Bundle, job: Job, dtype: torch.dtype, clock: Callable[[], float]) -> list[Span]:
    """Of every evaluation its seconds, and those of a product beside it: the mean of one before and one after."""
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    products: list[float] = []

    def product() -> float:
        began = clock()
        torch.mm(a, b)
        return clock() - began

    def begin() -> float:
        products.append(product())
        return clock()

    def end() -> float:
        now = clock()
        products.append(product())
        return now

    spans = _noted(bundle, job, begin, end)
    return [(last - first, (products[2 * i] + products[2 * i + 1]) / 2) for i, (first, last) in enumerate(spans)]


def row(operations: list[float], seconds: list[Span]) -> dict[str, Any]:
    """`of_product`: the rate of an evaluation over that of the product beside it, median and tenths; rates in 10^9 operations a second."""
    product = 2.0 * SIDE**3
    shares = [count / mine * beside / product for count, (mine, beside) in zip(operations, seconds, strict=True)]
    tenths = statistics.quantiles(shares, n=10, method="inclusive")
    return {
        "evaluations": len(shares), "gflop": round(statistics.median(operations) / 1e9, 3),
        "ms": round(statistics.median(mine for mine, _ in seconds) * 1000, 2),
        "gflops": round(statistics.median(count / mine for count, (mine, _) in zip(operations, seconds, strict=True)) / 1e9, 1),
        "product_gflops": round(product / statistics.median(beside for _, beside in seconds) / 1e9, 1),
        "of_product": round(statistics.median(shares), 3), "of_product_p10": round(tenths[0], 3), "of_product_p90": round(tenths[8], 3),
    }  # fmt: skip


def profiled(bundle: Bundle, job: Job) -> dict[str, float]:
    """Part of the time of a film by kind of operator; what is left is dispatch and everything small."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        generate(bundle, job)
    times = {event.key.rpartition("::")[2]: event.self_cpu_time_total for event in trace.key_averages()}
    total = sum(times.values())
    return {kind: round(sum(times.get(name, 0.0) for name in names) / total, 3) for kind, names in KINDS.items()}


def _noted(bundle: Bundle, job: Job, before: Callable[[], float], after: Callable[[], float]) -> list[tuple[float, float]]:
    around: list[Evaluations] = []

    def make(adapter: ModelAdapter, sigmas: object) -> ModelAdapter:
        kind = RowEvaluations if isinstance(adapter, RowAdapter) else Evaluations
        around.append(kind(adapter, before, after))
        return cast(ModelAdapter, around[-1])

    generate(bundle, job, adapter=make)
    return [pair for one in around for pair in one.noted]


def shown() -> str:
    """What was found on the processor of the bundled models' figures."""
    lines = []
    for name in STEP:
        for one in data(name)["rows"]:
            share = f"{one['of_product']:.2f} ({one['of_product_p10']:.2f} to {one['of_product_p90']:.2f})"
            near = "{:.2f} ± {:.2f}".format(*one["to_float32"])
            lines.append((one["model"], one["threads"], one["arm"], f"{one['ms']:.1f} ms", share, f"{one['products']:.0%}", near))
    head = ["model", "threads", "layers", "an evaluation", "of the product's rate (tenths)", "of its time in products", "distance to float32"]
    return table(head, lines) + "\n" + "\n".join(map(origin, STEP))


FIGURES: dict[str, Callable[[], str]] = {"step": shown}
