"""A run while it goes on: for every chunk and step it decides, then computes, refreshes some tokens, or replays.

The loop asks for velocities; the policy decides; the adapter runs the network; the KV store holds the history.
The decision is made once per chunk and step, by the first branch that arrives, and every other branch follows it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.tokens import mask_over, pooled, spread
from ..kernels.transfer import Inbox
from ..kv.cache import BesideHistory, Branches, KVSizes, KVStore, RowAttention
from ..kv.compressor import Budget
from ..kv.forecast import forecast_history
from ..kv.keeper import Keeper
from ..kv.layout import Capacity, Layout, capacity
from ..models.adapter import (
    Call,
    ChunkTexts,
    ModelAdapter,
    OwnTexts,
    Ranged,
    RowAdapter,
    TimeSignature,
    reach_of,
    require_time,
    require_tokens,
)
from ..network import Attend
from ..policies.always import Always
from ..policies.forecast import nothing_skipped
from ..policies.planned import forecast_plans
from ..policies.protocol import (
    CachePolicy,
    Compute,
    Decision,
    Deferred,
    Forecasts,
    Outlook,
    Part,
    PartPolicy,
    PlanPolicy,
    Refresh,
    Replay,
    Reuse,
    SignaturePolicy,
    TokenPolicy,
)
from ..policies.state import ChunkState, RunState
from ..sampling.chunk import Chunk
from ..sampling.plan import Plan
from ..sampling.schedule import ChunkSchedule, forecast_short
from .report import RunReport
from .signals import RowDecisions, StepSignals

Texts = tuple[Branches, Hashable]
"""Branches, and which of their texts: None where they have one for all chunks."""


@dataclass(frozen=True)
class Which:
    """What is evaluated: branches, with which blocks, and how often they were before at the same step. Each is replayed by itself."""

    branches: Branches
    blocks: Hashable = None
    before: int = 0

    @property
    def aside(self) -> bool:
        return self.before > 0


class Session:
    """A run of `schedule` over latents [films, C, frames, h, w] at noise levels `sigmas` (steps + 1 of them, ending in 0).

    `prefix_sigma`: the noise level at which the given first frames are shown (0: clean); `budget`: how much history is kept
    (None: all that the window holds); `commit_sigma`: the noise level that the network is given for finished chunks. `plan` and `room`
    are worked out where the caller has not done so before.
    Use it as a context manager: leaving it, for whatever reason, frees the KV cache and all chunk state.
    """

    remembers: ClassVar[tuple[str, ...]] = ("state", "plan", "evaluations", "report", "_kv", "_settled", "_asides")
    plan: Plan | None
    """Which steps are computed; None until `settle` where the policy has a budget in seconds."""

    def __init__(self, adapter: ModelAdapter, schedule: ChunkSchedule, sigmas: Sequence[float], grid: tuple[int, int], films: int = 1,
                 policy: CachePolicy | None = None, fps: int = 24, prefix_sigma: float = 0.0, budget: Budget | None = None,
                 commit_sigma: float = 0.0, plan: Plan | None = None, room: Capacity | None = None) -> None:  # fmt: skip
        if len(sigmas) != schedule.steps + 1:
            raise ValueError(f"{len(sigmas)} noise levels for {schedule.steps} steps: {schedule.steps + 1} are needed")
        self.adapter, self.schedule, self.sigmas, self.films, self.fps = adapter, schedule, tuple(sigmas), films, fps
        self.prefix_sigma, self.commit_sigma = prefix_sigma or commit_sigma, commit_sigma
        self.policy: CachePolicy = policy or Always()
        if isinstance(self.policy, Forecasts):
            self.policy.check_run(schedule.steps)
        self.plan = plan or plan_of(self.policy, schedule)
        self.evaluations = 0
        """Of the network or in its place, commits included."""
        self._asides = 0
        self.state = RunState()
        self._frame_tokens = adapter.tokens_per_frame(*grid)
        self._watches = self.policy.watches if isinstance(self.policy, TokenPolicy) else None
        partly = self._watches or isinstance(self.policy, PartPolicy)
        self._tokens = require_tokens(adapter, self.policy.title, schedule.chunk_frames if self._watches else None) if partly else None
        self._grid = adapter.token_grid(*grid)
        self._patch = grid[0] // self._grid[0], grid[1] // self._grid[1]
        self.report = RunReport(schedule.chunks, schedule.steps, (schedule.frames, *self._grid))
        if self.plan is not None and isinstance(self.policy, PlanPolicy):
            self.report.follows(self.plan)
        self._inbox = Inbox()
        """By it all numbers of the device come that decisions and history hang on."""
        self._budget, self._room, self._kv = budget, room, self._store(budget, room)
        self._settled: tuple[int, int] | None = None
        """The last chunk that has become history, and the bytes of that, until it is known where its slots lie."""
        self.reads = 0
        """The chunk for which history was last made anew: earlier ones are then shown with its texts."""
        self._guided: tuple[str, ...] = ()
        """All branches, where guidance is inside."""
        self._alone: Branches = ()
        """Of these, those without a KV cache."""
        self._text: dict[Texts, object] = {}
        self._last: dict[Texts, int] = {}
        """The newest chunk that has used a text."""
        self._chunk_text: dict[tuple[Texts, int], object] = {}
        self._time_changes: list[float] | None = None
        self._row: tuple[Sequence[Chunk], Tensor | None] = (), None
        """The chunks of the row that has begun, and the film."""
        self._decisions = RowDecisions({}, self._inbox)

    def _store(self, budget: Budget | None, room: Capacity | None) -> KVStore:
        adapter, layout = self.adapter, Layout(self.schedule, self._frame_tokens, budget.slots if budget else None, reach_of(self.adapter))
        sizes = KVSizes.of(adapter, self.films, room or capacity(self.schedule, self._frame_tokens, layout.budget, layout.reach))
        seen = adapter.seen if isinstance(adapter, Ranged) else None
        if budget is None:
            return KVStore(sizes, layout, waits=self.in_part, seen=seen)
        keeper = Keeper(budget, self.schedule, adapter.layers, self.films, self._grid, adapter.rotary, self._inbox)
        return KVStore(sizes, layout, keeper, budget.cache_of(sizes, layout), self.in_part, seen)

    def in_part(self, index: int) -> bool:
        """Whether the plan computes some steps of a chunk in part: then tokens wait, in every branch."""
        return self.plan is not None and self.plan.is_partial(index)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """`error`: what has ended the run; then it is what is raised, whatever completing the report may come to."""
        try:
            self._complete_report()
        except Exception:
            if error is None:
                raise
        finally:
            self._free()

    def _complete_report(self) -> None:
        try:
            self._locate()
            if isinstance(self.policy, Forecasts):
                self.report.notes += self.policy.findings(self.state.memory)
            if not isinstance(self.policy, Always | PlanPolicy) and self.report.skipped_nothing:
                self.report.notes += (nothing_skipped(),)
            if self._asides:
                note = f"guidance asked for {self._asides} evaluations beside those of the steps; they are in the times, not in the counts"
                self.report.notes += (note,)
        finally:
            self.report.host_syncs += self._kv.syncs
            self.report.close()

    def _free(self) -> None:
        self._kv.free()
        self._text.clear()
        self._last.clear()
        self._chunk_text.clear()
        self._row, self._decisions, self._settled = ((), None), RowDecisions({}, self._inbox), None
        self.state.clear()

    def forecast(self, device: torch.device) -> tuple[str, ...]:
        """What is known before the first step, in sentences that the report repeats. `device`: where the run will be.

        Where a policy goes by the time modulation, the device is asked for it here, before anything runs.
        """
        if isinstance(self.policy, SignaturePolicy) and self.policy.follows_time:
            self.time_changes(device)
        notes = self.policy.forecast(self.outlook(device)) if isinstance(self.policy, Forecasts) else ()
        if isinstance(self.policy, PlanPolicy):
            notes = *forecast_plans(self.policy, () if self.plan is None else (self.plan,), (self.schedule,)), *notes
        if self._budget is not None:
            notes = *notes, forecast_history(self._budget, self.schedule, self._frame_tokens, reach_of(self.adapter))
        notes = *notes, *forecast_short(self.schedule)
        self.report.notes += notes
        return notes

    def settle(self, frame_s: float) -> Plan:
        """The plan of a budget in seconds, once a latent frame has been timed; the report says what follows from it."""
        assert isinstance(self.policy, PlanPolicy)
        self.plan = self.policy.timed(self.schedule, frame_s)
        self.report.follows(self.plan)
        self.report.notes = *forecast_plans(self.policy, (self.plan,), (self.schedule,), frame_s), *self.report.notes[1:]
        return self.plan

    def outlook(self, device: torch.device) -> Outlook:
        polynomial = self.adapter.polynomial if isinstance(self.adapter, TimeSignature) else ()
        return Outlook(self.schedule.chunks - self.schedule.given, self.sigmas, lambda: self.time_changes(device), polynomial)

    def level(self, chunk: Chunk) -> float:
        """The noise level that the network is given."""
        if chunk.index < self.schedule.given:
            return self.prefix_sigma
        return self.commit_sigma if chunk.committing else self.sigmas[chunk.step]

    def denoise(self, x: Tensor, chunk: Chunk, context: Tensor, branches: Branches, blocks: Hashable = None, texts: Hashable = None) -> Tensor:
        """Velocity of one chunk. x: [len(branches) * films, C, F, h, w]; context: the branches' text embeddings, `texts`: which these are, where
        they change from chunk to chunk. Without branches, all of which other devices evaluate, x is [films, ...], by which decisions are made,
        and the velocity has no films.

        `blocks`: by what, where the caller has replaced blocks of the network for this evaluation. The first evaluation of a branch at a
        step is the branch's own. Guidance may ask for more: they see history and the chunk itself as they are now, and leave no keys.
        """
        self.evaluations += 1
        self.report.evaluates(x.device)
        call = Call(x, self.level(chunk), chunk, self._text_of(context, branches, chunk, texts), self.fps, branches)
        if self.plan is None and not chunk.committing:  # an evaluation that is only timed
            return self._compute(call, Which(branches))[0]
        state = self.state.of(chunk.index)
        which = Which(branches, blocks, state.arrive(chunk.step, branches))
        if which.aside:
            self._asides += 1
        if chunk.committing:
            if which.aside:
                return torch.zeros_like(x)  # of a commit only keys and values are of use
            if state.decided_at != chunk.step:
                state.decided_at = chunk.step
                self.report.committed(chunk.frames * self._frame_tokens)
                if self._watches in ("clean", "noisy"):
                    self.state.keep_edge(chunk.index, x[: self.films])
            return self._compute(call, which)[0]
        self._narrow(state, which)
        match self._decide(call, state):
            case Reuse(what, order) if which in state.predictions:
                return self._replay(call, state, which, what, order)
            case Refresh(tokens, what, order) if which in state.predictions:
                self._keep(call, state, which, *self._compute(call, which, tokens), tokens)
                return self._replay(call, state, which, what, order)
            case Part(tokens) if which.aside or (blocks is None and self._kv.can_wait(branches, chunk)):
                return self._compute(call, which, tokens)[0]
            case decision:
                self.report.ran(chunk, chunk.frames * self._frame_tokens, decision.tokens if isinstance(decision, Refresh | Part) else None)
                velocity, residual = self._compute(call, which)
                self._keep(call, state, which, velocity, residual)
                return velocity

    def denoise_row(self, x: Tensor, chunks: Sequence[Chunk], context: Tensor, branches: Branches, texts: Hashable = None) -> Tensor:
        """Velocity of chunks of a row that are all computed whole, in one pass. x: [len(branches) * films, C, F, h, w], their latents one behind the
        other. Every branch is evaluated once at a step.

        The policy is one that settles its steps before the run, and nothing is replayed.
        """
        self.evaluations += 1
        self.report.evaluates(x.device)
        text, parts = self._text_of(context, branches, chunks[-1], texts), x.split([chunk.frames for chunk in chunks], 2)
        calls = [Call(part, self.level(chunk), chunk, text, self.fps, branches) for part, chunk in zip(parts, chunks, strict=True)]
        for call in calls if self.plan is not None else ():  # else the evaluation is only timed
            state, tokens = self.state.of(call.chunk.index), call.chunk.frames * self._frame_tokens
            state.arrive(call.chunk.step, branches)
            self._decide(call, state)
            self.report.ran(call.chunk, tokens, None)
        return self._compute_row(calls, branches)

    def unwritten(self, chunk: Chunk, branches: Iterable[Hashable]) -> tuple[Hashable, ...]:
        """Of these branches, and of all that have run so far, those that the commit of a chunk has not run: history would lack them."""
        state, known = self.state.of(chunk.index), dict.fromkeys((*branches, *(branch for some, _ in self._text for branch in some)))
        return tuple(branch for branch in known if state.ran_at != chunk.step or branch not in state.ran)

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
        """After every step: the clean latents [films, C, F, h, w] now predicted for the chunk, or None where the plan skips it."""
        if clean is None:
            self.report.skipped(chunk, chunk.frames * self._frame_tokens)
        elif self._watches == "clean":
            self.state.of(chunk.index).clean = clean

    def commit(self, chunk: Chunk) -> None:
        """A finished chunk is history from now on: only keys and values stay, and under a budget not all of them."""
        self._locate()
        self.state.drop(chunk.index)
        self._kv.forget(chunk.index)
        self._forget_texts(chunk.index)
        if chunk.index < self.schedule.chunks - 1:
            self._kv.settle(chunk)
            if self._kv.keeper is not None and self._kv.has_history:
                self._settled = chunk.index, self._kv.history_bytes

    def _locate(self) -> None:
        """Before somebody looks back: where the slots lie of a chunk that has become history. Its numbers come with those of the row's decisions."""
        if self._settled is None or self._kv.keeper is None:
            return
        (index, size), self._settled = self._settled, None
        with self._counting_waits():
            places = self._kv.keeper.locate()
        if index >= self.reads:  # it was noted when it was first finished
            self.report.history.kept(self.schedule.at(index, self.schedule.steps), places, self._frame_tokens, size)

    @contextmanager
    def _counting_waits(self) -> Iterator[None]:
        before = self._inbox.waits
        yield
        self.report.host_syncs += self._inbox.waits - before

    def restart(self, chunk: Chunk) -> tuple[Chunk, ...]:
        """Empties history before a chunk's first step, since the film goes on with another text (the KV recache of LongLive, arXiv 2509.22622).

        -> the chunks of which it had something, finished. Whoever calls shows them once more, clean and in order, and commits each: it looks
        back on those before it, and becomes history within the budget. What was given up before stays so.
        """
        self._locate()
        kv, finished = self._kv, range(chunk.index)
        kept = sorted(kv.keeper.chunks if kv.keeper else set(kv.layout.spans).intersection(finished))
        self.report.host_syncs += kv.syncs
        kv.free()
        self._kv, self.reads = self._store(self._budget, self._room), chunk.index
        self._kv.gone = frozenset(finished).difference(kept)
        self.report.notes += (f"the prompt changes with chunk {chunk.index + 1}: of history {len(kept)} chunks were evaluated once more",)
        return tuple(self.schedule.at(index, self.schedule.steps) for index in kept)

    def begin_row(self, chunks: Sequence[Chunk], film: Tensor) -> None:
        """These chunks come to their next step, from where they are in the film [films, C, F, h, w]. The first that is evaluated brings about
        the decisions of all."""
        self._row = chunks, film
        if self._settled is not None and self._kv.keeper is not None:  # not under way where a run goes on from a saved state
            self._kv.keeper.send()

    def _decide(self, call: Call, state: ChunkState) -> Decision:
        chunk = call.chunk
        if state.decided_at != chunk.step or state.decision is None:
            if chunk not in self._decisions:
                self._decisions = RowDecisions({one.chunk: self._asked(one) for one in self._of_row(call)}, self._inbox)
            with self._counting_waits():
                state.decision, state.decided_at = self._decisions.take(chunk), chunk.step
            computed, some = isinstance(state.decision, Compute), state.decision.tokens if isinstance(state.decision, Refresh) else None
            self.report.decided(chunk, computed, chunk.frames * self._frame_tokens, state.drift, some)
        return state.decision

    def _of_row(self, call: Call) -> Iterator[Call]:
        """Of every chunk of the row what it will be called with, as far as policies look at it; this call alone where they look at nothing."""
        chunks, film = self._row
        if film is None or call.chunk not in chunks or not self._looks_at_latents:
            chunks, film = (call.chunk,), call.x
        for chunk in chunks:
            if chunk == call.chunk:
                yield call
            else:
                x = film[:, :, chunk.start : chunk.start + chunk.frames].to(call.x).contiguous()
                yield replace(call, x=x, sigma=self.level(chunk), chunk=chunk)

    @property
    def _looks_at_latents(self) -> bool:
        """Whether decisions depend on what the latents are: not where a plan makes them, nor where all changes are known before the run."""
        policy = self.policy
        known = isinstance(policy, SignaturePolicy) and policy.follows_time and self._watches is None
        return not (known or isinstance(policy, Always | PlanPolicy))

    def _asked(self, call: Call) -> Decision | Deferred:
        chunk = call.chunk
        grid = (chunk.frames, *self._grid)
        signals = StepSignals(call, self.films, grid, self.state, self.outlook(call.x.device), self._tokens)
        return self.policy.decide(chunk, signals, self.state.of(chunk.index))

    def _narrow(self, state: ChunkState, which: Which) -> None:
        """Branches are run without some that were run beside and after them: what is kept of these is let go."""
        count = len(which.branches)
        for known in [key for key in state.predictions if isinstance(key, Which) and key != which]:
            if replace(known, branches=known.branches[:count]) == which:
                state.narrow(known, which, count / len(known.branches))

    def _compute(self, call: Call, which: Which, only: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Velocity and residual of the chunk; of `only` some of its tokens, the velocity in its place and the residual in their order."""
        self._locate()
        branches = which.branches
        if not branches:
            self._kv.layout.begin(call.chunk.index)
            tokens = call.chunk.frames * self._frame_tokens if only is None else len(only)
            return call.x[:0], call.x.new_empty(0, tokens, self.adapter.width)
        cached = tuple(branch for branch in branches if branch not in self._alone)
        history = self._kv.attention(cached, call.chunk, only, which.blocks is not None, which.aside)
        attend: Attend = history if cached == branches else BesideHistory(history, len(cached) * self.films)
        timed_only = self.plan is None or call.chunk.committing
        with self.report.clock.measure("network", call.x.device, () if timed_only else ((call.chunk.index, call.chunk.step),)):
            out = self.adapter.forward(call, attend) if only is None or self._tokens is None else self._tokens.refresh(call, only, attend)
        self.report.kv_bytes(self._kv.bytes)
        return out

    def _compute_row(self, calls: Sequence[Call], branches: Branches) -> Tensor:
        assert isinstance(self.adapter, RowAdapter)
        self._locate()
        chunks = [call.chunk for call in calls]
        lengths = [chunk.frames * self._frame_tokens for chunk in chunks]
        attend = RowAttention([self._kv.attention(branches, chunk) for chunk in chunks], lengths)
        at = [] if self.plan is None else [(chunk.index, chunk.step) for chunk in chunks]
        with self.report.clock.measure("network", calls[0].x.device, at):
            out = self.adapter.forward_row(calls, attend)
        self.report.kv_bytes(self._kv.bytes)
        return out

    def _keep(self, call: Call, state: ChunkState, which: Which, velocity: Tensor, residual: Tensor, only: Tensor | None = None) -> None:
        if only is not None and (self.policy.keeps == "residual" or self._watches == "output"):
            whole = residual.new_zeros(len(residual), call.chunk.frames * self._frame_tokens, residual.shape[2])
            residual = whole.index_copy_(1, only, residual)
        if self.policy.keeps:
            value = velocity if self.policy.keeps == "velocity" else residual
            state.keep(which, call.sigma, value, None if only is None else self._mask(call.chunk, value, only))
        if self._watches == "output" and which == next(iter(state.predictions), which):
            mine, old = residual[: self.films], state.residual
            if self.policy.keeps == "residual":
                state.residual = state.latest[-1].value[: self.films]
            else:
                state.residual = mine.clone() if only is None or old is None else torch.where(self._mask(call.chunk, mine, only), mine, old)

    def _mask(self, chunk: Chunk, value: Tensor, tokens: Tensor) -> Tensor:
        return mask_over(value, tokens, (chunk.frames, *self._grid))

    def _replay(self, call: Call, state: ChunkState, which: Which, what: Replay, order: int) -> Tensor:
        if not which.branches:
            return call.x[:0]
        value = state.predict(which, call.sigma, order)
        return value if what == "velocity" else self.adapter.replay(call, value)

    def guide(self, branches: tuple[str, ...], remembered: tuple[str, ...], own: tuple[str, ...]) -> None:
        """Once a run, where guidance is inside: all `branches`, and a KV cache for those that are evaluated here, its `own`.

        Then the context of `denoise` is the prompt's [batch, words, channels], and it runs all of its own or the first so many. Those that
        are not `remembered` see their own chunk alone and need no KV cache, unless some of its tokens are run without the others.
        """
        if self._guided:
            return
        self._guided = branches
        self._alone = () if self._tokens else branches[len(remembered) :]
        self._kv.of(tuple(branch for branch in own if branch not in self._alone))

    def _text_of(self, context: Tensor, branches: Branches, chunk: Chunk, texts: Hashable) -> object:
        names: Texts = (self._guided or branches, texts)
        if names not in self._text:
            self._text[names] = self.adapter.text(self._of_branches(context))
        self._last[names] = max(chunk.index, self.reads, self._last.get(names, 0))
        if not isinstance(self.adapter, ChunkTexts):
            return self._text[names]
        key = names, chunk.index
        if key not in self._chunk_text:
            self._chunk_text[key] = self.adapter.text_of(self._text[names], chunk, self.schedule.chunks)
        return self._chunk_text[key]

    def _of_branches(self, context: Tensor) -> Any:
        if not self._guided:
            return context
        assert isinstance(self.adapter, OwnTexts)  # the run was refused otherwise
        return self.adapter.branch_texts(context, self._guided)

    def _forget_texts(self, index: int) -> None:
        """A chunk is finished: what only it and earlier ones have read goes, as far as later ones read something else."""
        self._chunk_text = {key: text for key, text in self._chunk_text.items() if key[1] != index}
        newest = dict[Branches, int]()
        for (branches, _), last in self._last.items():
            newest[branches] = max(last, newest.get(branches, 0))
        self._last = {names: last for names, last in self._last.items() if last > index or last == newest[names[0]]}
        self._text = {names: text for names, text in self._text.items() if names in self._last}

    def time_changes(self, device: torch.device) -> list[float]:
        if self._time_changes is None:
            self._time_changes = require_time(self.adapter).time_changes(self.sigmas[:-1], self.fps, device)
        return self._time_changes


def plan_of(policy: CachePolicy, schedule: ChunkSchedule) -> Plan | None:
    """What a policy settles before a run: everything where it decides while the run goes on, None where it has to time an evaluation first."""
    if not isinstance(policy, PlanPolicy):
        return Plan.full(schedule)
    return None if policy.seconds else policy.plan(schedule)
