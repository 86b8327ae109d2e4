"""Films of MAGI-1 with random weights: the schedule by hand, the pipeline written out densely, and everything that a run can do."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowcache_core.kernels.tokens import mask_over
from flowcache_core.kv.cache import KVSizes, KVStore
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.layout import Layout, capacity
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.kv.scores.salience import Salience
from flowcache_core.models.adapter import Call, DurationTexts
from flowcache_core.models.bundle import Bundle
from flowcache_core.models.family import Bundled, Family
from flowcache_core.models.magi import Magi, MagiConfig, rope_table
from flowcache_core.models.magi_adapter import ALONE, NULL, TEXT, MagiAdapter
from flowcache_core.models.magi_family import MAGI, MAGI_DISTILLED, MagiNoise, NearClean, ThreeBranches, is_last_stage, magi, require_stages
from flowcache_core.policies import POLICIES
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import Motion
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.presets import MAGI_RULES, PLANS, preset
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.policies.target import Target
from flowcache_core.policies.thresholds import decision_table
from flowcache_core.run.generate import Given, Job, generate, generate_upstream
from flowcache_core.run.report import RunReport
from flowcache_core.run.run import Place, Run
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.frames import FOUR_N
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.planner import least_share
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler, UniPC
from tests.test_memory import Ledger
from tests.tiny_magi import GATED, PLAIN, tiny_magi
from tests.toy_family import no_vae, words

JOB = Job("a toy", frames=96, steps=8, seed=5, size=64, cfg=7.5, ar_step=2, shift=3.0, solver="euler", addnoise=0)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
GRID, FRAME = (4, 4), 16
FAMILIES = pytest.mark.parametrize("family", [MAGI, MAGI_DISTILLED], ids=lambda family: family.name)


def bundle_of(family: Family, network: Magi | None = None) -> Bundle:
    family = replace(family, bundled=Bundled("tiny", "tiny", no_vae, words))
    return Bundle(family, network or tiny_magi(PLAIN), nn.Identity(), family.layout)


class Noting(MagiAdapter):
    """Notes every evaluation: (chunk, step, time, branches, what each sees)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[int, int, float, tuple[Hashable, ...], tuple[int | None, ...]]] = []

    def forward(self, call, attend):  # type: ignore[no-untyped-def]
        seen = tuple(self.seen(call.chunk, branch) for branch in call.branches)
        self.calls.append((call.chunk.index, call.chunk.step, round(1 - call.sigma, 4), call.branches, seen))
        return super().forward(call, attend)


def noted(family: Family, job: Job) -> tuple[Noting, RunReport]:
    adapter = Noting(tiny_magi(PLAIN), distilled=family is MAGI_DISTILLED)
    _, report = generate(bundle_of(family), job, adapter=lambda _, sigmas: adapter)
    return adapter, report


