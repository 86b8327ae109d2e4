"""Which chunk moves when: worked tables, counts, refusals, and what holds for every schedule."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from flowcache_core.sampling.frames import FOUR_N_PLUS_1
from flowcache_core.sampling.noise import flow_sigmas, timestep
from flowcache_core.sampling.schedule import ChunkSchedule, Row, sections_of

FIRST_EIGHT = [999, 997, 994, 991, 989, 986, 983, 979]
LAST_SIX = [521, 470, 409, 337, 249, 140]


def table(schedule: ChunkSchedule) -> list[str]:
    """One line per row: every chunk's timestep, with * where it moves."""
    t = [timestep(s) for s in flow_sigmas(schedule.steps)]
    template = [t[0], *t]

    def cell(row: Row, k: int) -> str:
        return f"{template[row.indices[k]]}{'*' if k in {c.index for c in row.active} else ''}"

    return [" ".join(cell(row, k) for k in range(schedule.chunks)) for row in schedule.rows]


def random_schedules(count: int) -> list[ChunkSchedule]:
    rng, out = random.Random(0), []
    while len(out) < count:
        chunks, steps = rng.randint(1, 7), rng.randint(1, 12)
        try:
            out.append(ChunkSchedule(chunks * 2 - rng.randint(0, 1), 2, steps, rng.randint(0, steps + 2), rng.choice([None, 1, 2, 3])))
        except ValueError:
            continue
    return out


def test_timesteps_of_fifty_steps_are_the_published_ones() -> None:
    t = [timestep(s) for s in flow_sigmas(50)[:-1]]
    assert t[:8] == FIRST_EIGHT
    assert t[-6:] == LAST_SIX


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_noise_levels_fall_from_below_one_to_exactly_zero(steps: int) -> None:
    sigmas = flow_sigmas(steps)
    assert len(sigmas) == steps + 1
    assert sigmas[-1] == 0.0
    assert all(1 > a > b for a, b in pairwise(sigmas))


def test_a_timestep_is_truncated_not_rounded() -> None:
    assert timestep(0.9999) == 999
    assert timestep(0.1409) == 140


