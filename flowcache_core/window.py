"""A run as SkyReels-V2 was trained: every row runs all chunks of a window, and every frame sees every other.

It is the counterpart of `session.py` without a KV cache: in a bidirectional window the keys and values of every frame
change in every row, so nothing can be kept, and no policy decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import Tensor

from .decision import CachePolicy, PlanPolicy
from .kv.cache import Branches
from .models.adapter import ModelAdapter
from .plan import Plan
from .report import RunReport
from .schedule import Row, Window


class WindowSession:
    """One film as `windows` over latents of h x w = `grid`. A context manager, as Session is."""

    def __init__(self, adapter: ModelAdapter, windows: Sequence[Window], grid: tuple[int, int], fps: int = 24,
                 policy: CachePolicy | None = None) -> None:  # fmt: skip
        last = windows[-1]
        self.adapter, self.fps = adapter, fps
        self.report = RunReport(last.index + last.schedule.chunks, last.schedule.steps)
        self._frame_tokens = adapter.tokens_per_frame(*grid)
        self.plans = [
            policy.plan(w.schedule, together=True) if isinstance(policy, PlanPolicy) else Plan.full(w.schedule, together=True) for w in windows
        ]
        self._text: dict[Branches, object] = {}

    def __enter__(self) -> WindowSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.report.close()
        self._text.clear()

    def begin(self, row: Row, frames: int) -> None:
        """Counts one row over `frames` latent frames; the branches of guidance follow, together or one by one."""
        self.report.whole_row(row, frames * self._frame_tokens)

    def denoise(self, x: Tensor, sigmas: Sequence[float], context: Tensor, branches: Branches) -> Tensor:
        """Velocity of a window. x: [len(branches) * batch, C, F, h, w]; sigmas: the noise level of every latent frame."""
        if branches not in self._text:
            self._text[branches] = self.adapter.text(context)
        with self.report.clock("network", x.device):
            return self.adapter.whole(x, sigmas, self._text[branches], self.fps)
