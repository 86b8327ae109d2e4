"""ODE solvers for flow matching, one state per chunk. Velocity is noise - clean, so clean = x - sigma * velocity."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .path import Path, log_snr


class Solver(Protocol):
    """Frozen settings; `start` makes the memory of one chunk, `step` moves it from one evaluation of its path to the next."""

    name: ClassVar[str]
    order: ClassVar[int]
    """How many of its latest evaluations a step is made from, 1 or 2."""

    @property
    def skipping(self) -> Solver:
        """What integrates where a plan leaves steps out: itself, if it is right on steps of unequal length."""
        ...

    def start(self, rng: torch.Generator) -> object:
        """`rng`: the random numbers of the chunk, for solvers that add noise."""
        ...

    def step(self, x: Tensor, velocity: Tensor, number: int, path: Path, memory: object) -> Tensor:
        """x at path.sigmas[number] -> x at path.sigmas[number + 1]; all frames of the chunk at once.

        Where the path begins below the first level of the schedule, the first x comes as it is there, at levels[0].
        """
        ...


@dataclass(frozen=True, slots=True)
class Euler:
    """x += (next - now) * velocity.

    `sums`: where a plan leaves steps out, they are taken all the same, with clean latents on a line or parabola; otherwise one long step
    takes their place.
    """

    name: ClassVar[str] = "euler"
    order: ClassVar[int] = 1

    sums: bool = False

    @property
    def skipping(self) -> Solver:
        return Multistep(sums=True) if self.sums else self

    def start(self, rng: torch.Generator) -> None:
        return None

    def step(self, x: Tensor, velocity: Tensor, number: int, path: Path, memory: object) -> Tensor:
        now, to = path.sigmas[number], path.sigmas[number + 1]
        if number == 0 and now != path.levels[0]:
            clean, x = x - now * velocity, begun(x, velocity, number, path)
            velocity = (x - clean) / now
        return x + (to - now) * velocity


@dataclass(slots=True)
class UniPCMemory:
    """The last two predictions of the clean latent, newest last, and the state from which the last step set out."""

    clean: list[Tensor] = field(default_factory=list)
    x: Tensor | None = None
    order: int = 0


@dataclass(frozen=True, slots=True)
class UniPC:
    """UniPC (Zhao et al. 2023), order 2, the B2(h) variant, predicting the clean latent, with the corrector on.

    In the flow parametrisation alpha = 1 - sigma and lambda = log(alpha / sigma); h is the step in lambda.
    """

    name: ClassVar[str] = "unipc"
    order: ClassVar[int] = 2

    @property
    def skipping(self) -> Multistep:
        return Multistep()

    def start(self, rng: torch.Generator) -> UniPCMemory:
        return UniPCMemory()

    def step(self, x: Tensor, velocity: Tensor, number: int, path: Path, memory: object) -> Tensor:
        assert isinstance(memory, UniPCMemory)
        index, sigmas = number, path.sigmas
        clean = x - sigmas[index] * velocity
        x = begun(x, velocity, number, path)
        if memory.x is not None:
            x = self._correct(memory, clean, index, sigmas)
        memory.clean = [*memory.clean[-1:], clean]
        memory.x = x
        memory.order = min(2, len(memory.clean), len(sigmas) - 1 - index)
        return self._predict(memory, index, sigmas)

    def _predict(self, memory: UniPCMemory, index: int, sigmas: tuple[float, ...]) -> Tensor:
        assert memory.x is not None
        base, gain, h = _first_order(memory.x, memory.clean[-1], sigmas[index], sigmas[index + 1])
        if memory.order < 2:
            return base
        r = (log_snr(sigmas[index - 1]) - log_snr(sigmas[index])) / h
        return base + gain * 0.5 * (memory.clean[-2] - memory.clean[-1]) / r

    def _correct(self, memory: UniPCMemory, now: Tensor, index: int, sigmas: tuple[float, ...]) -> Tensor:
        """Redo the last step, sigmas[index - 1] -> sigmas[index], knowing the prediction at its end."""
        assert memory.x is not None
        last = memory.clean[-1]
        base, gain, h = _first_order(memory.x, last, sigmas[index - 1], sigmas[index])
        if memory.order < 2:
            return base + gain * 0.5 * (now - last)
        r = (log_snr(sigmas[index - 2]) - log_snr(sigmas[index - 1])) / h
        # two conditions on the weights of the two differences: sum rho_i = b1, sum rho_i r_i = b2, with r_2 = 1
        phi = math.expm1(-h) / -h - 1
        b1 = phi / math.expm1(-h)
        b2 = 2 * (phi / -h - 0.5) / math.expm1(-h)
        rho_before = (b1 - b2) / (1 - r)
        rho_now = b1 - rho_before
        return base + gain * (rho_before * (memory.clean[-2] - last) / r + rho_now * (now - last))


def _first_order(x: Tensor, clean: Tensor, sigma: float, to: float) -> tuple[Tensor, float, float]:
    """The exact step for a constant clean latent; the factor of the higher-order terms; h."""
    ratio = to / sigma
    base = ratio * x + ((1 - to) - (1 - sigma) * ratio) * clean
    h = math.inf if to == 0 else log_snr(to) - log_snr(sigma)
    return base, -(1 - to) * math.expm1(-h), h


NEAR_ZERO = 0.25
"""Up to this noise level the clean latent is taken to go with the square of the level."""


@dataclass(slots=True)
class MultistepMemory:
    """The clean latents predicted last, newest last, and the state from which the last step set out."""

    clean: list[Tensor] = field(default_factory=list)
    x: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Multistep:
    """Predictor and corrector of second order on a path of unequal steps, predicting the clean latent D = x - sigma * velocity.

    The linear part of dx/dsigma = (x - D) / sigma is exact; D is a line through its last two values in the predictor, a parabola
    through the last three in the corrector (a line the first time). Every D keeps the value it had at the predicted x, so a step
    costs one evaluation. As in UniPC (Zhao et al. 2023) the corrector redoes the step before; other than there, D runs along the
    clock of the schedule (`Path`) and its integral is taken to the end, so neither needs steps of equal length. `sums`: in the place of the
    integral stands the sum that Euler's method makes of it, so that the film is that of Euler's method on the full schedule.
    """

    name: ClassVar[str] = "multistep"
    order: ClassVar[int] = 2

    sums: bool = False

    @property
    def skipping(self) -> Multistep:
        return self

    def start(self, rng: torch.Generator) -> MultistepMemory:
        return MultistepMemory()

    def step(self, x: Tensor, velocity: Tensor, number: int, path: Path, memory: object) -> Tensor:
        assert isinstance(memory, MultistepMemory)
        clean = x - path.sigmas[number] * velocity
        x = begun(x, velocity, number, path) if memory.x is None else _across(memory.x, [*memory.clean, clean], number - 1, number, path, self.sums)
        memory.clean, memory.x = [*memory.clean[-1:], clean], x
        if path.sigmas[number + 1] == 0:
            return clean if self.sums else _at_zero(memory.clean, number, path)
        return _across(x, memory.clean, number, number, path, self.sums)


def _across(x: Tensor, clean: list[Tensor], number: int, latest: int, path: Path, sums: bool) -> Tensor:
    """The step from evaluation `number` to the next, with D known at the evaluations up to `latest`."""
    ratio, weights = path.weights(number, tuple(range(latest + 1 - len(clean), latest + 1)), sums)
    return ratio * x + sum(w * d for w, d in zip(weights, clean, strict=True))


def _at_zero(clean: list[Tensor], number: int, path: Path) -> Tensor:
    """D at noise level 0 from its last values."""
    if len(clean) < 2 or not path.alike(number - 1, number):
        return clean[-1]
    return clean[-1] + even_weight(path.sigmas[number - 1], path.sigmas[number]) * (clean[-1] - clean[-2])


def even_weight(before: float, now: float) -> float:
    """How far to go on along the change of D between two noise levels to reach level 0; 0 where the last is not near it.

    Noise has no preferred sign, so near 0 D is even in sigma: D(0) + c sigma^2.
    """
    return now**2 / (before**2 - now**2) if now <= NEAR_ZERO else 0.0


def begun(x: Tensor, velocity: Tensor, number: int, path: Path) -> Tensor:
    """Where a path begins below the first level: x moved there by the step that is exact for a constant clean latent."""
    at, start = path.sigmas[number], path.levels[0]
    if number or at == start:
        return x
    clean = x - at * velocity
    return at / start * x + ((1 - at) - (1 - start) * at / start) * clean


@dataclass(frozen=True, slots=True)
class Renoise:
    """To the clean latent, and back to the next level with fresh noise: how models are sampled that were distilled to few steps.

    Consistency models (arXiv 2303.01469), algorithm 1. A chunk's random numbers at a step have a seed of their own, the one of the chunk plus
    the step, so that nothing has to be remembered and a plan changes no others.
    """

    name: ClassVar[str] = "renoise"
    order: ClassVar[int] = 1

    @property
    def skipping(self) -> Renoise:
        return self

    def start(self, rng: torch.Generator) -> torch.Generator:
        return rng

    def step(self, x: Tensor, velocity: Tensor, number: int, path: Path, memory: object) -> Tensor:
        assert isinstance(memory, torch.Generator)
        clean, to = x - path.sigmas[number] * velocity, path.sigmas[number + 1]
        if to == 0:
            return clean
        return (1 - to) * clean + to * fresh_noise(clean, memory, path.steps[number])


def fresh_noise(clean: Tensor, rng: torch.Generator, step: int) -> Tensor:
    """What `Renoise` lays on the clean latent of a step. `rng`: the random numbers of the chunk, of which the seed counts."""
    own = torch.Generator(clean.device).manual_seed((rng.initial_seed() + step) % 2**64)
    return torch.randn(clean.shape, generator=own, device=clean.device, dtype=clean.dtype)


SOLVERS: tuple[type[Solver], ...] = (UniPC, Euler, Renoise)


def solver(name: str) -> Solver:
    for kind in SOLVERS:
        if kind.name == name:
            return kind()
    raise ValueError(f"no solver is called {name!r}: use one of {', '.join(k.name for k in SOLVERS)}")


def require_finite(x: Tensor, what: str) -> None:
    """One host sync before a run. Raises ValueError for NaN or infinity."""
    if not torch.isfinite(x).all():
        raise ValueError(f"{what} contain NaN or infinity: they cannot be denoised; check the node that made them")
