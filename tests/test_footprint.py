"""What a run is said to need is what it then holds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.multirate import Multirate
from flowcache_core.run.footprint import Footprint, footprint, readable
from flowcache_core.run.report import RunReport
from flowcache_core.run.run import Place, Run
from flowcache_core.run.session import Session
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler
from tests.driven import Driven


@pytest.mark.parametrize("ar_step", [0, 2, 6])
@pytest.mark.parametrize("replay", ["velocity", "residual"])
@pytest.mark.parametrize("branches", [("cond",), ("cond", "uncond")])
def test_the_footprint_is_what_a_run_holds(
    net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor], branches: tuple[str, ...], replay: str, ar_step: int
) -> None:
    schedule, policy, noise = ChunkSchedule(7, 3, 6, ar_step), Chunkwise(threshold=0, replay=replay), noise_of(7)
    adapter, levels = SkyReelsAdapter(net), flow_sigmas(6)
    expected = footprint(adapter, schedule, (16, 4, 4), len(branches), len(branches) * texts.shape[1], 4, policy)
    kept = []
    with Session(adapter, schedule, levels, (4, 4), policy=policy) as session:

        def predict(x: Tensor, chunk: object) -> Tensor:
            out = session.denoise(x.expand(len(branches), -1, -1, -1, -1), chunk, texts[: len(branches)], branches)
            states = [session.state.of(i) for i in range(schedule.chunks)]
            kept.append(sum(p.value.nbytes for state in states for many in state.predictions.values() for p in many))
            return out[:1]

        sample_chunks(Driven(predict, session), noise, schedule, levels, Euler())
        text = sum(k.nbytes + v.nbytes for k, v in session._text[branches, None])
    assert session.report.kv_peak_bytes == expected.kv
    assert text == expected.text
    assert max(kept) == expected.predictions


def test_the_buffers_of_keys_and_values_are_allocated_once_per_layer_in_the_dtype_of_computation(net: SkyReelsV2, texts: Tensor) -> None:
    half, schedule = SkyReelsV2(net.config, dtype=torch.bfloat16), ChunkSchedule(4, 2, 2, 0)
    half.load_state_dict(net.state_dict())
    with Session(SkyReelsAdapter(half), schedule, flow_sigmas(2), (4, 4)) as session:
        seen = set()
        for row in schedule.rows:
            for chunk in row.active:
                session.denoise(torch.zeros(1, 16, 2, 4, 4, dtype=torch.bfloat16), chunk, texts[:1].bfloat16(), ("cond",))
                cache, _ = session._kv.of(("cond",))
                seen.update((k.data_ptr(), v.data_ptr(), k.dtype, v.dtype) for k, v in cache._buffers)
    assert len(seen) == net.config.layers
    assert {kind for one in seen for kind in one[2:]} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("layers", "heads", "latent", "frames", "gib"),
    [
        (30, 12, (16, 68, 120), 25, 17.51),
        (40, 40, (16, 68, 120), 25, 77.82),
        (40, 40, (16, 90, 160), 31, 170.29),
        (30, 12, (16, 68, 120), 200, 140.08),
    ],
    ids=["1.3B", "14B-540P", "14B-720P", "1.3B eight times as long"],
)
def test_the_released_models_need_what_their_sizes_say(layers: int, heads: int, latent: tuple[int, int, int], frames: int, gib: float) -> None:
    width = heads * 128
    adapter = SimpleNamespace(
        layers=layers, heads=heads, query_heads=heads, head_dim=128, width=width, text_channels=2 * layers * width,
        tokens_per_frame=lambda h, w: h // 2 * (w // 2),
    )  # fmt: skip
    said = footprint(adapter, ChunkSchedule(frames, 5, 50, 50), latent, 2, 1024, 2, Chunkwise(), 3 << 30)
    assert said.kv / 2**30 == pytest.approx(gib, abs=0.01)
    assert said.predictions == 2 * 2 * 5 * 16 * latent[1] * latent[2] * 2
    assert said.latents == (2 * frames + (3 + 2) * 5) * 16 * latent[1] * latent[2] * 4 + frames * latent[1] * latent[2]
    assert said.held == said.kv + said.text + said.predictions + said.latents


def test_the_report_says_first_what_was_expected() -> None:
    report = RunReport(1, 1)
    report.expected = Footprint(3 << 30, 5 << 20, 0, 1 << 30, latents=2 << 20)
    said = "at its peak the run holds weights 3.00 GiB, KV cache 5.0 MiB, text 0.0 MiB, kept predictions 1.00 GiB, latents 2.0 MiB"
    assert report.text().splitlines() == [said, report.summary()]
    assert report.as_dict()["expected_bytes"]["kv"] == 5 << 20


def test_sizes_are_readable() -> None:
    assert [readable(x) for x in (0, 2**20, 0.2 * 2**30)] == ["0.0 MiB", "1.0 MiB", "0.20 GiB"]


@pytest.mark.parametrize("ar_step", [0, 2, 6])
def test_a_plan_that_is_made_by_the_clock_may_hold_what_any_plan_does(net: SkyReelsV2, ar_step: int) -> None:
    """Before an evaluation is timed nobody knows which steps are computed in part: the most that there can be is announced."""
    schedule, place = ChunkSchedule(7, 3, 6, ar_step), Place(2, 1, 8)
    held = [Run(SKYREELS, SkyReelsAdapter(net), schedule, flow_sigmas(6), (16, 4, 4), place, policy).held.kv
            for policy in (Multirate(seconds=100.0), *(Multirate(share=share) for share in (0.3, 0.5, 0.7, 0.9)))]  # fmt: skip
    assert held[0] >= max(held[1:])
    plain = Run(SKYREELS, SkyReelsAdapter(net), schedule, flow_sigmas(6), (16, 4, 4), place).held.kv
    assert held[0] > plain