def test_times_are_the_published_ones() -> None:
    def times(steps: int) -> list[float]:
        return [round(1 - sigma, 4) for sigma in MagiNoise().levels(steps, 3.0)]

    assert times(16) == [0, 0.0013, 0.0053, 0.0120, 0.0217, 0.0348, 0.0517, 0.0731, 0.1, 0.1337, 0.1761, 0.23, 0.3, 0.393, 0.5213, 0.7075, 1]
    assert times(12) == [0, 0.0053, 0.0120, 0.0217, 0.0517, 0.0731, 0.1, 0.1761, 0.23, 0.3, 0.5213, 0.7075, 1]
    for steps in (8, 16, 32, 64):
        assert [times(steps)[k * steps // 4] for k in range(5)] == [0, 0.0217, 0.1, 0.3, 1]
    half = MagiNoise().levels(8, 3.0, 0.5)
    assert half == MagiNoise().levels(16, 3.0)[8:]


def test_four_chunks_go_through_eight_steps_as_worked_by_hand() -> None:
    """(chunk, step) of every row; -1 is the clean pass."""
    by_hand = [
        [(0, 0)], [(0, 1)],
        [(0, 2), (1, 0)], [(0, 3), (1, 1)],
        [(0, 4), (1, 2), (2, 0)], [(0, 5), (1, 3), (2, 1)],
        [(0, 6), (1, 4), (2, 2), (3, 0)], [(0, 7), (1, 5), (2, 3), (3, 1)],
        [(0, -1), (1, 6), (2, 4), (3, 2)], [(1, 7), (2, 5), (3, 3)],
        [(1, -1), (2, 6), (3, 4)], [(2, 7), (3, 5)],
        [(2, -1), (3, 6)], [(3, 7)],
    ]  # fmt: skip
    adapter, report = noted(MAGI_DISTILLED, JOB)
    steps = [(chunk, -1 if step == 8 else step) for chunk, step, *_ in adapter.calls]
    assert steps == [one for row in by_hand for one in row]
    assert len(steps) == 35
    assert report.commits == 3
    at = {(0, 4): 0.1, (0, 5): 0.1761, (0, 6): 0.3, (0, 7): 0.5213, (1, 2): 0.0217, (2, 1): 0.0053, (3, 0): 0.0}
    assert all(t == at[chunk, step] for chunk, step, t, *_ in adapter.calls if (chunk, step) in at)
    assert {t for _, step, t, *_ in adapter.calls if step == 8} == {0.9999}


def test_a_chunk_sees_less_the_nearer_it_is_to_clean() -> None:
    adapter, _ = noted(MAGI_DISTILLED, JOB)
    ranges = {(chunk, step): (max(0, chunk + 1 - seen[0]), chunk + 1) for chunk, step, _, _, seen in adapter.calls if seen[0]}
    stage_3 = {(0, 6): (0, 1), (1, 4): (0, 2), (2, 2): (0, 3), (3, 0): (0, 4)}
    later = {
        (0, 8): (0, 1),
        (1, 7): (0, 2),
        (2, 5): (0, 3),
        (3, 3): (0, 4),
        (1, 8): (1, 2),
        (2, 6): (1, 3),
        (3, 4): (1, 4),
        (2, 8): (2, 3),
        (3, 6): (2, 4),
    }
    assert {key: ranges[key] for key in stage_3} == stage_3
    assert {key: ranges[key] for key in later} == later
    assert sum(end - first for first, end in ranges.values()) == 75


@pytest.mark.parametrize(("chunks", "steps", "rows", "evaluations"), [(4, 8, 14, 35), (4, 64, 112, 259), (10, 64, 208, 649), (10, 16, 52, 169)])
def test_a_film_takes_as_many_evaluations_as_published(chunks: int, steps: int, rows: int, evaluations: int) -> None:
    schedule = ChunkSchedule(6 * chunks, 6, steps, steps // 4, 5, pixels=MAGI.frames, aligned=True)
    MAGI.check(schedule)
    assert len(schedule.rows) == rows
    assert sum(len(row.active) for row in schedule.rows) + chunks - 1 == evaluations


def test_a_window_of_one_goes_chunk_by_chunk() -> None:
    adapter, _ = noted(MAGI_DISTILLED, replace(JOB, ar_step=8))
    assert [chunk for chunk, *_ in adapter.calls] == [0] * 9 + [1] * 9 + [2] * 9 + [3] * 8


@FAMILIES
def test_branches_run_only_where_they_count(family: Family) -> None:
    adapter, _ = noted(family, JOB)
    for _, step, _, branches, seen in adapter.calls:
        last, clean = 6 <= step < 8, step == 8
        if family is MAGI:
            assert branches == ((TEXT, NULL) if last or clean else (TEXT, NULL, ALONE))
        else:
            assert branches == ((TEXT, ALONE) if last else (TEXT,))
        assert all(count == 1 for branch, count in zip(branches, seen, strict=True) if branch == ALONE or clean)


def test_distilled_networks_are_told_how_long_their_steps_are() -> None:
    base, distilled = MagiAdapter(tiny_magi(PLAIN)), MagiAdapter(tiny_magi(PLAIN), distilled=True)
    assert base.step_length(Chunk(0, 0, 6, 0, 64)) is None
    assert [distilled.step_length(Chunk(0, 0, 6, 3, steps)) for steps in (64, 32, 16, 8)] == [32, 16, 8, 4]
    assert [distilled.step_length(Chunk(0, 0, 6, step, 12)) for step in range(13)] == [4, 8, 8] * 4 + [4]


def test_guidance_adds_up_and_a_branch_without_weight_is_left_out_exactly() -> None:
    text, null, alone = torch.randn(3, 16)
    guidance = ThreeBranches()
    torch.testing.assert_close(guidance.combine([text, null, alone], 7.5, 0.9), -0.5 * alone - 6 * null + 7.5 * text)
    torch.testing.assert_close(guidance.combine([text] * 3, 7.5, 0.9), text, **CLOSE)
    for sigma in (0.7, 0.3):
        assert torch.equal(guidance.combine([text, null, alone], 7.5, sigma), 0.0 * alone + 1.0 * null + 0.0 * text)
        assert torch.equal(guidance.combine([text, null], 7.5, sigma), null)
        torch.testing.assert_close(NearClean().combine([text, alone], 1.0, sigma), 0.7 * text + 0.3 * alone)
    assert torch.equal(NearClean().combine([text, alone], 1.0, 0.71), text)


class Everything(ThreeBranches):
    """Runs all branches everywhere."""

    def needed(self, scale: float, sigma: float) -> tuple[str, ...]:
        return self.branches(scale)

    def remembered(self, scale: float) -> tuple[str, ...]:
        return self.branches(scale)


class NearCleanEverywhere(NearClean):
    def needed(self, scale: float, sigma: float) -> tuple[str, ...]:
        return self.branches(scale)

    def remembered(self, scale: float) -> tuple[str, ...]:
        return self.branches(scale)


@pytest.mark.parametrize(("family", "all_run"), [(MAGI, Everything()), (MAGI_DISTILLED, NearCleanEverywhere())], ids=["base", "distilled"])
def test_a_film_with_idle_branches_left_out_equals_one_with_all_run(family: Family, all_run: Any) -> None:
    film, _ = generate(bundle_of(family), JOB)
    all_of_them, _ = generate(bundle_of(replace(family, guidance=all_run)), JOB)
    torch.testing.assert_close(film, all_of_them, **CLOSE)


class Dense:
    """The published pipeline over tokens of all active chunks at once, with attention under a mask and a list of clean keys and values."""

    def __init__(self, network: Magi, family: Family, job: Job, context: Tensor) -> None:
        self.network, self.distilled, self.job = network, family.name.endswith("distill"), job
        self.adapter = MagiAdapter(network, distilled=self.distilled)
        prompt, null = network.text_kv(context), network.text_kv(network.y_embedder.null_caption_embedding[None, :50])
        self.texts = {TEXT: prompt, NULL: null}
        self.clean: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.levels = MagiNoise().levels(job.steps, 3.0)

    def film(self, x: Tensor) -> Tensor:
        x, p, chunks = x.clone(), self.job.steps // 4, x.shape[2] // 6
        for stage in range(chunks + 3):
            first, end = max(0, stage - 3), min(chunks, stage + 1)
            if first:
                self.pass_clean(x, first - 1)
            for d in range(p):
                steps = {k: (stage - k) * p + d for k in range(first, end)}
                for k, v in self.velocities(x, steps).items():
                    now, to = self.levels[steps[k]], self.levels[steps[k] + 1]
                    x[:, :, 6 * k : 6 * k + 6] += (to - now) * v
        return x

    def velocities(self, x: Tensor, steps: dict[int, int]) -> dict[int, Tensor]:
        at = {k: 1 - self.levels[step] for k, step in steps.items()}
        text = self.active(x, steps, TEXT, dropped=False)
        if self.distilled:
            mixed = {k: 0.7 * text[k] + 0.3 * self.alone(x, k, steps[k], TEXT, False) for k in steps if at[k] > 0.2999}
            return {**text, **mixed}
        null = self.active(x, steps, NULL, dropped=True)
        low = {k: -0.5 * self.alone(x, k, steps[k], NULL, True) + (1.5 - 7.5) * null[k] + 7.5 * text[k] for k in steps if at[k] < 0.2999}
        return {**null, **low}

    def active(self, x: Tensor, steps: dict[int, int], text: str, dropped: bool) -> dict[int, Tensor]:
        ranges = {k: max(0, k + 1 - (5, 4, 3, 2)[4 * step // self.job.steps]) for k, step in steps.items()}
        chunks, before = list(steps), sorted(self.clean)
        owners = torch.tensor([k for k in (*before, *chunks) for _ in range(6 * FRAME)])
        mask = torch.cat([((owners >= ranges[k]) & (owners <= k))[None].expand(6 * FRAME, -1) for k in chunks])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
            keys, values = (torch.cat([*(self.clean[one][layer][n] for one in before), own], 2) for n, own in enumerate((k, v)))
            share = q.shape[1] // k.shape[1]
            logits = q @ keys.repeat_interleave(share, 1).mT / q.shape[-1] ** 0.5
            return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ values.repeat_interleave(share, 1)

        part = torch.cat([x[:, :, 6 * k : 6 * k + 6] for k in chunks], 2)
        times = [1 - self.levels[step] for step in steps.values()]
        rope = rope_table(self.network.rope.bands, 6 * chunks[0], 6 * len(chunks), *GRID, "cpu")
        out = self.run(part, times, self.lengths(steps.values()), text, dropped, rope, attend)
        return dict(zip(chunks, out.split(6, 2), strict=True))

    def lengths(self, steps: Any) -> float | None:
        lengths = {self.adapter.step_length(Chunk(0, 0, 6, step, self.job.steps)) for step in steps}
        (length,) = lengths
        return length

    def alone(self, x: Tensor, k: int, step: int, text: str, dropped: bool) -> Tensor:
        """At the positions of the first chunk."""
        rope = rope_table(self.network.rope.bands, 0, 6, *GRID, "cpu")
        return self.run(x[:, :, 6 * k : 6 * k + 6], [1 - self.levels[step]], self.lengths([step]), text, dropped, rope, unmasked)

    def pass_clean(self, x: Tensor, k: int) -> None:
        kept: list[tuple[Tensor, Tensor]] = []

        def attend(layer: int, q: Tensor, key: Tensor, value: Tensor, _: Tensor) -> Tensor:
            kept.append((key, value))
            return unmasked(layer, q, key, value, _)

        rope = rope_table(self.network.rope.bands, 6 * k, 6, *GRID, "cpu")
        self.run(x[:, :, 6 * k : 6 * k + 6], [0.9999], self.lengths([self.job.steps]), NULL, not self.distilled, rope, attend)
        self.clean[k] = kept

    def run(self, x: Tensor, times: list[float], dt: float | None, text: str, dropped: bool, rope: Tensor, attend: Any) -> Tensor:
        condition = self.network.condition(torch.tensor(times, dtype=torch.float64), (dropped,), 1, dt, x.dtype)
        kv = self.texts[text]
        out = self.network.stack(self.network.embed(x), condition, [lambda layer: kv[layer]], rope, attend)
        return self.network.velocity(out, (x.shape[2], *GRID))


def unmasked(layer: int, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    share = q.shape[1] // k.shape[1]
    return (q @ k.repeat_interleave(share, 1).mT / q.shape[-1] ** 0.5).softmax(-1) @ v.repeat_interleave(share, 1)


@pytest.mark.parametrize("config", [PLAIN, GATED], ids=["4.5B", "24B"])
@FAMILIES
@torch.inference_mode()
def test_a_film_is_that_of_the_published_pipeline_written_out_densely(family: Family, config: Any) -> None:
    job = replace(JOB, frames=144, steps=12 if family is MAGI_DISTILLED else 8, ar_step=3 if family is MAGI_DISTILLED else 2)
    bundle = bundle_of(family, tiny_magi(config))
    film, _ = generate(bundle, job)
    wanted = Dense(bundle.network, family, job, bundle.text(job.prompt)).film(job.noise(bundle))
    torch.testing.assert_close(film, wanted, rtol=1e-3, atol=1e-3)


class Keeping(MagiAdapter):
    """Sees as far back as ever, but lets nothing go."""

    def reach(self, chunk: Chunk) -> int | None:
        return None

    def seen(self, chunk: Chunk, branch: Hashable) -> int | None:
        return 1 if branch == ALONE else super().reach(chunk)


@pytest.mark.parametrize("ar_step", [1, 2, 4])
@FAMILIES
def test_a_ring_of_five_chunks_makes_the_film_of_the_full_buffer(family: Family, ar_step: int) -> None:
    job, bundle, distilled = replace(JOB, frames=240, steps=4, ar_step=ar_step), bundle_of(family), family is MAGI_DISTILLED
    film, report = generate(bundle, job)
    everything = replace(bundle, layout=replace(bundle.layout, window=10))
    whole, all_of_it = generate(everything, job, adapter=lambda _, sigmas: Keeping(bundle.network, distilled=distilled))
    assert torch.equal(film, whole)
    chunk = 2 * PLAIN.layers * PLAIN.kv_heads * PLAIN.head_dim * 6 * FRAME * 4
    branches = 1 if distilled else 2
    assert report.expected is not None
    assert report.kv_peak_bytes == report.expected.kv == 5 * branches * chunk
    assert all_of_it.kv_peak_bytes == 10 * branches * chunk


@pytest.mark.parametrize(
    ("config", "grid", "gib"),
    [(MagiConfig(3072, 12288, 34, 8), (90, 90), 7.88), (MagiConfig(6144, 16384, 48, 8, channels=32, gated=True), (90, 160), 19.78)],
)
@pytest.mark.parametrize("chunks", [5, 60])
def test_the_kv_cache_of_a_released_model_is_as_documented(config: MagiConfig, grid: tuple[int, int], gib: float, chunks: int) -> None:
    with torch.device("meta"):
        network = Magi(config, dtype=torch.bfloat16)
    schedule = ChunkSchedule(6 * chunks, 6, 16, 4, 5, pixels=MAGI.frames, aligned=True)
    for family, branches in ((MAGI_DISTILLED, 1), (MAGI, 2)):
        run = Run(family, family.adapter(network, None), schedule, family.noise.levels(16, 3.0), (16, *grid), Place(text_tokens=200, itemsize=2))
        assert run.held.kv / 2**30 == pytest.approx(branches * gib, abs=0.01)


HELD: dict[str, tuple[Family, CachePolicy | None, Compressor | None, int]] = {
    "base": (MAGI, None, None, 2),
    "one after the other": (MAGI, None, None, 8),
    "residual": (MAGI_DISTILLED, Chunkwise(0.2, 2, signature="latent", replay="residual"), None, 2),
    "motion, base": (MAGI, Motion(base=Chunkwise(signature="latent")), None, 2),
    "budget": (MAGI_DISTILLED, None, Compressor(KV_POLICIES[0](), budget=1.5), 2),
}


@pytest.mark.parametrize("name", HELD)
def test_a_run_holds_what_its_footprint_said(name: str) -> None:
    """To one part in ten, and never more: predictions are counted for all branches at all steps."""
    family, policy, compressor, ar_step = HELD[name]
    bundle, job, most = bundle_of(family), replace(JOB, frames=168, ar_step=ar_step, solver="unipc"), 0
    ledger = Ledger(*bundle.network.parameters())

    class Weighed(MagiAdapter):
        def forward(self, call, attend):  # type: ignore[no-untyped-def]
            nonlocal most
            most = max(most, ledger.held(call.x) - call.x[:1].nbytes)  # without the chunk, once for each branch and as it was handed over
            return super().forward(call, attend)

    with ledger:
        _, report = generate(bundle, job, policy, compressor=compressor,
                             adapter=lambda _, sigmas: Weighed(bundle.network, distilled=family is MAGI_DISTILLED))  # fmt: skip
    assert report.expected is not None
    assert 0.9 * report.expected.held <= most <= 1.01 * report.expected.held


def test_text_keys_and_values_are_made_once_and_a_word_says_how_many_chunks_are_to_come() -> None:
    network, made = tiny_magi(PLAIN), list[int]()
    durations = torch.randn(3, 12)

    class Counting(MagiAdapter):
        def text(self, context):  # type: ignore[no-untyped-def]
            made.append(len(context))
            return super().text(context)

    adapter = Counting(network, durations=durations)
    generate(bundle_of(MAGI), JOB, adapter=lambda _, sigmas: adapter)
    assert made == [3]
    context = words("a toy", 12)
    text = adapter.text(adapter.branch_texts(context, (TEXT, NULL, ALONE)))
    for index, row in ((0, 2), (1, 2), (2, 1), (3, 0)):
        told = adapter.text_of(text, Chunk(index, 6 * index, 6, 0, 8), 4)
        for layer, (k, v) in enumerate(network.text_kv(torch.cat([durations[None, row : row + 1], context], 1))):
            torch.testing.assert_close(told.branches[TEXT].layer(layer), (k, v))
        assert told.branches[NULL].layer(0)[0].shape[2] == 50
        assert told.clean.layer(0)[0].shape[2] == 50


def test_given_first_frames_stay_and_fill_chunks_from_the_start_of_the_film() -> None:
    bundle = bundle_of(MAGI_DISTILLED)
    given = Given(start=torch.randn(1, 16, 8, 8, 8))
    shown: list[tuple[Chunk, Tensor]] = []

    class Watching(MagiAdapter):
        def forward(self, call, attend):  # type: ignore[no-untyped-def]
            shown.append((call.chunk, call.x[:1].clone()))
            return super().forward(call, attend)

    film, report = generate(bundle, JOB, given=given, adapter=lambda _, sigmas: Watching(bundle.network, distilled=True))
    assert given.start is not None
    assert torch.equal(film[:, :, :8], given.start)
    assert report.chunk_steps == 3 * 8
    first = shown[0][0]
    assert (first.index, first.committing, first.start, first.frames) == (0, True, 0, 6)
    second = [(chunk, x) for chunk, x in shown if chunk.index == 1]
    assert {(chunk.start, chunk.frames, chunk.led) for chunk, _ in second} == {(6, 6, 2)}
    assert all(torch.equal(x[:, :, :2], given.start[:, :, 6:]) for _, x in second)
    assert {chunk.led for chunk, _ in shown if chunk.index > 1} == {0}
    assert not torch.equal(film[:, :, 8:], generate(bundle, JOB)[0][:, :, 8:])


def test_one_given_frame_is_the_first_of_the_first_chunk() -> None:
    given = Given(start=torch.randn(1, 16, 1, 8, 8))
    film, report = generate(bundle_of(MAGI), JOB, given=given)
    assert torch.equal(film[:, :, :1], given.start)
    assert report.chunk_steps == 4 * 8


DECIDING = {Chunkwise: Chunkwise(signature="latent", warmup_steps=2), Target: None, Motion: Motion(base=Chunkwise(signature="latent"))}


@pytest.mark.parametrize("kind", POLICIES, ids=lambda kind: kind.name)
@FAMILIES
def test_every_cache_policy_runs_or_is_refused_with_the_reason(family: Family, kind: type[CachePolicy]) -> None:
    policy = DECIDING[kind] if kind in DECIDING else kind()
    if policy is None:
        with pytest.raises(ValueError, match="signature time follows the time modulation, which magi-1 does not have: set signature to latent"):
            generate(bundle_of(family), JOB, kind())
        return
    film, report = generate(bundle_of(family), replace(JOB, steps=12, ar_step=3), policy)
    assert torch.isfinite(film).all()
    assert 0 < report.tokens_computed <= report.tokens


@FAMILIES
def test_reuse_goes_on_where_branches_fall_away(family: Family) -> None:
    """Warm-up and last step are computed; of a distilled model the first step of the last quarter too, in which a branch comes in."""
    rule = Chunkwise(10.0, warmup_steps=2, max_reuse=1000, signature="latent")
    _, report = generate(bundle_of(family), JOB, rule)
    assert report.chunk_steps_computed == 4 * (3 if family is MAGI else 4)


@pytest.mark.parametrize("config", [PLAIN, GATED], ids=["4.5B", "24B"])
def test_refreshed_tokens_equal_those_of_a_full_forward(config: Any) -> None:
    adapter, schedule = MagiAdapter(tiny_magi(config)), ChunkSchedule(12, 6, 4, 1, 5)
    store = KVStore(KVSizes.of(adapter, 1, capacity(schedule, FRAME)), Layout(schedule, FRAME), seen=adapter.seen)
    text = adapter.text(adapter.branch_texts(torch.randn(1, 3, 12), (TEXT, NULL)))
    for chunk in (schedule.at(0, 1), schedule.at(1, 0)):
        call = Call(torch.randn(2, 16, 6, 8, 8), 0.8, chunk, text, 24, (TEXT, NULL))
        velocity, residual = adapter.forward(call, store.attention(call.branches, chunk))
        for tokens in (torch.arange(6 * FRAME), torch.tensor([0, 5, 17, 95])):
            some, of_some = adapter.refresh(call, tokens, store.attention(call.branches, chunk, tokens))
            chosen = mask_over(velocity, tokens, (6, *GRID))
            torch.testing.assert_close(some, torch.where(chosen, velocity, 0.0), **CLOSE)
            torch.testing.assert_close(of_some, residual[:, tokens], **CLOSE)
        torch.testing.assert_close(adapter.replay(call, residual), velocity, **CLOSE)


@FAMILIES
def test_a_plan_is_computed_and_held_as_forecast(family: Family) -> None:
    """In part too, where all branches run at every step."""
    for policy in (Planned(share=0.5), Multirate(share=0.5)):
        _, report = generate(bundle_of(family), replace(JOB, steps=16, ar_step=4), policy)
        assert report.share <= 0.5
        assert report.expected is not None
        assert report.kv_peak_bytes <= report.expected.kv


@FAMILIES
def test_threshold_zero_is_exact(family: Family) -> None:
    film, _ = generate(bundle_of(family), JOB)
    cached, report = generate(bundle_of(family), JOB, Chunkwise(0.0, signature="latent"))
    assert torch.equal(film, cached)
    assert report.chunk_steps_computed == report.chunk_steps


@pytest.mark.parametrize("kind", KV_POLICIES, ids=lambda kind: kind.name)
def test_every_kv_policy_bounds_history(kind: type) -> None:
    if kind is Salience:
        with pytest.raises(ValueError, match="head"):
            generate(bundle_of(MAGI_DISTILLED), JOB, compressor=Compressor(kind(), budget=1.5))
        return
    job = replace(JOB, frames=168, steps=4, ar_step=1)
    film, report = generate(bundle_of(MAGI_DISTILLED), job, compressor=Compressor(kind(), budget=1.5))
    assert torch.isfinite(film).all()
    assert max(report.history.tokens) == 1.5 * 6 * FRAME


def test_a_budget_with_room_for_all_of_history_equals_none() -> None:
    for family in (MAGI, MAGI_DISTILLED):
        film, _ = generate(bundle_of(family), JOB)
        roomy, _ = generate(bundle_of(family), JOB, compressor=Compressor(KV_POLICIES[0](), budget=6))
        assert torch.equal(film, roomy)


@pytest.mark.parametrize("steps", [4, 8, 12, 16, 32, 64])
@pytest.mark.parametrize("name", PLANS)
def test_a_preset_that_plans_serves_any_number_of_steps(name: str, steps: int) -> None:
    """Within its budget, or at the least that a plan can have; every chunk is computed where guidance changes."""
    for chunks in (1, 4, 9):
        for ar_step in (steps // 4, steps):
            layout, rule = MAGI.layout, preset(name)
            schedule = ChunkSchedule(6 * chunks, 6, steps, ar_step, layout.window, pixels=MAGI.frames, aligned=True, profile=layout.profile)
            MAGI.check(schedule)
            assert isinstance(rule, Planned)
            rule.check_run(steps)
            plan = rule.plan(schedule).check(schedule)
            assert plan.share(schedule) <= max(rule.share, least_share(schedule)) + 1e-9
            assert all(is_last_stage(MAGI.noise.levels(steps, 3.0)[3 * steps // 4]) and 3 * steps // 4 in done for done in plan.computed)


def test_under_euler_a_plan_takes_the_steps_that_it_leaves_out() -> None:
    """As `test_plan.py` says of sums; the full plan is the film itself, and UniPC is run as anywhere."""
    bundle, job = bundle_of(MAGI), replace(JOB, frames=48)
    settled = Run(MAGI, bundle.adapter(), job.schedule(bundle), job.sigmas(bundle), (16, 8, 8), solver=Euler())
    assert settled.solver == Euler(sums=True)
    assert replace(settled, solver=UniPC()).solver == UniPC()
    film, _ = generate(bundle, job)
    assert torch.equal(generate(bundle, job, Planned(share=1.0))[0], film)
    plain = bundle_of(replace(MAGI, solving=lambda solver: solver))
    by_steps, at_once = (generate(one, job, Planned(share=0.6))[0] for one in (bundle, plain))
    assert not torch.equal(by_steps, at_once)


FLOWCACHE = magi(distilled=True, ranges=(), clean_pass=False, near_clean=False)


def test_as_flowcache_ran_it() -> None:
    """No ranges, no clean pass, one branch; its threshold rule reuses, and the last computed step is what later chunks see."""
    adapter = Noting(tiny_magi(PLAIN), distilled=True, ranges=())
    bundle = bundle_of(FLOWCACHE)
    _, report = generate(bundle, JOB, adapter=lambda _, sigmas: adapter)
    assert {(branches, seen) for *_, branches, seen in adapter.calls} == {((TEXT,), (None,))}
    assert len(adapter.calls) == 32
    assert report.commits == 0
    _, long = generate(bundle, replace(JOB, frames=168, steps=4, ar_step=1))
    assert long.kv_peak_bytes == 7 * 6 * FRAME * 2 * PLAIN.layers * PLAIN.kv_heads * PLAIN.head_dim * 4
    job = replace(JOB, steps=16, ar_step=4)
    _, cached = generate(bundle, job, Chunkwise(0.2, warmup_steps=5, max_reuse=1000, signature="latent", order=0))
    assert cached.chunk_steps_computed < cached.chunk_steps
    with pytest.raises(ValueError, match="a budget of history is scored while a finished chunk is passed through the network clean"):
        generate(bundle, JOB, compressor=Compressor(KV_POLICIES[0](), budget=2))


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (replace(JOB, frames=98), "98 frames are not 4n: use 96 or 100"),
        (replace(JOB, frames=100), "MAGI-1 makes whole chunks of 24 frames, and 100 do not divide: use 96 or 120"),
        (replace(JOB, steps=50, ar_step=12), "MAGI-1 goes through its steps in 4 stages of equal length, and 50 steps do not divide: use 48 or 52"),
        (replace(JOB, steps=64, ar_step=5), "with ar_step 5 and 64 steps they do not divide: use ar_step 16 (published), or 32, 64"),
        (replace(JOB, size=72), "a picture of 72 pixels does not fit: use a multiple of 16, such as 64"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(job: Job, said: str) -> None:
    with pytest.raises(ValueError, match="use") as refused:
        generate(bundle_of(MAGI), job)
    assert said in str(refused.value)


def test_what_the_network_was_not_trained_for_is_refused() -> None:
    with pytest.raises(ValueError, match="magi-1 looks back only, bidirectional attention is not for it"):
        generate_upstream(bundle_of(MAGI), JOB)
    with pytest.raises(ValueError, match="MAGI-1 takes given frames at the start of a film, and was not trained with given last frames"):
        generate(bundle_of(MAGI), JOB, given=Given(end=torch.randn(1, 16, 1, 8, 8)))


def test_a_distilled_network_runs_at_the_levels_that_it_is_told_of() -> None:
    for steps, denoise in ((64, 1.0), (16, 0.5), (8, 1.0), (12, 1.0), (20, 0.7)):
        MAGI_DISTILLED.check_levels(MagiNoise().levels(steps, 3.0, denoise))
        MAGI.check_levels(MagiNoise().levels(steps, 5.0, denoise))
    uneven = [MagiNoise().level(i / 12, 3.0) for i in range(13)]
    for levels in (uneven, MagiNoise().levels(16, 5.0), flow_sigmas(16, 3.0)):
        with pytest.raises(ValueError, match=r"MAGI-1 distilled is told how long its steps are, .* take them from AR Video Scheduler"):
            MAGI_DISTILLED.check_levels(levels)
    with pytest.raises(ValueError, match="12 steps of its shortcut"):
        MAGI_DISTILLED.check_levels(uneven)


def test_what_is_left_open_is_as_published() -> None:
    for family, scale in ((MAGI, 7.5), (MAGI_DISTILLED, None)):
        published = family.published
        assert (published.solver, published.given_noise, published.scale) == ("euler", 0, scale)
        for steps in (8, 12, 16, 64):
            require_stages(ChunkSchedule(24, 6, steps, published.stagger(steps), 5, pixels=FOUR_N, aligned=True))


def test_an_adapter_with_durations_is_otherwise_the_same() -> None:
    adapter = MagiAdapter(tiny_magi(PLAIN), torch.float64, distilled=True, ranges=(3, 2))
    durations = torch.randn(3, 12)
    announced = adapter.with_durations(durations)
    assert isinstance(adapter, DurationTexts)
    assert announced.durations is durations
    assert (announced.network, announced.dtype, announced.distilled, announced.ranges) == (adapter.network, torch.float64, True, (3, 2))


def straight(steps: int) -> list[float]:
    """Relative changes of the latents from step to step, on straight paths from noise to clean latents of the same variance."""
    levels = MagiNoise().levels(steps, 3.0)
    return [math.inf, *((a - b) * math.sqrt(2) / math.hypot(a, 1 - a) for a, b in pairwise(levels[:-1]))]


def as_released(threshold: float, changes: Sequence[float]) -> list[bool]:
    """Which steps FlowCache's code for MAGI-1 computes."""
    out, drift = list[bool](), 0.0
    for step, change in enumerate(changes):
        drift = 0.0 if step < 5 else drift + change
        out.append(step < 5 or drift >= threshold)
        drift = 0.0 if out[-1] else drift
    return out


@pytest.mark.parametrize("name", MAGI_RULES)
def test_the_presets_decide_as_the_released_code_does(name: str) -> None:
    rule = preset(name)
    assert isinstance(rule, Chunkwise)
    changes = straight(64)
    decided = list(decision_table(rule, rule.threshold, changes))
    assert decided == as_released(rule.threshold, changes)
    assert sum(decided) == {"flowcache-magi-slow": 47, "flowcache-magi-fast": 42}[name]
    assert all(decision_table(rule, rule.threshold, straight(16)))


def test_a_preset_runs_as_flowcache_ran_it() -> None:
    job = replace(JOB, frames=48, steps=64, ar_step=16, size=16)
    _, report = generate(bundle_of(FLOWCACHE), job, preset("flowcache-magi-fast"))
    assert 0 < report.chunk_steps_computed < report.chunk_steps
