"""One sampling run. Read this first: for every chunk and step it decides, then computes, refreshes some tokens, or replays.

The sampler asks for velocities; the policy decides; the adapter runs the network; the KV store holds the history.
The decision is made once per chunk and step, by the first branch that arrives, and every other branch follows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from ..kernels.tokens import mask_over, pooled, spread
from ..kv.cache import Branches, KVSizes, KVStore
from ..kv.compressor import Budget
from ..kv.foresight import foresee_history
from ..kv.keeper import Keeper
from ..kv.layout import Layout, capacity
from ..models.adapter import Call, ModelAdapter, require_tokens
from ..models.published import time_polynomial
from ..policies.always import Always
from ..policies.planned import foretell
from ..policies.protocol import CachePolicy, Compute, Decision, Foresees, Outlook, Part, PartPolicy, PlanPolicy, Refresh, Replay, Reuse, TokenPolicy
from ..policies.state import ChunkState, RunState
from ..sampling.chunk import Chunk
from ..sampling.plan import Plan
from ..sampling.schedule import ChunkSchedule
from .report import RunReport
from .signals import StepSignals


class Session:
    """A run of `schedule` over latents [batch, C, frames, h, w] at noise levels `sigmas` (steps + 1 of them, ending in 0).

    `prefix_sigma`: the noise level at which the given first frames are shown (0: clean); `budget`: how much history is kept
    (None: what lies within the window).
    Use it as a context manager: leaving it, for whatever reason, frees the KV cache and all chunk state.
    """

    def __init__(self, adapter: ModelAdapter, schedule: ChunkSchedule, sigmas: Sequence[float], grid: tuple[int, int], batch: int = 1,
                 policy: CachePolicy | None = None, fps: int = 24, prefix_sigma: float = 0.0, budget: Budget | None = None) -> None:  # fmt: skip
        if len(sigmas) != schedule.steps + 1:
            raise ValueError(f"{len(sigmas)} noise levels for {schedule.steps} steps: {schedule.steps + 1} are needed")
        self.adapter, self.schedule, self.sigmas, self.batch, self.fps = adapter, schedule, tuple(sigmas), batch, fps
        self.prefix_sigma = prefix_sigma
        self.policy: CachePolicy = policy or Always()
        if isinstance(self.policy, Foresees):
            self.policy.check_run(schedule.steps)
        self.plan: Plan | None = Plan.full(schedule)
        """Which steps the sampler comes with; None until `settle` where the policy has a budget in seconds."""
        if isinstance(self.policy, PlanPolicy):
            self.plan = None if self.policy.seconds else self.policy.plan(schedule)
        self.told: tuple[str, ...] = ()
        """What the policy says when the run is over."""
        self.state = RunState()
        self._frame_tokens = adapter.tokens_per_frame(*grid)
        self._watches = self.policy.watches if isinstance(self.policy, TokenPolicy) else None
        partly = self._watches or isinstance(self.policy, PartPolicy)
        self._tokens = require_tokens(adapter, schedule.chunk_frames if self._watches else None) if partly else None
        self._patch = math.isqrt(grid[0] * grid[1] // self._frame_tokens)
        self._grid = grid[0] // self._patch, grid[1] // self._patch
        self.report = RunReport(schedule.chunks, schedule.steps, (schedule.frames, *self._grid))
        if self.plan is not None and isinstance(self.policy, PlanPolicy):
            self.report.follows(self.plan)
        self._budget, self._kv = budget, self._store(budget)
        self._text: dict[Branches, object] = {}
        self._time_changes: list[float] | None = None

    def _store(self, budget: Budget | None) -> KVStore:
        adapter, rows = self.adapter, Layout(self.schedule, self._frame_tokens, budget.rows if budget else None)
        sizes = KVSizes.of(adapter, self.batch, capacity(self.schedule, self._frame_tokens, rows.budget))
        if budget is None:
            return KVStore(sizes, rows, waits=self._in_part)
        keeper = Keeper(budget, self.schedule, adapter.layers, self.batch, self._grid, adapter.rotary)
        return KVStore(sizes, rows, keeper, budget.cache_of(sizes, rows), self._in_part)

    def _in_part(self, index: int) -> bool:
        """Whether the plan computes some steps of a chunk in part."""
        return self.plan is not None and self.plan.is_partial(index)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if isinstance(self.policy, Foresees):
            self.told = self.policy.retell(self.state.memory)
            self.report.notes += self.told
        self.report.close()
        self._kv.free()
        self._text.clear()
        self.state.clear()

    def foresee(self, device: torch.device) -> tuple[str, ...]:
        """What is known before the first step, in sentences that the report repeats. `device`: where the run will be."""
        said = self.policy.foresee(self.outlook(device)) if isinstance(self.policy, Foresees) else ()
        if isinstance(self.policy, PlanPolicy):
            said = *foretell(self.policy, () if self.plan is None else (self.plan,), (self.schedule,)), *said
        if self._budget is not None:
            said = *said, foresee_history(self._budget, self.schedule, self._frame_tokens)
        self.report.notes += said
        return said

    def settle(self, frame_s: float) -> Plan:
        """The plan of a budget in seconds, once a latent frame has been timed; the report says what follows from it."""
        assert isinstance(self.policy, PlanPolicy)
        self.plan = self.policy.timed(self.schedule, frame_s)
        self.report.follows(self.plan)
        self.report.notes = *foretell(self.policy, (self.plan,), (self.schedule,), frame_s), *self.report.notes[1:]
        return self.plan

    def outlook(self, device: torch.device) -> Outlook:
        return Outlook(self.schedule.chunks - self.schedule.given, self.sigmas, lambda: self.time_changes(device), time_polynomial(self.adapter))

    def denoise(self, x: Tensor, chunk: Chunk, context: Tensor, branches: Branches) -> Tensor:
        """Velocity of one chunk. x: [len(branches) * batch, C, F, h, w]; context: the branches' text embeddings."""
        sigma = self.prefix_sigma if chunk.index < self.schedule.given else self.sigmas[chunk.step]
        call = Call(x, sigma, chunk, self._text_of(context, branches), self.fps)
        if self.plan is None and not chunk.committing:  # an evaluation that is only timed
            return self._compute(call, branches)[0]
        state = self.state.of(chunk.index)
        if chunk.committing:
            if state.decided_at != chunk.step:
                state.decided_at = chunk.step
                self.report.committed(chunk.frames * self._frame_tokens)
                if self._watches in ("clean", "noisy"):
                    self.state.edges[chunk.index] = x[: self.batch, :, -1]
            return self._compute(call, branches)[0]
        match self._decide(call, state):
            case Reuse(what, order) if branches in state.predictions:
                return self._replay(call, state, branches, what, order)
            case Refresh(tokens, what, order) if branches in state.predictions:
                self._keep(call, state, branches, *self._compute(call, branches, tokens), tokens)
                return self._replay(call, state, branches, what, order)
            case Part(tokens) if self._kv.can_wait(branches, chunk):
                return self._compute(call, branches, tokens)[0]
            case _:
                self.report.ran(chunk, chunk.frames * self._frame_tokens)
                velocity, residual = self._compute(call, branches)
                self._keep(call, state, branches, velocity, residual)
                return velocity

    def choose(self, chunk: Chunk, rate: Tensor) -> Tensor:
        """The plan computes part of the chunk at this step, and the policy says which: latent cells, bool [F, h, w]. `rate`: as in `walk.Choose`."""
        assert isinstance(self.policy, PartPolicy)
        assert self.plan is not None
        state, total = self.state.of(chunk.index), chunk.frames * self._frame_tokens
        tokens = self.policy.choose(pooled(rate, self._patch), self.plan.tokens_of(total))
        state.decision, state.decided_at = Part(tokens), chunk.step
        self.report.decided(chunk, False, total, 0.0, tokens)
        return self._chosen(chunk, tokens)

    def _chosen(self, chunk: Chunk, tokens: Tensor) -> Tensor:
        grid = (chunk.frames, *self._grid)
        chosen = torch.zeros(math.prod(grid), dtype=torch.bool, device=tokens.device).index_fill_(0, tokens, True)
        return spread(chosen.view(grid), self._patch)

    def note(self, chunk: Chunk, clean: Tensor | None) -> None:
        """The sampler tells, after a step, which clean latents [batch, C, F, h, w] it now predicts for the chunk, or that the plan skips it."""
        if clean is None:
            self.report.skipped(chunk, chunk.frames * self._frame_tokens)
        elif self._watches == "clean":
            self.state.of(chunk.index).clean = clean

    def commit(self, chunk: Chunk) -> None:
        """A finished chunk is history from now on: only keys and values stay, and under a budget not all of them."""
        self.state.drop(chunk.index)
        self._kv.forget(chunk.index)
        if chunk.index < self.schedule.chunks - 1:
            self._kv.settle(chunk)
            if (keeper := self._kv.keeper) is not None:
                self.report.kept(chunk, keeper.locate(), self._frame_tokens, self._kv.history_bytes)
                self.report.host_syncs += 1

    def _decide(self, call: Call, state: ChunkState) -> Decision:
        chunk = call.chunk
        if state.decided_at != chunk.step or state.decision is None:
            grid = (chunk.frames, *self._grid)
            signals = StepSignals(call, self.batch, grid, self.state, self.report, self.outlook(call.x.device), self._tokens)
            state.decision = self.policy.decide(chunk, signals, state)
            state.decided_at = chunk.step
            computed, some = isinstance(state.decision, Compute), state.decision.tokens if isinstance(state.decision, Refresh) else None
            self.report.decided(chunk, computed, chunk.frames * self._frame_tokens, state.drift, some)
        return state.decision

    def _compute(self, call: Call, branches: Branches, only: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Velocity and residual of the chunk; of `only` some of its tokens, the velocity in its place and the residual in their order."""
        attend = self._kv.attention(branches, call.chunk, only)
        with self.report.clock("network", call.x.device):
            out = self.adapter.forward(call, attend) if only is None or self._tokens is None else self._tokens.refresh(call, only, attend)
        self.report.kv_bytes(self._kv.bytes)
        return out

    def _keep(self, call: Call, state: ChunkState, branches: Branches, velocity: Tensor, residual: Tensor, only: Tensor | None = None) -> None:
        if only is not None and (self.policy.keeps == "residual" or self._watches == "output"):
            whole = residual.new_zeros(len(residual), call.chunk.frames * self._frame_tokens, residual.shape[2])
            residual = whole.index_copy_(1, only, residual)
        if self.policy.keeps:
            value = velocity if self.policy.keeps == "velocity" else residual
            state.keep(branches, call.sigma, value, None if only is None else self._mask(call.chunk, value, only))
        if self._watches == "output" and branches == next(iter(state.predictions), branches):
            mine, old = residual[: self.batch], state.residual
            state.residual = mine if only is None or old is None else torch.where(self._mask(call.chunk, mine, only), mine, old)

    def _mask(self, chunk: Chunk, value: Tensor, tokens: Tensor) -> Tensor:
        return mask_over(value, tokens, (chunk.frames, *self._grid))

    def _replay(self, call: Call, state: ChunkState, branches: Branches, what: Replay, order: int) -> Tensor:
        value = state.predict(branches, call.sigma, order)
        return value if what == "velocity" else self.adapter.replay(call, value)

    def _text_of(self, context: Tensor, branches: Branches) -> object:
        if branches not in self._text:
            self._text[branches] = self.adapter.text(context)
        return self._text[branches]

    def time_changes(self, device: torch.device) -> list[float]:
        if self._time_changes is None:
            self._time_changes = self.adapter.time_changes(self.sigmas[:-1], self.fps, device)
        return self._time_changes
