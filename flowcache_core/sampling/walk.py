"""How one chunk goes from one computed step to the next: all of it at once, or every latent cell on a path of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .chunk import Chunk
from .histories import Histories
from .path import Path
from .plan import Plan
from .schedule import ChunkSchedule
from .solvers import Multistep, Renoise, Solver, begun, even_weight, fresh_noise

Choose = Callable[[Chunk, Tensor], Tensor]
"""(chunk, how much the clean latent of every cell is likely to have changed [F, h, w]) -> the cells that are computed, bool [F, h, w]."""


class Walk(Protocol):
    """One chunk on its way. At every computed step it first arrives, then steps."""

    remembers: ClassVar[tuple[str, ...]]

    def arrive(self, x: Tensor, step: int) -> Tensor:
        """The chunk's latents [B, C, F, h, w] as the film has them -> as they are at the noise level of the step."""
        ...

    def rate(self, step: int) -> Tensor:
        """How much the clean latent of every cell is likely to have changed since it was computed, squared [F, h, w]."""
        ...

    def step(self, x: Tensor, arrived: Tensor, velocity: Tensor, step: int, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> what the film has from now on, and the clean latents predicted. `chosen`, bool [F, h, w]: where velocity was computed (None: all)."""
        ...


def walks(schedule: ChunkSchedule, plan: Plan, levels: tuple[float, ...], solver: Solver,
          rng: Callable[[int], torch.Generator]) -> dict[int, Walk]:  # fmt: skip
    """By chunk. `rng`: index of a chunk among those that are generated -> its random numbers."""
    out: dict[int, Walk] = {}
    skipping, jumps = solver.skipping, schedule.jumps
    sums = isinstance(skipping, Multistep) and skipping.sums
    for index in range(schedule.given, schedule.chunks):
        own = rng(index - schedule.given)
        if plan.is_partial(index):
            last = plan.computed[index][-1]
            out[index] = CellWalk(skipping.order, levels, last, jumps, sums, own if isinstance(skipping, Renoise) else None)
        else:
            out[index] = ChunkWalk(solver, Path(levels, plan.computed[index], jumps), own)
    return out


class ChunkWalk:
    """All cells together. The film has the chunk at the noise level of its next computed step."""

    remembers: ClassVar[tuple[str, ...]] = ("number", "memory")

    def __init__(self, solver: Solver, path: Path, rng: torch.Generator) -> None:
        self.path, self.number = path, 0
        self.solver = solver if path.is_whole else solver.skipping
        self.memory = self.solver.start(rng)

    def arrive(self, x: Tensor, step: int) -> Tensor:
        return x

    def rate(self, step: int) -> Tensor:
        raise TypeError("this chunk is computed whole at every step of the plan")

    def step(self, x: Tensor, arrived: Tensor, velocity: Tensor, step: int, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        out = self.solver.step(x, velocity, self.number, self.path, self.memory)
        self.number += 1
        return out, x - self.path.levels[step] * velocity


class CellWalk:
    """Every cell by itself. The film has each at the noise level at which it was computed last, after correction.

    There a cell waits, and nothing is fed to its solver, until it is computed again: then it moves over its own gap, as in
    `solvers.Multistep` along the path of its own computed steps. `order` 1 holds the clean latent over a step, as Euler does, and
    corrects nothing; 2 takes the line through its last two values, and the corrector. `last`: the chunk's last computed step, from which it
    goes to its clean latent. `jumps` and `sums` are those of `Path` and `Path.weights`.
    `noise`: the random numbers of a chunk under `Renoise`, by which a cell goes to its clean latent and back over its gap.
    """

    remembers: ClassVar[tuple[str, ...]] = ("histories", "clean")
    clean: list[Tensor]
    """The clean latents of every cell's last two computed steps, the latest last."""

    def __init__(self, order: int, levels: tuple[float, ...], last: int, jumps: tuple[int, ...] = (), sums: bool = False,
                 noise: torch.Generator | None = None) -> None:  # fmt: skip
        self.order, self.levels, self.last, self.jumps, self.sums, self.noise = order, levels, last, jumps, sums, noise
        self.histories = Histories()
        self.clean = []

    def arrive(self, x: Tensor, step: int) -> Tensor:
        if self.clean and self.noise is not None:
            return self._renoised(self.noise, self.levels[step])
        return self._across(x, self.clean[-self.order :], step, corrected=False) if self.clean else x

    def rate(self, step: int) -> Tensor:
        """|D_last - D_before|^2 * (time waited / time between the two)^2, summed over channels, mean over films."""
        before, last = self.clean
        ahead = [((step - past[-1]) / (past[-1] - past[-2])) ** 2 for past in self.histories.known]
        return (last - before).square().sum(1).mean(0) * self.histories.laid_out(ahead, last.dtype)

    def step(self, x: Tensor, arrived: Tensor, velocity: Tensor, step: int, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        clean = arrived - self.levels[step] * velocity
        if not self.clean:
            moved = begun(x, velocity, 0, Path(self.levels, (step,)))
        elif self.order == 1:
            moved = arrived
        else:
            moved = self._across(x, [*self.clean, clean], step, corrected=True)
        *_, last = self.clean or [clean]
        if chosen is None:
            self.clean = [*self.clean[-1:], clean]
        else:
            self.clean = [torch.where(chosen, new, old) for new, old in zip((last, clean), self.clean, strict=True)]
            moved = torch.where(chosen, moved, x)
        out = self._at_zero(step) if step == self.last else moved
        self.histories.computed(step, chosen)
        return out, self.clean[-1]

    def _renoised(self, rng: torch.Generator, level: float) -> Tensor:
        """Each cell's last clean latent at a noise level, with the noise of the step at which it was computed."""
        clean, which, steps = self.clean[-1], self.histories.which, [past[-1] for past in self.histories.known]
        each = {step: fresh_noise(clean, rng, step) for step in steps}
        noise = each[steps[0]]
        if which is not None:
            for kind, step in enumerate(steps):
                noise = torch.where(which == kind, each[step], noise)
        return (1 - level) * clean + level * noise

    def _at_zero(self, step: int) -> Tensor:
        """The end of every cell, as `solvers.Multistep` has it; this step's clean latents are the last, its past is not yet that of the cells."""
        if self.order == 1 or self.sums or len(self.clean) < 2:
            return self.clean[-1]
        before, now = self.clean
        paths = [Path(self.levels, (past[-1], step), self.jumps) for past in self.histories.known]
        along = [even_weight(*path.sigmas[:2]) if path.alike(0, 1) else 0.0 for path in paths]
        return now + self.histories.laid_out(along, now.dtype) * (now - before)

    def _across(self, x: Tensor, clean: list[Tensor], step: int, corrected: bool) -> Tensor:
        """x from each cell's last computed step to this one; the last of its clean latents is that of this step where it is `corrected`."""
        each: list[tuple[float, ...]] = []
        for past in self.histories.known:
            nodes = range(len(past) + corrected)
            factor, along = Path(self.levels, (*past, step), self.jumps).weights(len(past) - 1, tuple(nodes[-len(clean) :]), self.sums)
            each.append((factor, *along))
        ratio, *weights = (self.histories.laid_out(one, x.dtype) for one in zip(*each, strict=True))
        return ratio * x + sum(w * d for w, d in zip(weights, clean, strict=True))
