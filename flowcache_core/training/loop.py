"""What every training run shares: a seeded, resumable loop with an averaged copy of the weights and a progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..files import whole
from .clips import FIRST
from .muon import Muon

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class TrainOptions:
    """Of one call. `until`: stops after so many of the steps; `minutes`: or after so long, from now on; the next call goes on. `start`: weights of
    an earlier training to begin with; `clips`: drawn by the end, the same in every call, None as the recipe has it. Raises ValueError."""

    until: int | None = None
    minutes: float | None = None
    start: Path | None = None
    clips: int | None = None
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"{self.minutes:g} minutes were asked for: use more than 0, or leave them out")
        if self.clips is not None and self.clips < FIRST:
            raise ValueError(f"{self.clips} clips were asked for: use {FIRST} or more, of which a training begins with {FIRST}")

    def end(self, total: int) -> int:
        return total if self.until is None else min(self.until, total)

    @property
    def over(self) -> bool:
        return self.minutes is not None and time.monotonic() - self.began >= 60 * self.minutes


USUAL = TrainOptions()
"""To the end, from fresh weights or where the last call stopped."""


def training_device() -> torch.device:
    """Where networks are trained."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cosine(step: int, total: int, warmup: int = 100, floor: float = 0.03) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


OUTER = ("patch_", "head.", "fps_embedding")
"""How the names of a network's embeddings and outputs begin."""


def optimisers(model: nn.Module, rate: float, muon_rate: float, outer: tuple[str, ...] = OUTER,
               pool: Executor | None = None) -> list[torch.optim.Optimizer]:  # fmt: skip
    """Muon for the matrices and convolutions inside the network, AdamW for the `outer` ones, norms, biases and lone parameters."""
    inner = [p for name, p in model.named_parameters() if p.requires_grad and p.ndim >= 2 and name.endswith(".weight") and not name.startswith(outer)]
    taken = {id(p) for p in inner}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return [torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01), Muon(inner, muon_rate, pool=pool)]


def threads(count: int) -> ThreadPoolExecutor:
    """Threads that compute on one core each. They wait for each other once a step, where the threads of one operation do hundreds of times: on a
    machine that has other things to do they get several times as far."""
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def side_by_side(losses: Sequence[Callable[[], Tensor]], parameters: Sequence[nn.Parameter], pool: Executor) -> Tensor:
    """The mean of `losses`, each computed by a thread; its gradient is left in the parameters."""

    def one(loss_of: Callable[[], Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        with torch.enable_grad():
            loss = loss_of()
            return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    values, gradients = zip(*pool.map(one, losses), strict=True)
    for p, *mine in zip(parameters, *gradients, strict=True):
        known = [grad for grad in mine if grad is not None]
        p.grad = torch.stack(known).sum(0).div_(len(losses)) if known else None
    return torch.stack(values).mean()


def load_saved(path: Path) -> dict[str, Any]:
    """What `Loop.save` wrote. Raises ValueError for anything else; no code in a file is run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of which kind, only the unpickler knows
        raise ValueError(f"{path} is not what a training run saves ({type(error).__name__}): remove it to begin anew") from error
    if not isinstance(saved, dict) or not saved.keys() >= {"model", "average", "step", "optimisers"}:
        raise ValueError(f"{path} is not what a training run saves: remove it to begin anew")
    return saved


def export(out: Path, architecture: str, chunk_frames: int, window_chunks: int, wide: Collection[str] = (), **more: str) -> None:
    """`dit.pt` in `out` -> `dit.safetensors`: the averaged weights in bfloat16, but `wide` ones in float32, with what a loader has to know of them;
    `more`: further metadata."""
    saved = load_saved(out / "dit.pt")
    meta = {"format": "pt", "architecture": architecture, "chunk_frames": str(chunk_frames), "window_chunks": str(window_chunks), **more}
    with whole(out / "dit.safetensors") as partial:
        weights = {k: v.contiguous() if k in wide else v.bfloat16().contiguous() for k, v in saved["average"].items()}
        save_file(weights, partial, {**meta, "steps_trained": str(saved["step"])})


class Loop(Generic[Model]):
    """Runs `loss_of(step)` for `total` steps from wherever `path` left off; the average of the weights is in `average`.

    A loss that has no graph has left its gradient in the parameters already (`side_by_side`).
    """

    def __init__(self, model: Model, path: Path, total: int, opts: list[torch.optim.Optimizer], decay: float, save_every: int = 100) -> None:
        self.model, self.path, self.total, self.opts, self.decay, self.save_every = model, path, total, opts, decay, save_every
        self.rates = [group["lr"] for opt in opts for group in opt.param_groups]
        self.average: dict[str, Tensor] = {k: v.detach().clone().float() for k, v in model.state_dict().items()}
        self.step = 0
        if path.exists():
            saved = load_saved(path)
            model.load_state_dict(saved["model"])
            for opt, state in zip(opts, saved["optimisers"], strict=True):
                opt.load_state_dict(state)
            self.average = {name: saved["average"][name].to(mine) for name, mine in self.average.items()}
            self.step = saved["step"]

    def save(self) -> None:
        optimisers = [o.state_dict() for o in self.opts]
        with whole(self.path) as partial:
            torch.save({"model": self.model.state_dict(), "average": self.average, "step": self.step, "optimisers": optimisers}, partial)

    def run(self, loss_of: Callable[[int], Tensor], parameters: Iterable[nn.Parameter], describe: Callable[[], str] = str,
            options: TrainOptions = USUAL) -> None:  # fmt: skip
        parameters = list(parameters)
        smooth, end, saved = 0.0, options.end(self.total), self.step
        with tqdm(total=self.total, initial=self.step, desc=self.path.stem, mininterval=5) as bar:
            while self.step < end and not options.over:
                torch.manual_seed(self.step)
                factor, at = cosine(self.step, self.total), 0
                for opt in self.opts:
                    for group in opt.param_groups:
                        group["lr"] = self.rates[at] * factor
                        at += 1
                for opt in self.opts:
                    opt.zero_grad(set_to_none=True)
                loss = loss_of(self.step)
                if loss.requires_grad:
                    loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                for opt in self.opts:
                    opt.step()
                self._blend()
                self.step += 1
                smooth = loss.item() if smooth == 0.0 else 0.98 * smooth + 0.02 * loss.item()
                bar.update()
                bar.set_postfix_str(f"loss {smooth:.4f} {describe()}", refresh=False)
                if self.step % self.save_every == 0:
                    self.save()
                    saved = self.step
        if self.step != saved:
            self.save()

    @torch.no_grad()
    def _blend(self) -> None:
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value.float(), 1 - decay)
