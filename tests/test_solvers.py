"""Solvers against references written from the formulas, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.path import Path
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import SOLVERS, Euler, Renoise, Solver, UniPC, require_finite, solver
from tests.driven import Driven

SEED = 0
"""Of the first chunk of a run with this seed."""
Field = Callable[[Tensor, float], Tensor]


def integrate(kind: Solver, field: Field, x: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    memory = kind.start(torch.Generator().manual_seed(SEED))
    for i in range(len(sigmas) - 1):
        x = kind.step(x, field(x, sigmas[i]), i, Path.whole(sigmas), memory)
    return x


def random_field(seed: int, size: int) -> Field:
    """A smooth nonlinear velocity that depends on place and noise level."""
    rng = torch.Generator().manual_seed(seed)
    mix, tilt = (torch.randn(size, size, generator=rng, dtype=torch.float64) / size**0.5 for _ in range(2))
    return lambda x, sigma: torch.sin(x @ mix + 3 * sigma) + x @ tilt * (1 - sigma)


def reference_euler(field: Field, x: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    for now, to in pairwise(sigmas):
        x = x + (to - now) * field(x, now)
    return x


def reference_unipc(field: Field, x: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    """UniPC (Zhao et al. 2023), Algorithm 7 and 8: data prediction, order 2, B(h) = e^h - 1, corrector, lower order at the end.

    Every update is sigma_t / sigma_s x - alpha_t (e^-h - 1) m0 - alpha_t B(-h) sum_i rho_i D_i / r_i with the weights
    rho from the conditions sum_i rho_i r_i^(k-1) = k! phi_{k+1}(-h) / B(-h).
    """
    steps = len(sigmas) - 1

    def lam(i: int) -> float:
        return math.log((1 - sigmas[i]) / sigmas[i])

    def update(x: Tensor, s: int, t: int, m0: Tensor, others: list[tuple[int, Tensor]], given: Tensor | None) -> Tensor:
        """From level s to level t; `others`: index and value of known predictions; `given`: weights instead of the solved ones."""
        if sigmas[t] == 0:
            return m0
        h = lam(t) - lam(s)
        out = sigmas[t] / sigmas[s] * x - (1 - sigmas[t]) * math.expm1(-h) * m0
        if not others:
            return out
        r = [(lam(i) - lam(s)) / h for i, _ in others]
        phi, right = math.expm1(-h) / -h - 1, []
        for k in range(1, len(others) + 1):
            right.append(math.factorial(k) * phi / math.expm1(-h))
            phi = phi / -h - 1 / math.factorial(k + 1)
        powers = torch.tensor([[value**k for value in r] for k in range(len(others))], dtype=torch.float64)
        rho = torch.linalg.solve(powers, torch.tensor(right, dtype=torch.float64)) if given is None else given
        difference = sum(w / ri * (m - m0) for w, ri, (_, m) in zip(rho.tolist(), r, others, strict=True))
        return out - (1 - sigmas[t]) * math.expm1(-h) * difference

    half = torch.tensor([0.5], dtype=torch.float64)
    kept: list[Tensor] = []
    before, order = x, 0
    for i in range(steps):
        m = x - sigmas[i] * field(x, sigmas[i])
        if i:
            older = [(i - 2, kept[-2])] if order == 2 else []
            x = update(before, i - 1, i, kept[-1], [*older, (i, m)], half if order == 1 else None)
        kept.append(m)
        before, order = x, min(2, i + 1, steps - i)
        x = update(before, i, i + 1, m, [(i - 1, kept[-2])] if order == 2 else [], half)
    return x


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize(("kind", "reference"), [(Euler(), reference_euler), (UniPC(), reference_unipc)])
def test_a_solver_equals_its_formulas(kind: Solver, reference: Callable[[Field, Tensor, tuple[float, ...]], Tensor], steps: int) -> None:
    for seed in range(3):
        x, sigmas = torch.randn(4, 6, dtype=torch.float64), flow_sigmas(steps)
        field = random_field(seed, 6)
        torch.testing.assert_close(integrate(kind, field, x, sigmas), reference(field, x, sigmas), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_renoise_lays_fresh_noise_of_the_steps_own_seed_on_the_clean_latent(steps: int) -> None:
    """x = (1 - s') D + s' eps, with D = x - s v; eps has the seed of the chunk plus the step, as ComfyUI's sampler of such models has it."""
    start, sigmas, field = torch.randn(4, 6, dtype=torch.float64), flow_sigmas(steps), random_field(1, 6)
    x = start
    for step, (now, to) in enumerate(pairwise(sigmas)):
        clean = x - now * field(x, now)
        torch.manual_seed(SEED + step)
        x = (1 - to) * clean + to * torch.randn_like(clean)
    torch.testing.assert_close(integrate(Renoise(), field, start, sigmas), x, rtol=1e-12, atol=1e-12)


def test_renoise_has_the_noise_of_a_step_whatever_a_plan_leaves_out() -> None:
    sigmas, x = flow_sigmas(4), torch.randn(3)
    whole, part = (Path(sigmas, steps) for steps in ((0, 1, 2, 3), (0, 2, 3)))
    rng = torch.Generator().manual_seed(7)
    mine = Renoise().step(x, torch.zeros(3), 1, part, rng)
    torch.manual_seed(7 + 2)
    torch.testing.assert_close(mine, (1 - sigmas[3]) * x + sigmas[3] * torch.randn(3))
    assert not torch.equal(mine, Renoise().step(x, torch.zeros(3), 1, whole, rng))


@pytest.mark.parametrize("kind", [k() for k in SOLVERS])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_a_solver_is_exact_where_the_clean_latent_is_constant(kind: Solver, steps: int) -> None:
    clean, x = torch.randn(2, 3, 8, dtype=torch.float64)
    out = integrate(kind, lambda x, sigma: (x - clean) / sigma, x, flow_sigmas(steps))
    torch.testing.assert_close(out, clean, rtol=1e-10, atol=1e-10)


def test_unipc_is_more_accurate_than_euler_where_the_truth_is_known() -> None:
    """dx/dsigma = x^2 has the solution x / (1 - x (to - from))."""
    x, sigmas = torch.rand(64, dtype=torch.float64) + 0.2, flow_sigmas(20, shift=3.0)
    truth = x / (1 + x * sigmas[0])
    errors = [float((integrate(kind, lambda x, sigma: x * x, x, sigmas) - truth).abs().mean()) for kind in (UniPC(), Euler())]
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize("kind", [k() for k in SOLVERS])
def test_chunks_do_not_share_memory(kind: Solver) -> None:
    field, sigmas = random_field(0, 6), flow_sigmas(5)
    a, b = torch.randn(2, 4, 6, dtype=torch.float64)
    alone = [integrate(kind, field, x, sigmas) for x in (a, b)]
    memories = [kind.start(torch.Generator().manual_seed(SEED)) for _ in range(2)]
    for i in range(5):
        a = kind.step(a, field(a, sigmas[i]), i, Path.whole(sigmas), memories[0])
        b = kind.step(b, field(b, sigmas[i]), i, Path.whole(sigmas), memories[1])
    assert torch.equal(a, alone[0])
    assert torch.equal(b, alone[1])


@pytest.mark.parametrize("kind", [k() for k in SOLVERS])
def test_the_loop_over_chunks_equals_the_solver_alone(kind: Solver) -> None:
    noise, steps = torch.randn(1, 2, 3, 2, 2, dtype=torch.float64), 6
    sigmas, field = flow_sigmas(steps), lambda x, sigma: torch.sin(3 * x + sigma)
    looped = sample_chunks(
        Driven(lambda x, chunk: field(x, sigmas[chunk.step]), schedule=ChunkSchedule(3, 3, steps)), noise, ChunkSchedule(3, 3, steps), sigmas, kind
    )
    torch.testing.assert_close(looped, integrate(kind, field, noise, sigmas), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [k() for k in SOLVERS])
def test_a_solver_leaves_its_arguments_alone(kind: Solver) -> None:
    sigmas, memory, x = flow_sigmas(4), kind.start(torch.Generator()), torch.randn(3)
    for i in range(4):
        velocity = torch.randn(3)
        given = x.clone(), velocity.clone()
        after = kind.step(x, velocity, i, Path.whole(sigmas), memory)
        assert torch.equal(x, given[0])
        assert torch.equal(velocity, given[1])
        x = after


def test_solvers_are_found_by_name() -> None:
    assert [solver(kind.name) for kind in SOLVERS] == [kind() for kind in SOLVERS]
    with pytest.raises(ValueError, match="no solver is called 'heun': use one of unipc, euler, renoise"):
        solver("heun")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_latents_that_are_not_finite_are_refused(bad: float) -> None:
    require_finite(torch.ones(2), "the latents")
    with pytest.raises(ValueError, match="the latents contain NaN or infinity"):
        require_finite(torch.tensor([1.0, bad]), "the latents")
