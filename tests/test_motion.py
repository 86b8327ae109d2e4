"""Motion Cache as a policy: which tokens are due, and on what motion is seen."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache_core.kernels.tokens import frame_difference, mask_over, normalised, pooled
from flowcache_core.kernels.transfer import Inbox
from flowcache_core.models.adapter import Call
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_polynomials import POLYNOMIALS
from flowcache_core.network import Attend
from flowcache_core.policies import Chunkwise, Motion
from flowcache_core.policies.motion import BUCKETS, PRESETS, Released
from flowcache_core.policies.protocol import Compute, Decision, Outlook, Refresh, Reuse, Signals, Signature
from flowcache_core.policies.state import ChunkState
from flowcache_core.run.session import Session
from flowcache_core.run.signals import RowDecisions
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler
from tests.driven import Driven

Noise = Callable[..., Tensor]
GRID, SIDE, TOKENS = (3, 4, 4), 8, 16
BASE = Chunkwise(threshold=0.1, warmup_steps=1, max_reuse=1000)
FINE: dict[str, Any] = {"threshold": 0.1, "alpha": 0.2, "coarse": 0.0, "min_refresh": 0.0, "full_share": 1.0, "max_age": 1000, "base": BASE}


class Given:
    """Signals of a given sequence of changes and one map of motion, in a network of the size 1.3B."""

    outlook = Outlook(1, (1.0, 0.0), list, POLYNOMIALS[1536, 30])

    def __init__(self, changes: list[float], motion: Tensor) -> None:
        self.changes, self.seen, self.at, self.waits = changes, motion, 0, 0

    def change(self, signature: Signature) -> Tensor | float:
        return torch.tensor(self.changes[self.at]) if signature == "latent" else self.changes[self.at]

    def motion(self, measure: str) -> Tensor:
        return self.seen


def decide_all(policy: Chunkwise | Motion, changes: list[float], motion: Tensor) -> tuple[list[Decision], Given]:
    state, signals, out = ChunkState(), Given(changes, motion), []
    for step in range(len(changes)):
        signals.at = step
        chunk = Chunk(0, 0, len(motion), step, len(changes))
        inbox = Inbox()
        out.append(RowDecisions({chunk: policy.decide(chunk, signals, state)}, inbox).take(chunk))
        signals.waits += inbox.waits
    return out, signals


def letters(made: list[Decision]) -> str:
    return "".join({Compute: "C", Reuse: "r", Refresh: "f"}[type(d)] for d in made)


def random_changes(rng: random.Random, steps: int = 40) -> list[float]:
    return [0.0, *(rng.uniform(0.0, rng.choice([0.02, 0.1])) for _ in range(steps - 1))]


# decisions


@pytest.mark.parametrize("settings", [{"alpha": 1.0}, {"coarse": 1.0}])
def test_weight_one_and_coarse_only_decide_as_chunkwise(settings: dict[str, Any]) -> None:
    rng = random.Random(3)
    for _ in range(50):
        changes, threshold = random_changes(rng), rng.uniform(0.01, 0.5)
        base = Chunkwise(threshold=threshold, warmup_steps=rng.randint(1, 6), max_reuse=rng.randint(1, 9), order=1)
        made, _ = decide_all(Motion(base=base, **settings), changes, torch.rand(GRID))
        assert made == decide_all(base, changes, torch.rand(GRID))[0]


def test_without_a_base_the_coarse_phase_is_chunkwise_at_the_same_threshold() -> None:
    changes = random_changes(random.Random(4))
    made, _ = decide_all(Motion(threshold=0.07, coarse=1.0), changes, torch.rand(GRID))
    assert letters(made) == letters(decide_all(Chunkwise(threshold=0.07), changes, torch.rand(GRID))[0])


def test_where_everything_moves_alike_the_chunk_is_computed_or_reused_as_a_whole() -> None:
    rng = random.Random(5)
    for _ in range(20):
        changes = random_changes(rng)
        made, _ = decide_all(Motion(**FINE), changes, torch.ones(GRID))
        assert letters(made) == letters(decide_all(BASE, changes, torch.ones(GRID))[0])


def test_the_drift_of_the_coarse_phase_is_carried_into_the_fine_one() -> None:
    """Nothing is forgotten at the border: with equal weights it cannot be seen where it lies."""
    changes = random_changes(random.Random(6))
    whole = letters(decide_all(BASE, changes, torch.ones(GRID))[0])
    for coarse in (0.1, 0.25, 0.5, 0.9):
        assert letters(decide_all(Motion(**{**FINE, "coarse": coarse}), changes, torch.ones(GRID))[0]) == whole


def test_what_moves_is_never_refreshed_less_often() -> None:
    motion = torch.rand(GRID)
    made, _ = decide_all(Motion(**FINE), [0.0, *[0.03] * 200, 0.0], motion)
    visits = torch.zeros(motion.numel())
    for decision in made[1:-1]:
        if isinstance(decision, Refresh):
            visits[decision.tokens] += 1
        elif isinstance(decision, Compute):
            visits += 1
    weight = (FINE["alpha"] + (1 - FINE["alpha"]) * normalised(motion)).flatten()
    fast, slow = weight > 0.8, weight < 0.4
    assert visits[fast].min() > visits[slow].max() > 0


def test_weights_run_from_alpha_to_one_in_every_frame() -> None:
    motion = torch.tensor([[[1.0, 3.0, 2.0]], [[10.0, 10.0, 10.0]]])
    assert normalised(motion).tolist() == [[[0.0, 1.0, 0.5]], [[1.0, 1.0, 1.0]]]
    together = normalised(motion, together=True)
    assert together[0, 0, 0] == 0
    assert together[1].min() == 1


def test_a_quantile_keeps_one_fast_token_from_setting_the_scale() -> None:
    motion = torch.tensor([[[0.0, 1.0, 2.0, 3.0, 1000.0]]])
    assert normalised(motion)[0, 0, 3] < 0.01
    assert normalised(motion, 0.75)[0, 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])


def test_due_tokens_are_filled_up_to_a_bucket_with_the_next_most_due() -> None:
    motion = torch.rand(GRID)
    made, _ = decide_all(Motion(**FINE), [0.0, *[0.02] * 30, 0.0], motion)
    refreshed = [d for d in made if isinstance(d, Refresh)]
    size = motion.numel() // BUCKETS
    assert refreshed
    assert all(len(d.tokens) % size == 0 and d.tokens.diff().gt(0).all() for d in refreshed)
    order = normalised(motion).flatten().argsort(descending=True)
    first = refreshed[0].tokens
    assert set(first.tolist()) == set(order[: len(first)].tolist()), "all weights act on the same drift until the first refresh"


def test_a_few_due_tokens_wait_and_many_bring_the_whole_chunk() -> None:
    motion = torch.zeros(GRID)
    motion[:, 0, 0] = 1.0
    changes = [0.0, *[0.06] * 12, 0.0]
    waiting = letters(decide_all(Motion(**{**FINE, "min_refresh": 0.5, "full_share": 0.5}), changes, motion)[0])
    assert "f" not in waiting
    assert "r" in waiting
    assert "C" in waiting[1:-1]
    assert "f" in letters(decide_all(Motion(**FINE), changes, motion)[0])


@pytest.mark.parametrize("settings", [{}, {"min_refresh": 0.9, "full_share": 1.0}, {"vote": "agree"}])
def test_no_token_is_replayed_longer_than_allowed(settings: dict[str, Any]) -> None:
    policy = Motion(**{**FINE, "threshold": 10.0, "max_age": 4, **settings})
    made, _ = decide_all(policy, [0.0, *[0.01] * 40, 0.0], torch.rand(GRID))
    age = torch.zeros(GRID).flatten()
    for decision in made:
        age += 1
        if isinstance(decision, Compute):
            age[:] = 0
        elif isinstance(decision, Refresh):
            age[decision.tokens] = 0
        assert age.max() <= 4


def test_frames_vote_place_by_place() -> None:
    due = torch.zeros(3, 1, 3, dtype=torch.bool)
    due[:2, 0, 0] = True
    due[0, 0, 1] = True
    assert torch.equal(Motion()._voted(due), due)
    assert Motion(vote="widen")._voted(due)[:, 0].tolist() == [[True, True, False], [True, False, False], [True, False, False]]
    assert Motion(vote="agree")._voted(due)[:, 0].tolist() == [[True, False, False]] * 3


def test_one_wait_per_fine_step_and_none_where_the_chunk_must_run() -> None:
    policy = Motion(**{**FINE, "base": replace(BASE, signature="time", warmup_steps=3)})
    _, signals = decide_all(policy, [0.0, *[0.03] * 18, 0.0], torch.rand(GRID))
    assert signals.waits == 20 - 3 - 1


def test_the_last_step_is_always_computed() -> None:
    for policy in (Motion(), Motion(**{**FINE, "threshold": 10.0})):
        assert isinstance(decide_all(policy, [0.0] * 20, torch.rand(GRID))[0][-1], Compute)


def test_a_rescaled_change_below_zero_counts_as_none() -> None:
    policy = PRESETS["skyreels-v2"]
    changes = [0.0] * 5 + [0.001] * 14 + [0.0]
    assert letters(decide_all(policy, changes, torch.rand(GRID))[0]) == "C" * 5 + "r" * 14 + "C"
    assert letters(decide_all(policy, [0.0] * 5 + [0.05] * 14 + [0.0], torch.rand(GRID))[0]) != "C" * 5 + "r" * 14 + "C"


def by_token(rule: Motion, changes: list[float], weights: Tensor, warmup: int, coarse: Callable[[int, int], bool]) -> list[set[int]]:
    """The published rule as it is described, for weights that stay: the computed tokens. `coarse`: of the step, and the steps computed so far."""
    tokens, made, computed, drift = weights.flatten().tolist(), [], 0, 0.0
    each = [0.0] * len(tokens)
    for step, change in enumerate(changes):
        if coarse(step, computed):
            drift += change
            due = {*range(len(tokens))} if computed < warmup or drift >= rule.threshold else set()
            drift = 0.0 if due else drift
        else:
            each = [a + change * w for a, w in zip(each, tokens, strict=True)]
            due = {*range(len(tokens))} if step == len(changes) - 1 else {i for i, a in enumerate(each) if a >= rule.threshold}
            each = [0.0 if i in due else a for i, a in enumerate(each)]
        computed += len(due) == len(tokens)
        made.append(due)
    return made


@pytest.mark.parametrize("steps", [30, 64])
@pytest.mark.parametrize("released", [{"coarse_computed": 4}, {"coarse": 0.4}, {"coarse": 0.4, "opening": True}])
def test_as_released_exactly_the_due_tokens_are_computed_from_no_drift_on(released: dict[str, Any], steps: int) -> None:
    """Here changes and motion are multiples of a sixty-fourth, so that no sum is rounded."""
    rng, seen = random.Random(steps), set()
    for seed in range(10):
        rule = Released(**{**FINE, "alpha": 0.5, "threshold": 0.125, "base": replace(BASE, threshold=0.125, warmup_steps=3), **released})
        changes = [0.0, *(rng.randint(0, 6) / 64 for _ in range(steps - 1))]
        motion = torch.randint(9, GRID, generator=torch.Generator().manual_seed(seed)) / 8
        motion[:, 0, 0], motion[:, 0, 1] = 0.0, 1.0
        weights = 0.5 + 0.5 * motion
        weights[0] = 1.0 if rule.opening else weights[0]

        def coarse(step: int, computed: int, rule: Released = rule) -> bool:
            return computed < 3 + rule.coarse_computed if rule.coarse_computed else step < round(0.4 * steps)

        expected = by_token(rule, changes, weights, 3, coarse)
        made = [
            {*decision.tokens.tolist()} if isinstance(decision, Refresh) else {*range(48)} if isinstance(decision, Compute) else set[int]()
            for decision in decide_all(rule, changes, motion)[0]
        ]
        assert made == expected
        seen |= {len(due) for due in made}
    assert len(seen) > 5, "some steps must compute some of the tokens"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"threshold": -0.1}, r"threshold is -0\.1: it must lie between 0\.0 and 10\.0"),
        ({"alpha": 1.5}, r"alpha is 1\.5: it must lie between 0\.0 and 1\.0"),
        ({"coarse": -1}, "coarse is -1: it must lie between"),
        ({"measure": "depth"}, "measure is 'depth': use one of clean, noisy, output, change"),
        ({"quantile": 0.2}, r"quantile is 0\.2: it must lie between 0\.5 and 1\.0"),
        ({"max_age": 0}, "max_age is 0: it must lie between 1 and 1000"),
        ({"min_refresh": 0.9, "full_share": 0.5}, r"min_refresh 0\.9 is larger than full_share 0\.5: swap them"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_range(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Motion(**settings)


# what is measured


def test_the_first_frame_is_compared_with_the_chunk_before_it_or_takes_the_second_frame() -> None:
    x, before = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 2, 2)
    moved = frame_difference(x, before)
    torch.testing.assert_close(moved[0], (x[:, :, 0] - before).abs().mean((0, 1)))
    torch.testing.assert_close(moved[2], (x[:, :, 2] - x[:, :, 1]).abs().mean((0, 1)))
    alone = frame_difference(x, None)
    assert torch.equal(alone[0], alone[1])
    assert torch.equal(alone[1:], moved[1:])
    assert torch.equal(frame_difference(x[:, :, :1], None), torch.ones(1, 2, 2))


def test_relative_difference_is_over_the_frame_before() -> None:
    x = torch.tensor([2.0, 3.0, 1.5]).view(1, 1, 3, 1, 1)
    assert frame_difference(x, None, relative=True).flatten().tolist() == pytest.approx([0.5, 0.5, 0.5])


def test_a_token_has_the_mean_of_its_cells() -> None:
    cells = torch.arange(16.0).view(1, 4, 4)
    assert pooled(cells, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_a_mask_covers_the_cells_of_its_tokens() -> None:
    tokens = torch.tensor([1, 6])
    assert mask_over(torch.zeros(2, 8, 5), tokens, (2, 2, 2)).flatten().nonzero().flatten().tolist() == [1, 6]
    cells = mask_over(torch.zeros(2, 16, 2, 4, 4), tokens, (2, 2, 2))[0, 0]
    assert cells[0, :2, 2:].all()
    assert cells[1, 2:, :2].all()
    assert cells.sum() == 8


@pytest.mark.parametrize("measure", ["clean", "noisy", "output", "change"])
@pytest.mark.parametrize("replay", ["velocity", "residual"])
def test_motion_is_seen_on_the_tensor_it_is_named_after(net: SkyReelsV2, texts: Tensor, noise_of: Noise, measure: Any, replay: Any) -> None:
    """The maps that the policy is given are those computed here from the path of the run."""
    given: dict[int, Tensor] = {}
    schedule, sigmas, adapter = ChunkSchedule(6, 3, 5, 5), flow_sigmas(5), SkyReelsAdapter(net)
    path: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    class Watching(Motion):
        def decide(self, chunk: Chunk, signals: Signals, state: ChunkState) -> Decision:
            seen = signals.motion(self.measure)
            if chunk.index == 1:
                given[chunk.step] = seen
            return Compute()

    class Recording(SkyReelsAdapter):
        def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
            velocity, residual = super().forward(call, attend)
            path[call.chunk.index, call.chunk.step] = (call.x, velocity, call.x - call.sigma * velocity, residual)
            return velocity, residual

    policy = Watching(measure=measure, base=Chunkwise(replay=replay))
    with Session(Recording(net), schedule, sigmas, (SIDE, SIDE), policy=policy) as session:
        sample_chunks(Driven(lambda x, c: session.denoise(x, c, texts[:1], ("cond",)), session), noise_of(6, side=SIDE), schedule, sigmas, Euler())
    _, velocity, clean, residual = path[1, 3]
    now = path[1, 4][0]
    if measure == "noisy":
        expected = pooled(frame_difference(now, path[0, 5][0][:, :, -1]), (2, 2))
    elif measure == "clean":
        expected = pooled(frame_difference(clean, path[0, 5][0][:, :, -1]), (2, 2))
    elif measure == "output":
        out, last = net.embed(now) + residual, net.embed(path[0, 4][0]) + path[0, 3][3]
        out, last = (t.unflatten(1, GRID).movedim(-1, 1) for t in (out, last))
        expected = frame_difference(out, last[:, :, -1], relative=True)
    elif replay == "velocity":
        expected = pooled((velocity - path[1, 2][1]).abs().mean((0, 1)) / (sigmas[2] - sigmas[3]), (2, 2))
    else:
        expected = ((residual - path[1, 2][3]).abs().mean((0, 2)) / (sigmas[2] - sigmas[3])).view(GRID)
    torch.testing.assert_close(given[4], expected, rtol=1e-4, atol=1e-5)
    assert given[0].shape == GRID
    assert adapter.tokens_per_frame(SIDE, SIDE) == TOKENS
