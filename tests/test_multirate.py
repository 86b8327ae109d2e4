"""Motion Cache by a plan: every token on a path of its own, within a budget, in step, and nobody waits for the device."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from flowcache_core.kernels.tokens import pooled
from flowcache_core.kv.cache import CachedAttention, KVCache, KVSizes
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores.even import Even
from flowcache_core.kv.waiting import Waiting
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.policies import Motion, Multirate, Planned
from flowcache_core.policies.multirate import COMPARISON
from flowcache_core.policies.protocol import Outlook, PartPolicy, PlanPolicy, TokenPolicy
from flowcache_core.run.footprint import footprint
from flowcache_core.run.report import COMPUTED, REFRESHED, RunReport
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.given import GivenNoise
from flowcache_core.sampling.histories import Histories
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.path import Path
from flowcache_core.sampling.plan import Plan
from flowcache_core.sampling.planner import plan_for, steps_in_part
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler, Multistep, Renoise, Solver, UniPC
from flowcache_core.sampling.walk import CellWalk
from tests.driven import Driven

Noise = Callable[..., Tensor]
SIDE, TOKENS = 8, 16
FILM = ChunkSchedule(8, 3, 20, 3)
"""Three chunks, the last of them short."""
UNIPC = UniPC()
SCHEDULES = [FILM, ChunkSchedule(9, 3, 50, 5), ChunkSchedule(7, 3, 16, 16), ChunkSchedule(9, 3, 20, 0, None, 2, 1), ChunkSchedule(15, 3, 30, 10, 3)]


def film(net: SkyReelsV2, texts: Tensor, noise: Tensor, policy: PlanPolicy, schedule: ChunkSchedule = FILM, solver: Solver = UNIPC,
         cfg: float = 2.0, apart: bool = False, compressor: Compressor | None = None) -> tuple[Tensor, RunReport]:  # fmt: skip
    """Guided, the branches in one batch or `apart`."""
    adapter, levels, grid = SkyReelsAdapter(net), flow_sigmas(schedule.steps), tuple(noise.shape[3:])
    budget = compressor.budget_for(adapter, schedule, grid, 24, 2, noise.element_size(), noise.device) if compressor else None
    light = GivenNoise(20, 0)
    with Session(adapter, schedule, levels, grid, noise.shape[0], policy, prefix_sigma=light.sigma, budget=budget) as session:

        def predict(x: Tensor, chunk: Chunk) -> Tensor:
            if apart:
                parts = [session.denoise(x, chunk, texts[i : i + 1].expand(len(x), -1, -1), (i,)) for i in range(2)]
            else:
                parts = list(session.denoise(x.repeat(2, 1, 1, 1, 1), chunk, texts.repeat_interleave(len(x), 0), (0, 1)).chunk(2))
            return parts[1] + cfg * (parts[0] - parts[1])

        out = sample_chunks(Driven(predict, session), noise, schedule, levels, solver, light)  # fmt: skip
    return out, session.report


@dataclass(frozen=True)
class Refining(Multirate):
    """The plan for whole chunks, of which some steps are in part all the same."""

    def plan(self, schedule: ChunkSchedule, together: bool = False) -> Plan:
        plan = plan_for(schedule, self.share)
        return replace(plan, partial=tuple(map(steps_in_part, plan.computed)), part=self.partial)


# the plan


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("share", [0.1, 0.13, 0.2, 0.5])
@pytest.mark.parametrize("part", [0.15, 1 / 3, 0.7])
def test_the_finer_plan_is_in_step_and_keeps_the_budget(schedule: ChunkSchedule, share: float, part: float) -> None:
    plan = Multirate(share=share, partial=part).plan(schedule).check(schedule)
    assert plan.share(schedule) <= max(share, plan_for(schedule, 0.0).share(schedule)) + 1e-9
    whole = plan_for(schedule, share)
    assert sum(map(len, plan.computed)) >= sum(map(len, whole.computed))
    for steps, some in zip(plan.computed, plan.partial, strict=True):
        kinds = "".join("p" if s in some else "w" for s in steps)
        assert not kinds or (kinds.endswith("w") and kinds.startswith("ww"[: len(kinds)]) and "pp" not in kinds)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_part_one_is_the_plan_for_whole_chunks(schedule: ChunkSchedule) -> None:
    assert Multirate(share=0.2, partial=1.0).plan(schedule) == plan_for(schedule, 0.2)
    assert Multirate(share=1.0).plan(schedule) == Plan.full(schedule)


def test_a_plan_in_part_survives_json_and_one_that_cannot_be_walked_is_refused() -> None:
    plan = Multirate(share=0.4).plan(FILM)
    assert any(plan.partial)
    assert Plan.from_dict(plan.as_dict()) == plan
    steps = plan.computed[0]
    for wrong in (steps[1], steps[-1], next(s for s in range(20) if s not in steps)):
        with pytest.raises(ValueError, match=r"neither the first two of a chunk nor its last"):
            replace(plan, partial=((wrong,), (), ())).check(FILM)
    with pytest.raises(ValueError, match="a part above 0 and at most 1"):
        replace(plan, part=0.0).check(FILM)
    with pytest.raises(ValueError, match='"partial" must be a list of lists'):
        Plan.from_dict(plan.as_dict() | {"partial": 3})


# the solver


def test_pasts_are_those_of_every_place_by_itself() -> None:
    rng, histories = random.Random(1), Histories()
    seen: list[list[int]] = [[] for _ in range(12)]
    for step in range(0, 60, 3):
        chosen = torch.tensor([rng.random() < 0.4 for _ in range(12)]).view(3, 2, 2) if step > 3 and step % 4 else None
        histories.computed(step, chosen)
        for place, past in enumerate(seen):
            past += [step] if chosen is None or chosen.flatten()[place] else []
        lasts = histories.laid_out([past[-1] for past in histories.known], torch.float64)
        assert torch.broadcast_to(torch.as_tensor(lasts), (3, 2, 2)).flatten().tolist() == [past[-1] for past in seen]
        if step > 3:
            before = histories.laid_out([past[-2] for past in histories.known], torch.float64)
            assert torch.broadcast_to(torch.as_tensor(before), (3, 2, 2)).flatten().tolist() == [past[-2] for past in seen]


@pytest.mark.parametrize("kind", [Multistep(), Euler(), Multistep(sums=True), Renoise()], ids=["multistep", "euler", "sums", "renoise"])
@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("first", [0, 3])
def test_every_cell_moves_as_the_solver_moves_it_on_its_own_path(kind: Multistep | Euler | Renoise, first: int, jump: bool) -> None:
    """Groups of cells that are computed at random steps of their own, against the solver on each group alone."""
    rng, levels, groups = random.Random(first), flow_sigmas(24), 5
    steps = sorted({first, first + 2, 23, *rng.sample(range(first + 3, 23), 12)})
    owner = torch.randint(groups, (3, 4, 4))
    whole = {steps[0], steps[1], steps[-1], steps[6]}
    jumps = (steps[6],) if jump else ()
    own = [[s for s in steps if s in whole or rng.random() < 0.4] for _ in range(groups)]
    target, noise = torch.randn(2, 1, 4, 3, 4, 4, dtype=torch.float64).unbind(0)

    def velocity(x: Tensor, step: int) -> Tensor:
        return (x - torch.tanh(3 * target + x)) / levels[step]

    generator = torch.Generator().manual_seed(7)
    walk, x = CellWalk(kind.order, levels, 23, jumps, getattr(kind, "sums", False), generator if isinstance(kind, Renoise) else None), noise.clone()
    for step in steps:
        chosen = None if step in whole else torch.stack([owner == g for g in range(groups) if step in own[g]] or [owner < 0]).any(0)
        arrived = walk.arrive(x, step)
        x, clean = walk.step(x, arrived, velocity(arrived, step), step, chosen)
        assert clean.shape == x.shape
    for group in range(groups):
        alone, memory, path = noise.clone(), kind.start(generator), Path(levels, tuple(own[group]), jumps)
        for number, step in enumerate(own[group]):
            alone = kind.step(alone, velocity(alone, step), number, path, memory)
        mine = (owner == group).expand_as(x)
        torch.testing.assert_close(x[mine], alone[mine], rtol=1e-10, atol=1e-12)


def test_the_rate_is_the_last_change_carried_on_over_the_time_waited() -> None:
    walk, x, levels = CellWalk(2, flow_sigmas(20), 19), torch.randn(2, 4, 1, 2, 2, dtype=torch.float64), flow_sigmas(20)
    cleans = []
    chosen = torch.tensor([[[True, False], [False, True]]])
    for step, some in ((0, None), (4, None), (6, chosen)):
        arrived = walk.arrive(x, step)
        velocity = torch.randn_like(x)
        cleans.append(arrived - levels[step] * velocity)
        x, _ = walk.step(x, arrived, velocity, step, some)
    again = (cleans[2] - cleans[1]).square().sum(1).mean(0) * (3 / 2) ** 2
    waiting = (cleans[1] - cleans[0]).square().sum(1).mean(0) * (5 / 4) ** 2
    torch.testing.assert_close(walk.rate(9), torch.where(chosen, again, waiting))


# keys and values


def test_keys_and_values_that_wait_go_on_along_a_line() -> None:
    """Exact where they are linear in the step, whatever was computed when; what is attended to is the cache."""
    torch.manual_seed(2)
    (at, slope), waiting = torch.randn(2, 2, 2, 3, 6, 4, dtype=torch.float64).unbind(0), Waiting(6)
    cache = KVCache((0, 1), KVSizes(1, 2, 3, 4, 9))
    for step, only in ((0, None), (3, None), (5, [1, 4]), (8, [0, 1]), (9, None), (13, [5])):
        tokens = None if only is None else torch.tensor(only)
        waiting.begin(step, tokens)
        for layer in range(2):
            true = torch.stack([at[layer] + step * slope[layer], -step * slope[layer]])
            fresh = true if tokens is None else true[:, :, :, tokens]
            q = torch.randn(2, 3, fresh.shape[3], 4, dtype=torch.float64)
            out = CachedAttention(cache, slice(None), 0, 3, 9, tokens, waiting=waiting)(layer, q, *fresh, q)
            keys, values = cache.read(layer, slice(None), 0, 9)
            torch.testing.assert_close(torch.stack([keys[:, :, 3:], values[:, :, 3:]]), true)
            torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, keys, values))


# runs


@pytest.mark.parametrize("solver", [UniPC(), Euler(), Renoise()])
def test_refreshing_all_tokens_makes_the_film_of_the_chunk_plan(net: SkyReelsV2, texts: Tensor, noise_of: Noise, solver: Solver) -> None:
    """To rounding: the steps in part go through the refresh of a list, the lines of the KV cache and the solver by cells."""
    noise = noise_of(8, side=SIDE)
    plain, _ = film(net, texts, noise, Planned(share=0.5), solver=solver)
    again, report = film(net, texts, noise, Refining(share=0.5, partial=1.0), solver=solver)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)
    assert report.chunk_steps_refreshed > 3
    assert torch.equal(film(net, texts, noise, Multirate(share=0.5, partial=1.0), solver=solver)[0], plain)


@pytest.mark.parametrize("sides", [(4, 10), (10, 4)])
def test_a_picture_need_not_be_square(net: SkyReelsV2, texts: Tensor, sides: tuple[int, int]) -> None:
    noise = torch.randn(1, 16, 8, *sides)
    plain, _ = film(net, texts, noise, Planned(share=0.5))
    again, report = film(net, texts, noise, Refining(share=0.5, partial=1.0))
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)
    assert report.chunk_steps_refreshed > 3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_run_computes_what_its_plan_says_within_its_share_and_waits_for_nothing(
    net: SkyReelsV2, texts: Tensor, noise_of: Noise, schedule: ChunkSchedule, share: float
) -> None:
    policy, noise = Multirate(share=share), noise_of(schedule.frames, side=SIDE)
    plan = policy.plan(schedule)
    out, report = film(net, texts, noise, policy, schedule)
    assert torch.isfinite(out).all()
    assert report.host_syncs == 0
    assert report.share <= share
    assert report.share == pytest.approx(plan.share(schedule), abs=1 / report.chunk_steps)
    assert report.share > share - 1.5 * max(schedule.span(k)[1] for k in range(schedule.chunks)) * TOKENS / report.tokens
    for k, (steps, some) in enumerate(zip(plan.computed, plan.partial, strict=True)):
        assert {s for s in range(schedule.steps) if report.map[k, s] == REFRESHED} == set(some)
        assert {s for s in range(schedule.steps) if report.map[k, s] == COMPUTED} == set(steps) - set(some)
        tokens = schedule.span(k)[1] * TOKENS
        assert all(report.shares[k, s] == pytest.approx(int(tokens / 4) / tokens) for s in some)
    start, end = schedule.prefix, schedule.frames - schedule.suffix
    assert torch.equal(out[:, :, :start], noise[:, :, :start])
    assert torch.equal(out[:, :, end:], noise[:, :, end:])
    assert report.visits is not None
    assert report.visits[schedule.span(schedule.given)[0] : end].sum() <= report.tokens_computed
    for k in range(schedule.given, schedule.chunks):
        first, count = schedule.span(k)
        assert report.visits[first : first + count].min() >= len(plan.computed[k]) - len(plan.partial[k])


def test_two_runs_are_equal_and_branches_may_run_apart(net: SkyReelsV2, texts: Tensor, noise_of: Noise) -> None:
    policy, noise = Multirate(share=0.4), noise_of(8, side=SIDE, batch=2)
    first, _ = film(net, texts, noise, policy)
    film(net, texts, noise_of(8, seed=4, side=12), policy, cfg=1.5)
    assert torch.equal(film(net, texts, noise, policy)[0], first)
    torch.testing.assert_close(film(net, texts, noise, policy, apart=True)[0], first, rtol=1e-4, atol=1e-4)


def test_a_history_in_a_budget_works_and_one_with_room_for_all_changes_nothing(net: SkyReelsV2, texts: Tensor, noise_of: Noise) -> None:
    schedule, policy, noise = ChunkSchedule(15, 3, 12, 6), Multirate(share=0.5), noise_of(15, side=SIDE)
    plain, _ = film(net, texts, noise, policy, schedule)
    room, _ = film(net, texts, noise, policy, schedule, compressor=Compressor(Even(), 5))
    assert torch.equal(room, plain)
    small, report = film(net, texts, noise, policy, schedule, compressor=Compressor(Even(), 2, dtype="int8"))
    assert torch.isfinite(small).all()
    assert max(report.history.tokens) <= 2 * 3 * TOKENS


class Stopped(Exception):
    """Raised in mid-run."""


@pytest.mark.parametrize("stop", [False, True])
def test_nothing_that_waits_outlives_its_chunk_or_its_run(net: SkyReelsV2, texts: Tensor, noise_of: Noise, stop: bool) -> None:
    schedule, levels, policy = ChunkSchedule(9, 3, 12, 4), flow_sigmas(12), Multirate(share=0.5)
    active = {(chunk.index, chunk.step): {c.index for c in row.active} for row in schedule.rows for chunk in row.active}
    with Session(SkyReelsAdapter(net), schedule, levels, (SIDE, SIDE), policy=policy) as session:

        def predict(x: Tensor, chunk: Chunk) -> Tensor:
            out = session.denoise(x, chunk, texts[:1], (0,))
            assert {index for index, _ in session._kv._waiting} <= active.get((chunk.index, chunk.step), {0, 1, 2})
            if stop and session.report.chunk_steps_refreshed == 3:
                raise Stopped
            return out

        try:
            sample_chunks(Driven(predict, session), noise_of(9, side=SIDE), schedule, levels, UniPC())
        except Stopped:
            assert stop
            assert session._kv._waiting
        else:
            assert not session._kv._waiting
    assert len(session.state) == session._kv.bytes == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_footprint_is_what_a_run_holds(net: SkyReelsV2, texts: Tensor, noise_of: Noise, schedule: ChunkSchedule) -> None:
    policy = Multirate(share=0.4)
    _, report = film(net, texts, noise_of(schedule.frames, side=SIDE), policy, schedule)
    said = footprint(SkyReelsAdapter(net), schedule, (16, SIDE, SIDE), 2, 2 * texts.shape[1], 4, policy, plan=policy.plan(schedule))
    assert report.kv_peak_bytes == said.kv


def test_a_branch_without_a_past_runs_whole(net: SkyReelsV2, texts: Tensor, noise_of: Noise) -> None:
    x, chunk = noise_of(3, side=SIDE), Chunk(0, 0, 3, 0, 6)
    with Session(SkyReelsAdapter(net), ChunkSchedule(3, 3, 6), flow_sigmas(6), (SIDE, SIDE), policy=Refining(share=1.0)) as session:
        for step in range(2):
            session.denoise(x, replace(chunk, step=step), texts[:1], (0,))
        session.choose(replace(chunk, step=2), torch.rand(3, SIDE, SIDE))
        some = session.denoise(x, replace(chunk, step=2), texts[:1], (0,))
        assert session.report.as_dict()["map"] == ["223000"]
        every = session.denoise(x, replace(chunk, step=2), texts[1:], (1,))
        assert session.report.as_dict()["map"] == ["222000"]
        assert some.count_nonzero() < every.count_nonzero() == every.numel()
    assert session.report.visits is not None
    assert (session.report.visits == 3).all()


# the policy


def test_the_tokens_of_largest_rate_are_chosen_without_a_wait() -> None:
    policy, rate = Multirate(), torch.rand(3, 4, 4)
    chosen = policy.choose(rate, 16)
    assert set(chosen.tolist()) == set(rate.flatten().argsort(descending=True)[:16].tolist())
    assert chosen.diff().gt(0).all()


@pytest.mark.parametrize(("part", "tokens", "computed"), [(0.05, 12, 1), (0.25, 12, 3), (0.3, 10, 3), (0.29, 10, 2), (1.0, 12, 12)])
def test_a_step_in_part_computes_no_more_than_its_part_and_at_least_a_token(part: float, tokens: int, computed: int) -> None:
    assert replace(Plan.full(FILM), part=part).tokens_of(tokens) == computed


def test_nothing_in_a_step_reads_a_number_back() -> None:
    """It runs on the meta device, where there is none."""
    levels, policy = flow_sigmas(20), Multirate()
    walk, waiting, x = CellWalk(2, levels, len(levels) - 2), Waiting(12), torch.zeros(1, 4, 3, 4, 4, device="meta")
    cache = KVCache((0,), KVSizes(1, 1, 2, 8, 12))
    for step, count in ((0, 12), (2, 12), (5, 4), (9, 4), (12, 12), (15, 3), (19, 12)):
        tokens, chosen = None, None
        if count < 12:
            tokens = policy.choose(pooled(walk.rate(step), 2), count)
            chosen = torch.zeros(3, 4, 4, dtype=torch.bool, device="meta")
        waiting.begin(step, tokens)
        q = torch.zeros(1, 2, count, 8, device="meta")
        CachedAttention(cache, slice(None), 0, 0, 12, tokens, waiting=waiting)(0, q, q, q, q)
        x, _ = walk.step(x, walk.arrive(x, step), torch.zeros_like(x), step, chosen)
    assert len(walk.histories.known) <= 6


def test_it_is_a_policy_of_plans_and_says_where_chunks_do_better() -> None:
    policy, outlook = Multirate(), Outlook(3, flow_sigmas(50), list)
    assert isinstance(policy, PartPolicy)
    assert not isinstance(policy, TokenPolicy)
    assert not isinstance(Planned(), PartPolicy)
    assert not isinstance(Motion(), PartPolicy)
    assert policy.forecast(outlook) == Multirate(share=0.3).forecast(outlook) == (COMPARISON,)
    assert "at a fifth of the tokens and less, the plan of Chunkwise Cache did better" in COMPARISON
    timed = Multirate(seconds=40.0).timed(FILM, 1.0)
    assert 30 < timed.frames_computed(FILM) <= 40


@pytest.mark.parametrize("values", [{"share": 0.0}, {"partial": 0.0}, {"partial": 1.5}, {"seconds": -1.0}])
def test_settings_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="it must lie between"):
        Multirate(**values)


def test_what_cannot_be_run_in_part_is_refused(net: SkyReelsV2, noise_of: Noise) -> None:
    with pytest.raises(ValueError, match="set attention to block-causal"):
        Multirate().plan(FILM, together=True)

    class Plain:
        name, layers, heads, query_heads, head_dim, width, text_channels, rotary = "plain", 1, 1, 1, 4, 4, 4, None

        def __init__(self) -> None:
            own = SkyReelsAdapter(net)
            self.forward, self.text, self.replay, self.whole = own.forward, own.text, own.replay, own.whole
            self.tokens_per_frame, self.token_grid, self.time_changes = own.tokens_per_frame, own.token_grid, own.time_changes

    with pytest.raises(ValueError, match="runs single tokens, which plain cannot do here"):
        Session(Plain(), FILM, flow_sigmas(20), (SIDE, SIDE), policy=Multirate(share=0.4))
