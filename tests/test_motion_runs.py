"""Motion Cache in a run: what a refresh computes, and that the rest is replayed exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache_core.kernels.tokens import mask_over
from flowcache_core.kv.cache import CachedAttention, KVCache, KVSizes
from flowcache_core.models.adapter import Call, require_tokens
from flowcache_core.models.attention import BlockCausal
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.network import Attend
from flowcache_core.policies import Always, Chunkwise, Motion
from flowcache_core.policies.motion import PRESETS
from flowcache_core.policies.protocol import Compute, Decision, Deferred, Refresh, Signals
from flowcache_core.policies.state import ChunkState
from flowcache_core.run.report import REFRESHED, RunReport
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas, timestep
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler, Solver, UniPC
from tests.driven import Driven
from tests.formula import Fields

Cached = Callable[..., tuple[Tensor, RunReport]]
Noise = Callable[..., Tensor]
GRID, SIDE, TOKENS = (3, 4, 4), 8, 16
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BASE = Chunkwise(threshold=0.1, warmup_steps=1, max_reuse=1000)


# what a refresh computes


class PerFrame(SkyReelsAdapter):
    """Every frame of a chunk at a noise level of its own."""

    def _modulation(self, call: Call) -> tuple[Tensor, Tensor]:
        t = torch.tensor([[timestep(call.sigma * (1 - 0.2 * f)) for f in range(call.chunk.frames)]])
        return self.network.modulation(t, call.fps, call.x.dtype)


@pytest.mark.parametrize("kind", [SkyReelsAdapter, PerFrame])
@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_refreshed_rows_equal_the_rows_of_a_full_forward(
    net: SkyReelsV2, texts: Tensor, noise_of: Noise, kind: type[SkyReelsAdapter], window: int | None, share: float
) -> None:
    """At every place in the film, for both branches, with fresh keys and values in all other rows; all tokens are a full forward."""
    x, frames, sigma = noise_of(8, batch=2, side=SIDE), 8, 0.6
    schedule, adapter, text = ChunkSchedule(frames, 3, 50, 50, window), kind(net), net.text_kv(texts)
    cache = KVCache(("a", "b"), KVSizes(1, adapter.layers, adapter.heads, adapter.head_dim, frames * TOKENS))
    for k in range(schedule.chunks):
        start, count = schedule.span(k)
        place = max(0, k - (window or schedule.chunks) + 1) * 3 * TOKENS, start * TOKENS, (start + count) * TOKENS
        call = Call(x[:, :, start : start + count], sigma, Chunk(k, start, count, 0, 50), text, 24)
        velocity, residual = adapter.forward(call, CachedAttention(cache, slice(None), *place))
        tokens = torch.randperm(count * TOKENS)[: int(share * count * TOKENS)].sort().values
        for layer in range(adapter.layers):
            for buffer in cache.layer(layer, x):
                buffer[:, :, tokens + place[1]] = torch.nan
        again, part = adapter.refresh(call, tokens, CachedAttention(cache, slice(None), *place, tokens))
        chosen = mask_over(velocity, tokens, (count, 4, 4))
        torch.testing.assert_close(again, torch.where(chosen, velocity, 0), **CLOSE)
        torch.testing.assert_close(part, residual[:, tokens], **CLOSE)


def test_a_refresh_writes_its_rows_only_and_sees_the_whole_span() -> None:
    cache, (q, k, v) = KVCache(("a",), KVSizes(1, 1, 2, 16, 12)), torch.randn(3, 1, 2, 3, 16)
    keys, values = cache.layer(0, torch.empty(0))
    keys.normal_()
    values.normal_()
    before, tokens = keys.clone(), torch.tensor([0, 2, 5])
    out = CachedAttention(cache, slice(None), 2, 4, 10, tokens)(0, q, k, v, q)
    assert torch.equal(keys[:, :, tokens + 4], k)
    rest = [i for i in range(12) if i not in (4, 6, 9)]
    assert torch.equal(keys[:, :, rest], before[:, :, rest])
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, keys[:, :, 2:10], values[:, :, 2:10]), **CLOSE)


class Scripted(Motion):
    """Refreshes `count` tokens after two computed steps; others of them at every step."""

    count = 12

    def decide(self, chunk: Chunk, signals: Signals, state: ChunkState) -> Decision:
        if chunk.step < 2 or chunk.step == chunk.steps - 1:
            return Compute()
        every = torch.arange(chunk.frames * TOKENS).roll(7 * chunk.step)
        return Refresh(every[: self.count].sort().values, self.chunkwise.replay, self.chunkwise.order)


@pytest.mark.parametrize("replay", ["velocity", "residual"])
@pytest.mark.parametrize("order", [0, 1])
def test_a_run_that_refreshes_all_tokens_equals_the_uncached_run(cached: Cached, noise_of: Noise, replay: Any, order: int) -> None:
    class Everything(Scripted):
        count = 1000

    schedule, noise = ChunkSchedule(8, 3, 6, 2), noise_of(8, side=SIDE)
    plain, _ = cached(noise, schedule)
    film, report = cached(noise, schedule, policy=Everything(base=Chunkwise(replay=replay, order=order)))
    torch.testing.assert_close(film, plain, **CLOSE)
    assert report.chunk_steps_refreshed == 3 * 3
    assert report.share == 1


@pytest.mark.parametrize("solver", [Euler(), UniPC()])
@pytest.mark.parametrize("settings", [{}, {"coarse": 0.0}, {"base": Chunkwise(replay="residual")}, {"measure": "output"}])
def test_threshold_zero_is_exact(cached: Cached, noise_of: Noise, solver: Solver, settings: dict[str, Any]) -> None:
    schedule = ChunkSchedule(8, 3, 6, 2)
    plain, _ = cached(noise_of(8), schedule, solver)
    film, report = cached(noise_of(8), schedule, solver, Motion(threshold=0, **settings))
    assert torch.equal(film, plain)
    assert report.chunk_steps_computed == report.chunk_steps == 18


def test_a_base_of_threshold_zero_is_exact_too(cached: Cached, noise_of: Noise) -> None:
    schedule = ChunkSchedule(6, 3, 6, 2)
    assert torch.equal(cached(noise_of(6), schedule)[0], cached(noise_of(6), schedule, policy=Motion(base=Chunkwise(threshold=0)))[0])


def test_the_last_two_values_are_kept_token_by_token() -> None:
    state, two = ChunkState(), torch.tensor([[[True], [False]]])
    for sigma, value in ((0.9, 1.0), (0.8, 2.0)):
        state.keep("a", sigma, torch.full((1, 2, 1), value))
    state.keep("a", 0.6, torch.full((1, 2, 1), 5.0), two)
    assert state.predict("a", 0.6, 0).flatten().tolist() == [5.0, 2.0]
    assert state.predict("a", 0.6, 1).flatten().tolist() == pytest.approx([5.0, 4.0])
    assert state.predict("a", 0.4, 1).flatten().tolist() == pytest.approx([8.0, 6.0])
    state.keep("a", 0.5, torch.full((1, 2, 1), 0.0), ~two)
    assert state.predict("a", 0.5, 1).flatten().tolist() == pytest.approx([6.5, 0.0])
    assert state.predict("a", 0.2, 1).flatten().tolist() == pytest.approx([11.0, -2.0])


class TokenFields(Fields):
    """A refresh gives the formula for the tokens asked for."""

    patch = 2

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        return self.field(call.sigma), call.x.new_zeros(1, 48, 4)

    def refresh(self, call: Call, tokens: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        velocity, residual = self.forward(call, attend)
        return torch.where(mask_over(velocity, tokens, GRID), velocity, 0), residual[:, tokens]

    def output(self, call: Call, residual: Tensor) -> Tensor:
        return residual

    def whole(self, x: Tensor, sigmas: Any, text: Any, fps: int) -> Tensor:
        return self.field(sigmas[0])


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("linear", [False, True])
def test_replayed_tokens_are_exact_on_a_linear_field(order: int, linear: bool) -> None:
    """Integrated with the current step size: exact at order 0 where the velocity is constant, at order 1 where it is linear."""
    noise, a, b = torch.randn(3, 1, 16, 3, SIDE, SIDE, dtype=torch.float64)
    schedule, sigmas = ChunkSchedule(3, 3, 20), flow_sigmas(20)

    def film(policy: Motion | None) -> Tensor:
        with Session(TokenFields(lambda sigma: a + linear * sigma * b), schedule, sigmas, (SIDE, SIDE), policy=policy) as session:
            return sample_chunks(Driven(lambda x, chunk: session.denoise(x, chunk, x, ("cond",)), session), noise, schedule, sigmas, Euler())

    error = (film(Scripted(base=Chunkwise(order=order))) - film(None)).abs().max()
    assert error > 1e-3 if linear and order == 0 else error < 1e-5


# whole runs

RUN = Motion(
    threshold=0.05, alpha=0.1, coarse=0.3, min_refresh=0.0, full_share=0.9, base=Chunkwise(threshold=0.05, warmup_steps=2, signature="latent")
)


@pytest.mark.parametrize("measure", ["clean", "noisy", "output", "change"])
def test_a_run_refreshes_in_part_and_its_report_adds_up(cached: Cached, noise_of: Noise, measure: Any) -> None:
    schedule = ChunkSchedule(8, 3, 16, 4)
    plain, _ = cached(noise_of(8, side=SIDE), schedule)
    film, report = cached(noise_of(8, side=SIDE), schedule, policy=replace(RUN, measure=measure))
    assert report.chunk_steps_refreshed > 3
    assert 0 < report.share < 1
    assert 0 < (film - plain).abs().mean() < 0.3 * plain.abs().mean()
    assert report.visits is not None
    assert report.visits.shape == (8, 4, 4)
    assert report.visits.sum() + (8 - 2) * TOKENS == report.tokens_computed
    assert report.visits.max() <= schedule.steps
    counts = [(report.shares[k] * schedule.span(k)[1] * TOKENS).round().sum() for k in range(3)]
    assert sum(counts) == report.visits.sum()
    assert ((report.shares > 0) & (report.shares < 1)).sum() == report.chunk_steps_refreshed == (report.map == REFRESHED).sum()
    said = report.as_dict()
    assert "3" in said["map"][0]
    assert said["shares"][0][0] == 1.0
    assert f" and {report.chunk_steps_refreshed} in part, {report.share:.0%} of all tokens" in report.summary()
    assert report.host_syncs <= report.chunk_steps


@pytest.mark.parametrize("name", PRESETS)
def test_published_constants_run(cached: Cached, noise_of: Noise, name: str) -> None:
    film, report = cached(noise_of(6, side=SIDE), ChunkSchedule(6, 3, 16, 4), policy=PRESETS[name])
    assert torch.isfinite(film).all()
    assert report.host_syncs <= report.chunk_steps


def guided(net: SkyReelsV2, texts: Tensor, noise: Tensor, cfg: float = 3.0, apart: bool = False, policy: Motion = RUN, steps: int = 12) -> Tensor:
    schedule, sigmas = ChunkSchedule(noise.shape[2], 3, steps, 3), flow_sigmas(steps)
    with Session(SkyReelsAdapter(net), schedule, sigmas, tuple(noise.shape[3:]), policy=policy) as session:  # type: ignore[arg-type]

        def predict(x: Tensor, chunk: Chunk) -> Tensor:
            if apart:
                cond, uncond = (session.denoise(x, chunk, texts[i : i + 1], (i,)) for i in (0, 1))
            else:
                cond, uncond = session.denoise(x.repeat(2, 1, 1, 1, 1), chunk, texts, (0, 1)).chunk(2)
            return uncond + cfg * (cond - uncond)

        film = sample_chunks(Driven(predict, session), noise, schedule, sigmas, Euler())
    assert session.report.chunk_steps_refreshed > 0
    return film


@pytest.mark.parametrize("measure", ["clean", "output"])
def test_both_branches_follow_one_mask_however_they_are_batched(net: SkyReelsV2, texts: Tensor, noise_of: Noise, measure: Any) -> None:
    policy, noise = replace(RUN, measure=measure), noise_of(6, side=SIDE)
    torch.testing.assert_close(guided(net, texts, noise, apart=True, policy=policy), guided(net, texts, noise, policy=policy), rtol=1e-4, atol=1e-4)


def test_nothing_of_a_run_survives_into_the_next(net: SkyReelsV2, texts: Tensor, noise_of: Noise) -> None:
    """Another size, length, seed and guidance in between, and a run that is stopped among its refreshes."""
    first = guided(net, texts, noise_of(6, side=SIDE))
    guided(net, texts, noise_of(9, seed=4, side=12), cfg=1.5)

    class Stopping(Motion):
        seen = 0

        def decide(self, chunk: Chunk, signals: Signals, state: ChunkState) -> Decision | Deferred:
            Stopping.seen += isinstance(state.decision, Refresh)
            if Stopping.seen == 3:
                raise KeyboardInterrupt
            return super().decide(chunk, signals, state)

    schedule, sigmas = ChunkSchedule(6, 3, 12, 3), flow_sigmas(12)
    stopping = Stopping(**{f.name: getattr(RUN, f.name) for f in fields(RUN)})
    session = Session(SkyReelsAdapter(net), schedule, sigmas, (SIDE, SIDE), policy=stopping)
    with pytest.raises(KeyboardInterrupt), session:
        sample_chunks(Driven(lambda x, c: session.denoise(x, c, texts[:1], (0,)), session), noise_of(6, side=SIDE), schedule, sigmas, Euler())
    assert len(session.state) == 0
    assert not session.state.edges
    assert session._kv.bytes == 0
    assert torch.equal(guided(net, texts, noise_of(6, side=SIDE)), first)


def test_edges_of_chunks_that_are_history_are_forgotten(net: SkyReelsV2, texts: Tensor, noise_of: Noise) -> None:
    schedule, sigmas, most = ChunkSchedule(12, 3, 6, 6), flow_sigmas(6), 0
    with Session(SkyReelsAdapter(net), schedule, sigmas, (4, 4), policy=RUN) as session:

        def predict(x: Tensor, chunk: Chunk) -> Tensor:
            nonlocal most
            out = session.denoise(x, chunk, texts[:1], (0,))
            most = max(most, len(session.state.edges))
            return out

        sample_chunks(Driven(predict, session), noise_of(12), schedule, sigmas, Euler())
    assert most == 2


def test_a_branch_without_a_past_runs_whole(net: SkyReelsV2, texts: Tensor, noise_of: Noise) -> None:
    """A branch that joins late has nothing to replay: it is computed, and the report says so."""
    x, chunk = noise_of(3, side=SIDE), Chunk(0, 0, 3, 0, 6)
    with Session(SkyReelsAdapter(net), ChunkSchedule(3, 3, 6), flow_sigmas(6), (SIDE, SIDE), policy=Scripted()) as session:
        for step in range(3):
            session.denoise(x, replace(chunk, step=step), texts[:1], (0,))
        late = session.denoise(x, replace(chunk, step=2), texts[1:], (1,))
        report = session.report
        assert report.as_dict()["map"] == ["222000"]
        assert report.tokens_computed == report.tokens == 3 * 48
    call = Call(x, flow_sigmas(6)[2], replace(chunk, step=2), net.text_kv(texts[1:]), 24)
    torch.testing.assert_close(late, SkyReelsAdapter(net).forward(call, BlockCausal([48]))[0], **CLOSE)


def test_a_short_last_chunk_of_one_frame_works(cached: Cached, noise_of: Noise) -> None:
    film, _ = cached(noise_of(7, side=SIDE), ChunkSchedule(7, 3, 12, 3), policy=RUN)
    assert torch.isfinite(film).all()


def test_films_of_a_batch_share_one_mask(net: SkyReelsV2, texts: Tensor, noise_of: Noise) -> None:
    schedule, sigmas, noise = ChunkSchedule(6, 3, 12, 3), flow_sigmas(12), noise_of(6, side=SIDE).repeat(2, 1, 1, 1, 1)
    with Session(SkyReelsAdapter(net), schedule, sigmas, (SIDE, SIDE), films=2, policy=RUN) as session:
        film = sample_chunks(Driven(lambda x, c: session.denoise(x, c, texts[:1].repeat(2, 1, 1), (0,)), session), noise, schedule, sigmas, Euler())
    assert session.report.chunk_steps_refreshed > 0
    torch.testing.assert_close(film[0], film[1], rtol=1e-4, atol=1e-4)


# what is refused


def test_a_model_that_cannot_refresh_is_refused(net: SkyReelsV2) -> None:
    class Plain:
        name, layers, heads, query_heads, head_dim, width, text_channels, rotary = "plain", 1, 1, 1, 4, 4, 4, None
        tokens_per_frame = staticmethod(lambda height, width: 4)
        token_grid = staticmethod(lambda height, width: (2, 2))
        text = forward = replay = time_changes = staticmethod(lambda *unused: None)

    schedule, sigmas = ChunkSchedule(6, 3, 4, 2), flow_sigmas(4)
    with pytest.raises(ValueError, match="Motion Cache by a threshold runs single tokens, which plain cannot do here: use Chunkwise Cache"):
        Session(Plain(), schedule, sigmas, (4, 4), policy=Motion())  # type: ignore[arg-type]
    for policy in (Always(), Chunkwise()):
        Session(Plain(), schedule, sigmas, (4, 4), policy=policy)  # type: ignore[arg-type]


def test_chunks_of_one_frame_are_refused(net: SkyReelsV2) -> None:
    with pytest.raises(ValueError, match="chunks of 1 latent frame have none: use chunk_frames 2 or more, or Chunkwise Cache"):
        Session(SkyReelsAdapter(net), ChunkSchedule(3, 1, 4, 2), flow_sigmas(4), (4, 4), policy=Motion())
    assert require_tokens(SkyReelsAdapter(net), "", 2).name == "skyreels-v2-df"