@pytest.mark.parametrize("steps", [1, 3, 9, 27, 37, 111])
def test_a_level_that_is_a_whole_timestep_counts_as_it(steps: int) -> None:
    """As a number of the core, and as the float32 number that a host hands over."""
    levels, whole = flow_sigmas(steps, shift=1.0)[:-1], [999 - 999 // steps * i for i in range(steps)]
    assert [timestep(level) for level in levels] == whole
    assert [timestep(level) for level in torch.tensor(levels, dtype=torch.float32).tolist()] == whole


def test_shift_one_is_an_even_spacing() -> None:
    assert flow_sigmas(4, shift=1.0) == pytest.approx([0.999, 0.74925, 0.4995, 0.24975, 0.0])


def test_three_chunks_two_rows_apart_follow_the_worked_table() -> None:
    assert table(ChunkSchedule(9, 3, 4, ar_step=2)) == [
        "999* 999 999",
        "959* 999 999",
        "888* 999* 999",
        "727* 959* 999",
        "0 888* 999*",
        "0 727* 959*",
        "0 0 888*",
        "0 0 727*",
    ]


def test_a_given_first_chunk_follows_the_worked_table() -> None:
    assert table(ChunkSchedule(9, 3, 4, ar_step=2, prefix=3)) == [
        "0 999* 999",
        "0 959* 999",
        "0 888* 999*",
        "0 727* 959*",
        "0 0 888*",
        "0 0 727*",
    ]


def test_ar_step_zero_moves_all_chunks_together() -> None:
    assert table(ChunkSchedule(9, 3, 4, ar_step=0)) == [f"{t}* {t}* {t}*" for t in (999, 959, 888, 727)]


def test_rows_of_five_chunks_at_base_three_follow_the_worked_table() -> None:
    rows = ChunkSchedule(15, 3, 4, ar_step=2, window=3).rows
    assert [(r.first, r.last) for r in rows] == [(0, 3)] * 6 + [(1, 4)] * 2 + [(2, 5)] * 4


@pytest.mark.parametrize(("prefix", "rows", "chunk_steps"), [(0, 70, 250), (5, 65, 200)])
def test_five_chunks_of_fifty_steps_take_the_published_number_of_rows(prefix: int, rows: int, chunk_steps: int) -> None:
    schedule = ChunkSchedule(25, 5, 50, ar_step=5, prefix=prefix)
    assert len(schedule.rows) == rows
    assert sum(len(row.active) for row in schedule.rows) == schedule.chunk_steps == chunk_steps


def test_every_chunk_makes_exactly_its_steps_in_order() -> None:
    for schedule in random_schedules(150):
        made: dict[int, list[int]] = {k: [] for k in range(schedule.chunks)}
        for row in schedule.rows:
            for chunk in row.active:
                made[chunk.index].append(chunk.step)
        assert all(steps == list(range(schedule.steps)) for steps in made.values()), schedule


def test_no_chunk_starts_before_its_predecessor_or_overtakes_it() -> None:
    for schedule in random_schedules(150):
        for row in schedule.rows:
            assert all(a >= b for a, b in pairwise(row.indices)), (schedule, row)


def test_active_chunks_lie_inside_the_window_and_the_window_within_reach() -> None:
    for schedule in random_schedules(150):
        for row in schedule.rows:
            assert row.last - row.first <= schedule.reach
            assert all(row.first <= chunk.index < row.last for chunk in row.active), (schedule, row)


def test_a_long_ar_step_finishes_each_chunk_before_the_next() -> None:
    rows = ChunkSchedule(9, 3, 4, ar_step=4).rows
    assert [chunk.index for row in rows for chunk in row.active] == [0] * 4 + [1] * 4 + [2] * 4


def test_only_the_last_chunk_may_be_short() -> None:
    schedule = ChunkSchedule(8, 3, 2)
    assert [schedule.span(k) for k in range(schedule.chunks)] == [(0, 3), (3, 3), (6, 2)]
    assert {(c.start, c.frames) for row in schedule.rows for c in row.active} == {(0, 3), (3, 3), (6, 2)}


@pytest.mark.parametrize(
    ("prefix", "suffix", "spans"),
    [
        (1, 0, [(0, 1), (1, 3), (4, 3), (7, 2)]),
        (3, 0, [(0, 3), (3, 3), (6, 3)]),
        (4, 0, [(0, 1), (1, 3), (4, 3), (7, 2)]),
        (5, 0, [(0, 2), (2, 3), (5, 3), (8, 1)]),
        (8, 0, [(0, 2), (2, 3), (5, 3), (8, 1)]),
        (0, 1, [(0, 3), (3, 3), (6, 3)]),
        (0, 2, [(0, 3), (3, 3), (6, 3)]),
        (1, 1, [(0, 1), (1, 3), (4, 3), (7, 2)]),
        (0, 3, [(0, 3), (3, 6)]),
        (4, 4, [(0, 1), (1, 3), (4, 5)]),
    ],
)
def test_the_grid_begins_after_the_prefix_and_the_last_chunk_takes_the_suffix(prefix: int, suffix: int, spans: list[tuple[int, int]]) -> None:
    schedule = ChunkSchedule(9, 3, 2, ar_step=1, prefix=prefix, suffix=suffix)
    assert [schedule.span(k) for k in range(schedule.chunks)] == spans
    assert sum(schedule.span(k)[1] for k in range(schedule.given)) == prefix
    moved = {c.index: range(c.start, c.start + c.frames - c.held) for row in schedule.rows for c in row.active}
    assert sorted(frame for frames in moved.values() for frame in frames) == list(range(prefix, 9 - suffix))


def test_given_frames_never_move_and_all_others_make_exactly_their_steps() -> None:
    for before in random_schedules(80):
        for prefix, suffix in ((1, 0), (0, 1), (2, 1), (3, 2)):
            if prefix + suffix >= before.frames or prefix > before.horizon:
                continue
            try:
                schedule = replace(before, prefix=prefix, suffix=suffix)
            except ValueError:
                assert before.window is not None  # shorter chunks can be more of them than a small window holds
                continue
            made = [0] * schedule.frames
            for row in schedule.rows:
                assert all(row.first <= chunk.index < row.last for chunk in row.active), (schedule, row)
                for chunk in row.active:
                    for frame in range(chunk.start, chunk.start + chunk.frames - chunk.held):
                        made[frame] += 1
            assert made == [0] * prefix + [schedule.steps] * (schedule.frames - prefix - suffix) + [0] * suffix, schedule


def test_a_first_frame_stays_in_sight_of_the_whole_trained_horizon() -> None:
    """One chunk more than the window counts, but not one frame more: image to video at the trained length sees the image throughout."""
    schedule = ChunkSchedule(15, 3, 50, ar_step=5, window=5, prefix=1)
    assert schedule.chunks == 6
    assert [schedule.oldest(k) for k in range(6)] == [0] * 6
    assert {(row.first, row.last) for row in schedule.rows} == {(0, 6)}


def test_a_chunk_sees_whole_chunks_within_the_horizon() -> None:
    assert [ChunkSchedule(17, 3, 4, ar_step=2, window=3).oldest(k) for k in range(6)] == [0, 0, 0, 1, 2, 3]
    assert [ChunkSchedule(17, 3, 4, ar_step=2, window=3, prefix=2).oldest(k) for k in range(6)] == [0, 0, 0, 1, 2, 3]


SECTIONS = {
    33: [(0, 9, 0)],
    97: [(0, 25, 0)],
    101: [(0, 25, 0), (20, 26, 5)],
    177: [(0, 25, 0), (20, 45, 5)],
    260: [(0, 25, 0), (20, 45, 5), (40, 65, 5)],
    737: [(0, 25, 0), *((20 * i, 20 * i + 25, 5) for i in range(1, 9))],
}


@pytest.mark.parametrize("frames", SECTIONS)
def test_films_of_any_length_are_cut_into_the_published_sections(frames: int) -> None:
    """Sections of 97 frames, overlap 17: (first, end, given) in latent frames. 260 frames are 65 latent frames, as 257 are."""
    sections = sections_of((frames - 1) // 4 + 1, 5, 50, 5, length=25, overlap=5)
    assert [(w.start, w.end, w.schedule.prefix) for w in sections] == SECTIONS[frames]


def test_sections_of_121_frames_follow_the_published_rule() -> None:
    sections = sections_of(185, 5, 50, 5, length=31, overlap=5)
    assert [(w.start, w.end) for w in sections] == [(26 * i, min(26 * i + 31, 185)) for i in range(7)]


@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (1, 0), (0, 1), (5, 2), (24, 0)])
@pytest.mark.parametrize("frames", [26, 27, 40, 45, 46, 65])
def test_sections_generate_every_frame_that_is_not_given_exactly_once(frames: int, prefix: int, suffix: int) -> None:
    sections = sections_of(frames, 5, 4, 1, 25, 5, prefix, suffix)
    made = [0] * frames
    for section in sections:
        own = section.schedule
        assert own.frames <= 25
        for frame in range(own.prefix, own.frames - own.suffix):
            made[section.start + frame] += 1
    assert made == [0] * prefix + [1] * (frames - prefix - suffix) + [0] * suffix
    numbers = [c.index + w.index for w in sections for row in w.schedule.rows for c in row.active]
    assert sorted(set(numbers)) == list(range(sections[0].schedule.given, sections[-1].index + sections[-1].schedule.chunks))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"overlap": 25}, "sections of 25 latent frames cannot overlap by 25: use an overlap of 1 to 24, or at most 25 latent frames"),
        ({"overlap": 0}, "cannot overlap by 0"),
        ({"overlap": 20, "suffix": 5}, "cannot overlap by 20 and end in 5 given frames: use an overlap of 1 to 19"),
        ({"prefix": 25}, r"25 latent frames are given at the start, but a section holds 25: give at most the last 24 \(93 frames of the clip"),
        ({"prefix": 64, "suffix": 1}, "64 latent frames are given at the start, but a section holds 25"),
    ],
)
def test_sections_that_cannot_work_are_refused_with_the_numbers(settings: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sections_of(**{"frames": 65, "chunk_frames": 5, "steps": 50, "ar_step": 5, "length": 25, "overlap": 5, **settings})


def test_a_film_within_the_window_needs_no_overlap() -> None:
    assert len(sections_of(25, 5, 4, 1, length=25, overlap=0)) == 1


def test_denoise_keeps_the_tail_of_a_longer_schedule_as_the_host_does() -> None:
    assert flow_sigmas(25, 8.0, 0.5) == flow_sigmas(50)[-26:]
    assert flow_sigmas(10, 8.0, 0.3) == flow_sigmas(33)[-11:]
    with pytest.raises(ValueError, match=r"denoise 0 is not above 0 and at most 1"):
        flow_sigmas(10, 8.0, 0)


@pytest.mark.parametrize(
    ("asked", "chunk", "nearest"),
    [(97, 4, (93, 109)), (93, 4, (93, 93)), (57, 3, (57, 57)), (58, 3, (57, 69)), (1, 3, (9, 21)), (96, 5, (77, 97)), (97, 5, (97, 97))],
)
def test_nearest_whole_chunks_enclose_the_asked_length(asked: int, chunk: int, nearest: tuple[int, int]) -> None:
    assert FOUR_N_PLUS_1.nearest(asked, chunk) == nearest


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"frames": 0}, "0 latent frames in chunks of 3: both must be at least 1"),
        ({"chunk_frames": 0}, "9 latent frames in chunks of 0"),
        ({"steps": 0}, "0 steps were asked for: at least 1"),
        ({"ar_step": -1}, "ar_step -1 is negative: 0 denoises all chunks together, 5 is the published stagger"),
        ({"prefix": 9}, "9 of 9 latent frames are given: at least one must be left to generate"),
        ({"prefix": 5, "suffix": 4}, "9 of 9 latent frames are given"),
        ({"prefix": -1}, "-1 given latent frames at the start and 0 at the end: neither can be negative"),
        ({"suffix": -1}, "0 given latent frames at the start and -1 at the end"),
        (
            {"frames": 30, "window": 4, "prefix": 13, "ar_step": 50},
            r"13 latent frames are given at the start, but the window holds 12: give at most the last 12 \(45 frames of the clip\)",
        ),
        (
            {"frames": 30, "window": 4},
            r"10 chunks do not fit a window of 4 at ar_step 5: use ar_step 13 or more, or at most 4 chunks \(12",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_numbers(settings: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ChunkSchedule(**{"frames": 9, "chunk_frames": 3, "steps": 50, **settings})


def test_the_refusal_of_a_small_window_names_a_way_out_that_works() -> None:
    ChunkSchedule(30, 3, 50, ar_step=13, window=4)
    ChunkSchedule(12, 3, 50, ar_step=5, window=4)
    with pytest.raises(ValueError, match="use ar_step 13"):
        ChunkSchedule(30, 3, 50, ar_step=12, window=4)


def test_a_noise_schedule_needs_a_step() -> None:
    with pytest.raises(ValueError, match="0 steps were asked for: at least 1 is needed"):
        flow_sigmas(0)
