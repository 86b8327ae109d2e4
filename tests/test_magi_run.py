"""Films of MAGI-1 with random weights: the schedule by hand, the pipeline written out densely, guidance, texts and given frames."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache_core.models.adapter import DurationTexts
from flowcache_core.models.family import Family
from flowcache_core.models.magi import Magi, rope_table
from flowcache_core.models.magi_adapter import ALONE, NULL, TEXT, MagiAdapter
from flowcache_core.models.magi_family import MAGI, MAGI_DISTILLED, MagiNoise, NearClean, ThreeBranches, require_stages
from flowcache_core.run.generate import Given, Job, generate, generate_upstream
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.frames import FOUR_N
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule
from tests.tiny_magi import CLOSE, FAMILIES, FRAME, GATED, GRID, JOB, PLAIN, bundle_of, noted, tiny_magi
from tests.toy_family import words


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


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (replace(JOB, frames=98), "MAGI-1 makes whole chunks of 24 frames, and 98 do not divide: use 96 or 120"),
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
