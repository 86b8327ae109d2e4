"""A run that was stopped goes on from its last state, and ends in the same film, bit for bit, with the same counts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from flowcache_core.kv.cache import KVStore
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.policy import STORED, KVPolicy
from flowcache_core.kv.scores import KV_POLICIES, Even, Salience
from flowcache_core.policies import OF_PRESETS, POLICIES
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import PRESETS, Motion
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.policies.target import Target
from flowcache_core.run.report import RunReport
from flowcache_core.run.resume import FileCheckpoints, Unreadable
from flowcache_core.run.run import Run
from flowcache_core.run.states import States
from flowcache_core.run.turn import Turn
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.given import GivenNoise
from flowcache_core.sampling.schedule import ChunkSchedule, sections_of
from flowcache_core.sampling.solvers import SOLVERS, Renoise, Solver
from tests.resuming import LONG, SIDE, STEPS, Setup, Stopped, goes_on, same
from tests.toy_family import TOY, toy_network

POLICIES_TESTED: dict[str, CachePolicy] = {
    **{kind.name: kind() for kind in POLICIES if kind not in (Target, Chunkwise, Motion)},
    "never reuses": Chunkwise.uncached(),
    "threshold": Chunkwise(0.5, warmup_steps=2),
    "threshold latent": Chunkwise(0.5, warmup_steps=2, signature="latent", replay="residual", order=0),
    "target time": Target(share=0.7, warmup_steps=2),
    "target latent": Target(share=0.7, warmup_steps=2, signature="latent"),
    "planned seconds": Planned(seconds=1e-6),
    "multirate": Multirate(share=0.5),
    **{f"motion {measure}": Motion(0.6, base=Chunkwise(0.6, 2), coarse=0.3, min_refresh=0.0, measure=measure)
       for measure in ("clean", "noisy", "output", "change")},
    "motion residual": Motion(0.6, base=Chunkwise(0.6, 2, replay="residual"), coarse=0.3, min_refresh=0.0),
    **{f"motion {name}": preset for name, preset in PRESETS.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES_TESTED)
def test_under_every_policy(name: str, resumable: Callable[..., Setup], tmp_path: Path) -> None:
    goes_on(resumable(policy=POLICIES_TESTED[name]), tmp_path / "states")


def test_every_policy_is_among_them() -> None:
    assert {type(policy) for policy in POLICIES_TESTED.values()} == {*POLICIES, *OF_PRESETS}


@pytest.mark.parametrize("kind", KV_POLICIES, ids=lambda kind: kind.name)
def test_under_every_score_of_history(kind: type[KVPolicy], resumable: Callable[..., Setup], salience_head: Path, tmp_path: Path) -> None:
    policy = Salience(str(salience_head)) if kind is Salience else kind()
    goes_on(resumable(replace(LONG, ar_step=STEPS), kv=Compressor(policy, 1.5)), tmp_path / "states")


@pytest.mark.parametrize("more", [
    *({"dtype": dtype, "offload": offload} for dtype in STORED for offload in (False, True)),
    {"soft": 0.3}, {"granularity": "frame"}, {"granularity": "chunk"},
], ids=lambda more: " ".join(map(str, more.values())))  # fmt: skip
def test_in_every_form_of_history(more: dict[str, Any], resumable: Callable[..., Setup], tmp_path: Path) -> None:
    goes_on(resumable(replace(LONG, window=None), kv=Compressor(Even(), 2.0, **more), layers=2), tmp_path / "states")


@pytest.mark.parametrize("kind", SOLVERS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("policy", [None, Planned(share=0.7), Multirate(share=0.5)], ids=["all", "plan", "plan in part"])
def test_with_every_solver(kind: type[Solver], policy: CachePolicy | None, resumable: Callable[..., Setup], tmp_path: Path) -> None:
    goes_on(resumable(policy=policy, solver=kind()), tmp_path / "states")


@pytest.mark.parametrize("solver", [None, Renoise()], ids=["usual", "adds noise"])
def test_guided_inside_the_run_with_texts_of_chunks_and_ranges(solver: Solver | None, tmp_path: Path) -> None:
    """Three branches, grouped heads, and a solver that draws random numbers."""
    network = toy_network()
    adapter, schedule = TOY.adapter(network, None), ChunkSchedule(24, 6, STEPS, 2, 4, pixels=TOY.frames)
    run = Run(TOY, adapter, schedule, TOY.noise.levels(STEPS, 3.0), (16, 8, 8), given=GivenNoise(0, 3), **({"solver": solver} if solver else {}))
    context, noise = torch.randn(1, 4, 8), torch.randn(1, 16, 24, 8, 8)
    goes_on(Setup(run, noise, lambda turn, x: turn.denoise(x, context, ("prompt",))), tmp_path / "states")


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_two_films_of_two_branches(apart: bool, resumable: Callable[..., Setup], tmp_path: Path) -> None:
    kv = Compressor(Even(), 1.5, dtype="int8")
    goes_on(resumable(policy=Chunkwise(0.5, 2, signature="latent"), kv=kv, films=2, apart=apart), tmp_path / "states")


def test_what_guidance_asks_for_beside_the_steps_is_counted_over_the_whole_film(resumable: Callable[..., Setup], tmp_path: Path) -> None:
    made = resumable()
    of_steps = made.evaluate

    def evaluate(turn: Turn, x: Tensor) -> Tensor:
        out = of_steps(turn, x)
        return out if turn.committing else out + 0.1 * of_steps(turn, x)

    made.evaluate = evaluate
    (said,) = [note for note in made.make()[1].notes if note.startswith("guidance asked for")]
    assert said in goes_on(made, tmp_path / "states").notes


def test_with_frames_that_are_given(resumable: Callable[..., Setup], tmp_path: Path) -> None:
    film = replace(LONG, frames=15, prefix=4, suffix=1)
    report = goes_on(resumable(film, Chunkwise(0.5, 2), given=GivenNoise(20, 5)), tmp_path / "states")
    assert any("of 4 chunks were finished" in note for note in report.notes)


@pytest.mark.parametrize("policy", [None, Planned(share=0.6)], ids=["every row", "plan"])
@pytest.mark.parametrize("ar_step", [0, 2])
def test_over_bidirectional_sections(policy: CachePolicy | None, ar_step: int, resumable: Callable[..., Setup], tmp_path: Path) -> None:
    """Stopped within sections and between them; frames given with light noise, which is fresh in every row."""
    sections = sections_of(15, 3, STEPS, ar_step, 9, 3, prefix=2)
    made = resumable(sections, policy, apart=True, given=GivenNoise(20, 5))
    whole = made.make()
    rows = sum(len(section.schedule.rows) for section in sections)
    for stop in range(4, rows, 6):
        folder = tmp_path / f"states {stop}"
        try:
            made.make(States(folder), stop)
        except Stopped:
            same(whole, made.make(States(folder)))


@pytest.mark.parametrize("policy", [Chunkwise(0.5, 2), Multirate(share=0.5), Planned(share=0.6)], ids=lambda policy: policy.name)
def test_from_wherever_it_was_stopped(policy: CachePolicy, resumable: Callable[..., Setup], tmp_path: Path) -> None:
    made = resumable(ChunkSchedule(9, 3, STEPS, 2), policy, kv=Compressor(Even(), 1.5))
    whole = made.make()
    for stop in (1, 5, 8, 11, 14):
        folder = tmp_path / f"states {stop}"
        try:
            made.make(States(folder), stop)
        except Stopped:
            same(whole, made.make(States(folder)))


def test_a_plan_by_the_clock_is_kept(resumable: Callable[..., Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seconds = resumable(policy=Planned(seconds=1.0)), iter((0.02, 0.5))
    monkeypatch.setattr("flowcache_core.sampling.loop.seconds_of", lambda evaluate, chunk, device: next(seconds))
    monkeypatch.setattr("flowcache_core.sampling.loop.frame_seconds", lambda schedule, evaluate, device: next(seconds))
    whole = made.make()
    seconds = iter((0.02,))
    same(whole, made.make_in_pieces(tmp_path / "states", (10,)))


def test_a_device_that_is_out_of_memory_loses_no_state(resumable: Callable[..., Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is good, and the next run goes on from it: the film may not begin anew over it."""
    made = resumable()
    whole = made.make()
    with pytest.raises(Stopped):
        made.make(States(tmp_path), made.evaluations - 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def no_room(store: KVStore, value: object, device: torch.device) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as full:
        full.setattr(KVStore, "take_in", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            made.make(States(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    same(whole, made.make(States(tmp_path)))
    assert made.evaluations == 2


def test_a_state_that_does_not_fit_holds_nothing_while_the_film_begins_anew(
    resumable: Callable[..., Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, left = resumable(), []
    with pytest.raises(Stopped):
        made.make(States(tmp_path), 10)

    def refused(checkpoints: FileCheckpoints, report: RunReport) -> None:
        large = torch.zeros(1)
        left.append(weakref.ref(large))
        raise Unreadable("it was made not to fit")

    evaluate = made.evaluate

    def looked(turn: Turn, x: Tensor) -> Tensor:
        assert left[0]() is None
        return evaluate(turn, x)

    made.evaluate = looked
    monkeypatch.setattr(FileCheckpoints, "_require_report", refused)
    _, report = made.make(States(tmp_path))
    assert any("made not to fit" in note for note in report.notes)


def test_a_state_is_written_every_so_many_finished_chunks(resumable: Callable[..., Setup], tmp_path: Path) -> None:
    counts = [resumable().make(States(tmp_path / "states", every))[1].saves.count for every in (1, 2, 3, 4)]
    assert counts == [3, 1, 1, 0], "none after the last chunk"
    _, report = resumable().make(States(tmp_path / "states", 2))
    assert report.as_dict()["saves"] == {"count": 1, "seconds": round(report.saves.seconds, 3), "bytes": report.saves.bytes}
    assert "the state of the run was saved once" in report.text()


def test_without_a_folder_nothing_is_written_or_told(resumable: Callable[..., Setup]) -> None:
    _, report = resumable().make()
    assert report.as_dict()["saves"] == {}
    assert "saved" not in report.text()


def test_an_observer_that_remembers_is_put_back_too(resumable: Callable[..., Setup], tmp_path: Path) -> None:
    class Watch:
        remembers: ClassVar[tuple[str, ...]] = ("steps", "shown")

        def __init__(self) -> None:
            self.steps, self.shown, self.said = 0, torch.zeros(1, 16, 12, SIDE, SIDE), list[str]()

        def begin(self, report: RunReport, said: Iterable[str]) -> None:
            self.said += said

        def step(self, report: RunReport, chunk: Chunk, clean: Tensor | None, film: Tensor) -> None:
            self.steps += 1
            if clean is not None:
                self.shown[:, :, chunk.start : chunk.start + chunk.frames] = clean

    whole, pieces, made = Watch(), [Watch(), Watch()], resumable(policy=Planned(share=0.6))
    made.make(observer=whole)
    with pytest.raises(Stopped):
        made.make(States(tmp_path / "states"), 11, pieces[0])
    made.make(States(tmp_path / "states"), observer=pieces[1])
    assert pieces[1].steps == whole.steps == LONG.chunk_steps
    assert torch.equal(pieces[1].shown, whole.shown)
    assert any("goes on from a saved state" in line for line in pieces[1].said)
