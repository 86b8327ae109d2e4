"""What is measured before a step is decided, the drift of a chunk and the motion of its tokens; and the decisions of a row.

Everything that is measured stays on the device. What the decisions of a row have to know of it goes to the host in one copy, and is waited
for where the first decision hangs on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from ..kernels.tokens import TINY, frame_difference, pooled, relative_change
from ..kernels.transfer import Inbox
from ..models.adapter import Call, TokenAdapter
from ..policies.protocol import Decision, Deferred, Measure, Outlook, Signature
from ..policies.state import RunState
from ..sampling.chunk import Chunk


class StepSignals:
    """`Signals` of one chunk at one step. `grid`: its frames, and height and width in tokens; `films`: side by side.

    In x the films of the first branch come first. `adapter` is asked only by `motion`.
    """

    def __init__(self, call: Call, films: int, grid: tuple[int, int, int], run: RunState, outlook: Outlook,
                 adapter: TokenAdapter | None = None) -> None:  # fmt: skip
        self.call, self.films, self.grid, self.adapter = call, films, grid, adapter
        self.run, self.state, self.outlook = run, run.of(call.chunk.index), outlook

    def change(self, signature: Signature) -> Tensor | float:
        if signature == "time":
            return self.outlook.time_changes()[self.call.chunk.step]
        now, before = self.call.x[: self.films], self.state.latent
        if before is None:
            self.state.latent = now.clone()
            return float("inf")
        change = relative_change(now, before)
        before.copy_(now)
        return change

    def motion(self, measure: Measure) -> Tensor:
        if measure == "change":
            return self._rate_of_change()
        picture = self._picture(measure)
        if picture is None:
            return torch.ones(self.grid, device=self.call.x.device)
        index = self.call.chunk.index
        self.run.keep_edge(index, picture)
        cells = frame_difference(picture, self.run.edges.get(index - 1), relative=measure == "output")
        return pooled(cells, self._patch(picture))

    def _patch(self, cells: Tensor) -> tuple[int, int]:
        """Cells of [..., h, w] in a token."""
        return cells.shape[-2] // self.grid[1], cells.shape[-1] // self.grid[2]

    def _picture(self, measure: Measure) -> Tensor | None:
        """[films, channels, frames, h, w] of latents, or of block outputs at one cell per token."""
        if measure == "noisy":
            return self.call.x[: self.films]
        if measure == "clean":
            return self.state.clean
        if self.state.residual is None or self.adapter is None:
            return None
        out = self.adapter.output(replace(self.call, x=self.call.x[: self.films]), self.state.residual)
        return out.unflatten(1, self.grid).movedim(-1, 1)

    def _rate_of_change(self) -> Tensor:
        """|last - before| over |their noise levels apart|, mean over channels and branches; zero where there is no last two."""
        if len(self.state.latest) < 2:
            return torch.ones(self.grid, device=self.call.x.device)
        before, last = self.state.latest
        sigma = last.sigma if isinstance(last.sigma, Tensor) else torch.full((), last.sigma, device=last.value.device)
        apart = sigma - before.sigma
        rate = (last.value - before.value).float().abs() / apart.abs().clamp_min(TINY) * (apart != 0)
        if rate.ndim == 3:
            return rate.mean((0, 2)).view(self.grid)
        return pooled(rate.mean((0, 1)), self._patch(rate))


def side_by_side(numbers: Sequence[Tensor]) -> Tensor:
    """Scalars, in one tensor."""
    dtype = reduce(torch.promote_types, (number.dtype for number in numbers), torch.float32)
    return torch.stack([number.to(dtype) for number in numbers])


class RowDecisions:
    """What was decided for the chunks of a row at its beginning, or deferred. `inbox`: by which the run's numbers come to the host, in one wait at
    most."""

    def __init__(self, made: Mapping[Chunk, Decision | Deferred], inbox: Inbox) -> None:
        self._made, self._inbox = dict(made), inbox
        asked = [number for one in made.values() if isinstance(one, Deferred) for number in one.numbers if isinstance(number, Tensor)]
        self._places = {id(number): place for place, number in enumerate(asked)}
        self._fetched = self._inbox.fetch(side_by_side(asked)) if asked else None
        self._values: list[float] = []

    def __contains__(self, chunk: Chunk) -> bool:
        return chunk in self._made

    def take(self, chunk: Chunk) -> Decision:
        """The chunk's turn has come. The first whose decision hangs on a number waits for those of all."""
        made = self._made.pop(chunk)
        return made.decide(*map(self._value, made.numbers)) if isinstance(made, Deferred) else made

    def _value(self, number: Tensor | float) -> float:
        if not isinstance(number, Tensor):
            return number
        if not self._values:
            assert self._fetched is not None
            self._values, self._fetched = self._inbox.get(self._fetched).tolist(), None
        return self._values[self._places[id(number)]]
