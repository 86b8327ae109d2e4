"""The way of one chunk down the noise levels: where the network is evaluated, and how an integral runs between two such places.

Levels that a plan skips are never visited, so the steps of a path are of unequal length. What an integrator interpolates over
matters then: `clock`, the index on the full schedule, in which the levels were chosen to be evenly informative, or
lambda = log((1 - sigma) / sigma).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

CLOCK = 50.0
"""The full schedule in units of the clock, whatever its number of steps."""
LAMBDA_UNTIL = 4.0
"""Steps that set out before this time interpolate over lambda: next to pure noise the clock hardly moves the level."""
NODES, WEIGHTS = np.polynomial.legendre.leggauss(8)


@dataclass(frozen=True)
class Path:
    """`levels`: all noise levels of the schedule, ending in 0; `steps`: those at which the network runs, ascending.

    `jumps`: steps from which on the velocity is another one (`ChunkSchedule.jumps`): nothing is interpolated across them.
    """

    levels: tuple[float, ...]
    steps: tuple[int, ...]
    jumps: tuple[int, ...] = ()

    @classmethod
    def whole(cls, levels: Sequence[float]) -> Path:
        return cls(tuple(levels), tuple(range(len(levels) - 1)))

    @property
    def is_whole(self) -> bool:
        return len(self.steps) == len(self.levels) - 1

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """The level of every evaluation, and 0 at the end."""
        return (*(self.levels[step] for step in self.steps), 0.0)

    def clock(self, number: int) -> float:
        """Time of an evaluation, counted from 0, on the clock."""
        return CLOCK * self.steps[number] / (len(self.levels) - 1)

    def alike(self, one: int, other: int) -> bool:
        """Whether no jump lies between two evaluations."""
        return bisect_right(self.jumps, self.steps[one]) == bisect_right(self.jumps, self.steps[other])

    def weights(self, number: int, nodes: tuple[int, ...], sums: bool = False) -> tuple[float, tuple[float, ...]]:
        """The exact step from evaluation `number` to the next, for clean latents on the polynomial through those of `nodes`.

        -> (a, w): x' = a x + sum w_i D_i. From dx/dsigma = (x - D) / sigma: x / sigma moves by the integral of D over 1 / sigma, so
        a = s' / s and w_i = s' * integral of L_i(y) d(1 / sigma), L_i the Lagrange basis over the nodes in the variable y. Nodes across a
        jump have no part in it, and weight 0. `sums`: not the integral, but the sum that Euler's method would make of it in the steps between.
        """
        return _weights(self, number, nodes, sums)


@lru_cache(maxsize=4096)
def _weights(path: Path, number: int, nodes: tuple[int, ...], sums: bool) -> tuple[float, tuple[float, ...]]:
    start, end = path.sigmas[number], path.sigmas[number + 1]
    if end == 0:
        raise ValueError("the last step ends at noise level 0, where 1 / sigma has no value: it takes the clean latent as it is")
    at, length, y = (_steps if sums else _between)(path, number)
    every, nodes = nodes, tuple(i for i in nodes if path.alike(i, number))
    if path.clock(number) < LAMBDA_UNTIL:
        y, where = np.array([log_snr(s) for s in at]), [log_snr(path.sigmas[i]) for i in nodes]
    else:
        where = [path.clock(i) for i in nodes]
    basis = [math.prod((y - where[j]) / (where[i] - where[j]) for j in range(len(nodes)) if j != i) for i in range(len(nodes))]
    weight = {node: float(end * np.sum(length * one)) for node, one in zip(nodes, basis, strict=True)}
    return end / start, tuple(weight.get(node, 0.0) for node in every)


def _between(path: Path, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of a quadrature over 1 / sigma between two evaluations: noise level, weight, clock.

    Within every step of the full schedule the clock runs evenly in log sigma.
    """
    first, last = path.steps[number], path.steps[number + 1]
    logs = -np.log(path.levels[first : last + 1])
    middle, half = (logs[1:] + logs[:-1]) / 2, np.diff(logs) / 2
    at = middle[:, None] + half[:, None] * NODES
    clock = np.arange(first, last)[:, None] + (NODES + 1) / 2
    return np.exp(-at).ravel(), (np.exp(at) * half[:, None] * WEIGHTS).ravel(), (clock * CLOCK / (len(path.levels) - 1)).ravel()


def _steps(path: Path, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The steps of the full schedule between two evaluations: noise level where each sets out, its length in 1 / sigma, clock."""
    first, last = path.steps[number], path.steps[number + 1]
    at = np.array(path.levels[first : last + 1])
    return at[:-1], np.diff(1 / at), np.arange(first, last) * CLOCK / (len(path.levels) - 1)


def log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma), kept finite at pure noise."""
    return math.log(max(1 - sigma, 1e-6) / sigma)
