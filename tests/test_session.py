"""A run leaves nothing behind, whatever ends it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.policies import Chunkwise
from flowcache_core.run.report import RunReport
from flowcache_core.run.sections import SectionSession
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule, sections_of
from flowcache_core.sampling.solvers import Euler, UniPC
from tests.driven import Driven

POLICY = Chunkwise(threshold=0.2, warmup_steps=2)


def empty(session: Session) -> bool:
    return len(session.state) == 0 and session._kv.bytes == 0 and not session._text


def run(session: Session, noise: Tensor, text: Tensor, stop_at: int = -1, error: type[BaseException] = RuntimeError) -> Tensor:
    calls = 0

    def predict(x: Tensor, chunk: Chunk) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise error("stop")
        return session.denoise(x, chunk, text, ("cond",))

    return sample_chunks(Driven(predict, session), noise, session.schedule, session.sigmas, Euler())


@pytest.fixture
def session(net: SkyReelsV2) -> Session:
    return Session(SkyReelsAdapter(net), ChunkSchedule(9, 3, 6, 2), flow_sigmas(6), (4, 4), policy=POLICY)


def test_a_finished_run_leaves_no_state_and_no_memory(session: Session, noise_of: Callable[..., Tensor], texts: Tensor) -> None:
    with session:
        run(session, noise_of(9), texts[:1])
        assert len(session.state) == 0, "every chunk is dropped when it becomes history"
        assert session._kv.bytes > 0
    assert empty(session)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stop_at", [1, 2, 10, 19])
def test_an_interrupted_run_leaves_no_state_and_no_memory(
    session: Session, noise_of: Callable[..., Tensor], texts: Tensor, error: type[BaseException], stop_at: int
) -> None:
    with pytest.raises(error, match="stop"), session:
        run(session, noise_of(9), texts[:1], stop_at, error)
    assert empty(session)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_run_over_windows_leaves_no_text(
    net: SkyReelsV2, noise_of: Callable[..., Tensor], texts: Tensor, error: type[BaseException] | None
) -> None:
    session = SectionSession(SkyReelsAdapter(net), sections_of(3, 3, 4, 0, 3, 1), (4, 4))
    with pytest.raises(error) if error else nullcontext(), session:
        session.denoise(noise_of(3), (0.5,) * 3, texts[:1], ("cond",))
        assert session._text
        if error:
            raise error
    assert not session._text


def test_only_chunks_in_flight_are_remembered(session: Session, noise_of: Callable[..., Tensor], texts: Tensor) -> None:
    most = 0
    with session:

        def predict(x: Tensor, chunk: Chunk) -> Tensor:
            nonlocal most
            out = session.denoise(x, chunk, texts[:1], ("cond",))
            most = max(most, len(session.state))
            return out

        sample_chunks(Driven(predict, session), noise_of(9), session.schedule, session.sigmas, Euler())
    assert most == max(len(row.active) for row in session.schedule.rows)


def test_two_runs_in_one_process_are_equal_bit_for_bit(cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor]) -> None:
    films = [cached(noise_of(9), ChunkSchedule(9, 3, 8, 2), UniPC(), POLICY)[0] for _ in range(2)]
    assert torch.equal(*films)


def test_a_run_of_another_size_in_between_changes_nothing(cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor]) -> None:
    first, _ = cached(noise_of(9), ChunkSchedule(9, 3, 8, 2), policy=POLICY)
    other, _ = cached(noise_of(5, side=6), ChunkSchedule(5, 2, 8, 3), policy=POLICY)
    again, _ = cached(noise_of(9), ChunkSchedule(9, 3, 8, 2), policy=POLICY)
    assert torch.equal(first, again)
    assert other.shape == (1, 16, 5, 6, 6)
    assert torch.isfinite(other).all()


def test_sampling_leaves_the_noise_alone(cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor]) -> None:
    noise = noise_of(6)
    cached(noise, ChunkSchedule(6, 3, 4, 2), UniPC(), POLICY)
    assert torch.equal(noise, noise_of(6))


def test_a_later_chunk_never_changes_an_earlier_one(cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor]) -> None:
    schedule, noise = ChunkSchedule(9, 3, 6, 2), noise_of(9)
    film, _ = cached(noise, schedule, policy=POLICY)
    noise[:, :, 6:] *= -1
    other, _ = cached(noise, schedule, policy=POLICY)
    assert torch.equal(film[:, :, :6], other[:, :, :6])
    assert not torch.allclose(film[:, :, 6:], other[:, :, 6:])


def test_a_chunk_ignores_what_lies_beyond_the_window(cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor]) -> None:
    """With one chunk in reach every chunk is a film of its own, but for its place in time."""
    schedule, noise = ChunkSchedule(6, 3, 4, 4, window=1), noise_of(6)
    film, _ = cached(noise, schedule)
    noise[:, :, :3] *= -1
    other, _ = cached(noise, schedule)
    assert torch.equal(film[:, :, 3:], other[:, :, 3:])


def test_a_given_prefix_is_history(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    """A film whose first chunk is given goes on as the film that made this chunk would have."""
    sigmas, noise = flow_sigmas(4), noise_of(6)
    films = []
    for prefix, start in ((0, noise), (3, None)):
        schedule = ChunkSchedule(6, 3, 4, 4, prefix=prefix)
        if start is None:
            start = torch.cat([films[0][:, :, :3], noise[:, :, 3:]], 2)
        with Session(SkyReelsAdapter(net), schedule, sigmas, (4, 4)) as session:
            films.append(run(session, start, texts[:1]))
    torch.testing.assert_close(films[1], films[0], rtol=1e-4, atol=1e-4)


def test_on_step_sees_every_step_and_the_last_clean_prediction_is_the_result(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    seen: list[tuple[int, int]] = []
    clean: dict[int, Tensor] = {}

    def on_step(chunk: Chunk, prediction: Tensor, film: Tensor) -> None:
        seen.append((chunk.index, chunk.step))
        clean[chunk.index] = prediction

    schedule, sigmas = ChunkSchedule(6, 3, 5, 2), flow_sigmas(5)
    with Session(SkyReelsAdapter(net), schedule, sigmas, (4, 4)) as session:
        film = sample_chunks(
            Driven(lambda x, chunk: session.denoise(x, chunk, texts[:1], ("cond",)), session, on_step), noise_of(6), schedule, sigmas, Euler()
        )
    assert sorted(seen) == [(k, j) for k in range(2) for j in range(5)]
    torch.testing.assert_close(torch.cat([clean[0], clean[1]], 2), film, rtol=1e-5, atol=1e-5)


def test_commits_are_counted_once_per_chunk_that_is_looked_back_on(
    cached: Callable[..., tuple[Tensor, RunReport]], noise_of: Callable[..., Tensor]
) -> None:
    _, report = cached(noise_of(9), ChunkSchedule(9, 3, 4, 2))
    assert report.commits == 2
    assert report.tokens == report.tokens_computed == (3 * 4 + 2) * 3 * 4


def test_noise_levels_and_steps_must_agree(net: SkyReelsV2) -> None:
    with pytest.raises(ValueError, match="5 noise levels for 6 steps: 7 are needed"):
        Session(SkyReelsAdapter(net), ChunkSchedule(9, 3, 6, 2), flow_sigmas(4), (4, 4))


def test_a_picture_that_does_not_divide_into_patches_is_refused(net: SkyReelsV2) -> None:
    with pytest.raises(ValueError, match="use a picture whose sides are multiples of 16 pixels"):
        Session(SkyReelsAdapter(net), ChunkSchedule(9, 3, 4, 2), flow_sigmas(4), (5, 4))
