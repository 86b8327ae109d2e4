"""Muon: momentum whose matrix is orthogonalised before each update (Jordan et al. 2024).

torch.optim.Muon takes matrices only; here a convolution counts as the matrix [out, in * kernel], which is what makes the
small VAE train in minutes instead of hours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, rounds: int = 5) -> Tensor:
    """[m, n] -> about the nearest matrix with singular values near 1, by a quintic Newton-Schulz iteration in bfloat16."""
    x = matrix.bfloat16()
    if wide := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if wide else x).type_as(matrix)


class Muon(torch.optim.Optimizer):
    """`pool`: threads that take a parameter each; None: one after the other."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01,
                 pool: Executor | None = None) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._each: Callable[..., Iterable[None]] = pool.map if pool else map

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            moved = [(p, self.state[p].setdefault("mean", torch.zeros_like(p)), group) for p in group["params"] if p.grad is not None]
            for _ in self._each(_move, *zip(*moved, strict=True)):
                pass


@torch.no_grad()
def _move(p: nn.Parameter, mean: Tensor, group: Mapping[str, Any]) -> None:
    assert p.grad is not None
    mean.lerp_(p.grad, 1 - group["momentum"])
    update = orthogonalise(p.grad.lerp(mean, group["momentum"]).flatten(1))
    scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.add_(update.view_as(p), alpha=-group["lr"] * scale)
