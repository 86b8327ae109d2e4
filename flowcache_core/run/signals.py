"""What is measured before a step is decided: the drift of a chunk, the motion of its tokens.

Everything stays on the device until `read` or `change` is called: these two are where a decision waits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.tokens import TINY, frame_difference, pooled
from ..models.adapter import Call, TokenAdapter
from ..policies.protocol import Measure, Outlook, Signature
from ..policies.state import RunState
from .report import RunReport


class StepSignals:
    """`Signals` of one chunk at one step. `grid`: its frames, and height and width in tokens; `films`: side by side.

    In x the films of the first branch come first. `adapter` is asked only by `motion`.
    """

    def __init__(self, call: Call, films: int, grid: tuple[int, int, int], run: RunState, report: RunReport,
                 outlook: Outlook, adapter: TokenAdapter | None = None) -> None:  # fmt: skip
        self.call, self.films, self.grid, self.adapter = call, films, grid, adapter
        self.run, self.state, self.report, self.outlook = run, run.of(call.chunk.index), report, outlook

    def change(self, signature: Signature) -> float:
        change = self.unread_change(signature)
        return self.read(change)[0] if isinstance(change, Tensor) else change

    def unread_change(self, signature: Signature) -> Tensor | float:
        if signature == "time":
            return self.outlook.time_changes()[self.call.chunk.step]
        now, before = self.call.x[: self.films], self.state.latent
        self.state.latent = now.clone()
        if before is None:
            return float("inf")
        return (now - before).abs().mean() / before.abs().mean().clamp_min(1e-12)

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

    def read(self, *numbers: Tensor) -> list[float]:
        self.report.host_syncs += 1
        return torch.stack([n.float() for n in numbers]).tolist() if len(numbers) > 1 else [float(numbers[0].item())]

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
