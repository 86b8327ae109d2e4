"""A run that was stopped goes on from its last state, and ends in the same film, bit for bit, with the same counts."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import flowcache_core.run.state_file as state_file
import flowcache_core.run.states as states_of_runs
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.policy import STORED, KVPolicy
from flowcache_core.kv.scores import KV_POLICIES, Even, Salience
from flowcache_core.kv.scores.salience import HeadInfo, SalienceHead
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.policies import POLICIES
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import PRESETS, Motion
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.policies.target import Target
from flowcache_core.run.remembered import Reader, Writer, kinds_of
from flowcache_core.run.report import RunReport
from flowcache_core.run.run import Film, Run, Turn
from flowcache_core.run.states import States
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.given import GivenNoise
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule, sections_of
from flowcache_core.sampling.solvers import SOLVERS, Renoise, Solver
from tests.toy_family import TOY, toy_network

STEPS, SIDE = 5, 4
LONG = ChunkSchedule(12, 3, STEPS, 2, window=3)
"""Four chunks in a window of three that rolls on."""
ASIDE = {"wall_s", "seconds", "notes", "saves"}
"""What a report may tell otherwise of a film that was made in pieces."""
Evaluate = Callable[[Turn, Tensor], Tensor]


class Stopped(Exception):
    pass


@dataclass
class Setup:
    """A run, its noise, and who evaluates."""

    run: Run
    noise: Tensor
    evaluate: Evaluate
    evaluations: int = 0
    """Of the run that was made last."""

    def make(self, states: States | None = None, evaluations: int | None = None, observer: Any = None) -> tuple[Tensor, RunReport]:
        """`evaluations`: after so many the run is stopped."""
        self.evaluations = 0

        def counted(turn: Turn, x: Tensor) -> Tensor:
            if self.evaluations == evaluations:
                raise Stopped
            self.evaluations += 1
            return self.evaluate(turn, x)

        return self.run.sample(self.noise, counted, observer, states)

    def make_in_pieces(self, folder: Path, evaluations: Iterable[int]) -> tuple[Tensor, RunReport]:
        for piece in evaluations:
            with pytest.raises(Stopped):
                self.make(States(folder), piece)
        return self.make(States(folder))


@pytest.fixture
def setup(make_net: Callable[..., SkyReelsV2], texts: Tensor, noise_of: Callable[..., Tensor]) -> Callable[..., Setup]:
    """`apart`: the host runs the branches one after the other."""
    nets = cache(lambda layers: make_net(layers=layers))

    def make(film: Film = LONG, policy: CachePolicy | None = None, kv: Compressor | None = None, films: int = 1,
             apart: bool = False, layers: int = 1, **settings: Any) -> Setup:  # fmt: skip
        steps = film.steps if isinstance(film, ChunkSchedule) else film[0].schedule.steps
        run = Run(SKYREELS, SkyReelsAdapter(nets(layers)), film, flow_sigmas(steps), (16, SIDE, SIDE), policy=policy, compressor=kv, **settings)

        def evaluate(turn: Turn, x: Tensor) -> Tensor:
            context = texts.repeat_interleave(films, 0)
            if apart:
                cond, uncond = (turn.denoise(x, context[k * films : (k + 1) * films], (name,)) for k, name in enumerate(("cond", "uncond")))
            else:
                cond, uncond = turn.denoise(x.repeat(2, 1, 1, 1, 1), context, ("cond", "uncond")).chunk(2)
            return uncond + 3 * (cond - uncond)

        return Setup(run, noise_of(film.frames if isinstance(film, ChunkSchedule) else film[-1].end, batch=films), evaluate)

    return make


def same(one: tuple[Tensor, RunReport], other: tuple[Tensor, RunReport]) -> None:
    assert torch.equal(one[0], other[0])
    mine, theirs = ({key: value for key, value in report.as_dict().items() if key not in ASIDE} for _, report in (one, other))
    assert mine == theirs
    for name in ("visits", "drift", "planned"):
        assert np.array_equal(getattr(one[1], name), getattr(other[1], name)), name


def goes_on(setup: Setup, folder: Path) -> RunReport:
    """Stopped twice, the second time before the first state of its own may be there."""
    whole, count = setup.make(), setup.evaluations
    made = setup.make_in_pieces(folder, (count * 6 // 10, count // 4))
    assert setup.evaluations < count
    same(whole, made)
    assert any(note.startswith("goes on from a saved state") for note in made[1].notes), made[1].notes
    assert not folder.exists(), "a finished film leaves nothing"
    return made[1]


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
def test_under_every_policy(name: str, setup: Callable[..., Setup], tmp_path: Path) -> None:
    goes_on(setup(policy=POLICIES_TESTED[name]), tmp_path / "states")


def test_every_policy_is_among_them() -> None:
    assert {type(policy) for policy in POLICIES_TESTED.values()} == set(POLICIES)


@pytest.fixture
def head(tmp_path: Path) -> Path:
    SalienceHead(HeadInfo(1, 128, 16, 3, "a test", "none", "none", 0, "none")).save(tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


@pytest.mark.parametrize("kind", KV_POLICIES, ids=lambda kind: kind.name)
def test_under_every_score_of_history(kind: type[KVPolicy], setup: Callable[..., Setup], head: Path, tmp_path: Path) -> None:
    policy = Salience(str(head)) if kind is Salience else kind()
    goes_on(setup(replace(LONG, ar_step=STEPS), kv=Compressor(policy, 1.5)), tmp_path / "states")


@pytest.mark.parametrize("more", [
    *({"dtype": dtype, "offload": offload} for dtype in STORED for offload in (False, True)),
    {"soft": 0.3}, {"granularity": "frame"}, {"granularity": "chunk"},
], ids=lambda more: " ".join(map(str, more.values())))  # fmt: skip
def test_in_every_form_of_history(more: dict[str, Any], setup: Callable[..., Setup], tmp_path: Path) -> None:
    goes_on(setup(replace(LONG, window=None), kv=Compressor(Even(), 2.0, **more), layers=2), tmp_path / "states")


@pytest.mark.parametrize("kind", SOLVERS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("policy", [None, Planned(share=0.7), Multirate(share=0.5)], ids=["all", "plan", "plan in part"])
def test_with_every_solver(kind: type[Solver], policy: CachePolicy | None, setup: Callable[..., Setup], tmp_path: Path) -> None:
    goes_on(setup(policy=policy, solver=kind()), tmp_path / "states")


@pytest.mark.parametrize("solver", [None, Renoise()], ids=["usual", "adds noise"])
def test_guided_inside_the_run_with_texts_of_chunks_and_ranges(solver: Solver | None, tmp_path: Path) -> None:
    """Three branches, grouped heads, and a solver that draws random numbers."""
    network = toy_network()
    adapter, schedule = TOY.adapter(network, None), ChunkSchedule(24, 6, STEPS, 2, 4, pixels=TOY.frames)
    run = Run(TOY, adapter, schedule, TOY.noise.levels(STEPS, 3.0), (16, 8, 8), given=GivenNoise(0, 3), **({"solver": solver} if solver else {}))
    context, noise = torch.randn(1, 4, 8), torch.randn(1, 16, 24, 8, 8)
    goes_on(Setup(run, noise, lambda turn, x: turn.denoise(x, context, ("prompt",))), tmp_path / "states")


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_two_films_of_two_branches(apart: bool, setup: Callable[..., Setup], tmp_path: Path) -> None:
    kv = Compressor(Even(), 1.5, dtype="int8")
    goes_on(setup(policy=Chunkwise(0.5, 2, signature="latent"), kv=kv, films=2, apart=apart), tmp_path / "states")


def test_with_frames_that_are_given(setup: Callable[..., Setup], tmp_path: Path) -> None:
    film = replace(LONG, frames=15, prefix=4, suffix=1)
    report = goes_on(setup(film, Chunkwise(0.5, 2), given=GivenNoise(20, 5)), tmp_path / "states")
    assert any("of 4 chunks were finished" in note for note in report.notes)


@pytest.mark.parametrize("policy", [None, Planned(share=0.6)], ids=["every row", "plan"])
@pytest.mark.parametrize("ar_step", [0, 2])
def test_over_bidirectional_sections(policy: CachePolicy | None, ar_step: int, setup: Callable[..., Setup], tmp_path: Path) -> None:
    """Stopped within sections and between them; frames given with light noise, which is fresh in every row."""
    sections = sections_of(15, 3, STEPS, ar_step, 9, 3, prefix=2)
    made = setup(sections, policy, apart=True, given=GivenNoise(20, 5))
    whole = made.make()
    rows = sum(len(section.schedule.rows) for section in sections)
    for stop in range(4, rows, 6):
        folder = tmp_path / f"states {stop}"
        try:
            made.make(States(folder), stop)
        except Stopped:
            same(whole, made.make(States(folder)))


@pytest.mark.parametrize("policy", [Chunkwise(0.5, 2), Multirate(share=0.5), Planned(share=0.6)], ids=lambda policy: policy.name)
def test_from_wherever_it_was_stopped(policy: CachePolicy, setup: Callable[..., Setup], tmp_path: Path) -> None:
    made = setup(ChunkSchedule(9, 3, STEPS, 2), policy, kv=Compressor(Even(), 1.5))
    whole = made.make()
    for stop in (1, 5, 8, 11, 14):
        folder = tmp_path / f"states {stop}"
        try:
            made.make(States(folder), stop)
        except Stopped:
            same(whole, made.make(States(folder)))


def test_a_plan_by_the_clock_is_kept(setup: Callable[..., Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seconds = setup(policy=Planned(seconds=1.0)), iter((0.02, 0.5))
    monkeypatch.setattr("flowcache_core.sampling.loop.seconds_of", lambda evaluate, chunk, device: next(seconds))
    monkeypatch.setattr("flowcache_core.sampling.loop.frame_seconds", lambda schedule, evaluate, device: next(seconds))
    whole = made.make()
    seconds = iter((0.02,))
    same(whole, made.make_in_pieces(tmp_path / "states", (10,)))


def test_a_state_is_written_every_so_many_finished_chunks(setup: Callable[..., Setup], tmp_path: Path) -> None:
    counts = [setup().make(States(tmp_path / "states", every))[1].saves.count for every in (1, 2, 3, 4)]
    assert counts == [3, 1, 1, 0], "none after the last chunk"
    _, report = setup().make(States(tmp_path / "states", 2))
    assert report.as_dict()["saves"] == {"count": 1, "seconds": round(report.saves.seconds, 3), "bytes": report.saves.bytes}
    assert "the state of the run was saved once" in report.text()


def test_without_a_folder_nothing_is_written_or_told(setup: Callable[..., Setup]) -> None:
    _, report = setup().make()
    assert report.as_dict()["saves"] == {}
    assert "saved" not in report.text()


def test_an_observer_that_remembers_is_put_back_too(setup: Callable[..., Setup], tmp_path: Path) -> None:
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

    whole, pieces, made = Watch(), [Watch(), Watch()], setup(policy=Planned(share=0.6))
    made.make(observer=whole)
    with pytest.raises(Stopped):
        made.make(States(tmp_path / "states"), 11, pieces[0])
    made.make(States(tmp_path / "states"), observer=pieces[1])
    assert pieces[1].steps == whole.steps == LONG.chunk_steps
    assert torch.equal(pieces[1].shown, whole.shown)
    assert any("goes on from a saved state" in line for line in pieces[1].said)


# what is not this film


def stopped(made: Setup, folder: Path, evaluations: int = 14) -> Path:
    with pytest.raises(Stopped):
        made.make(States(folder), evaluations)
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.mark.parametrize(("change", "said"), [
    ({"policy": Chunkwise(0.4, 2)}, "cache: threshold: 0.5 there, 0.4 here"),
    ({"policy": None}, "cache: threshold there, null here"),
    ({"kv": Compressor(Even(), 2.0)}, "history: budget: 1.5 there, 2.0 here"),
    ({"given": GivenNoise(20, 6)}, "seed: 5 there, 6 here"),
    ({"film": replace(LONG, ar_step=3)}, "ar_step: 2 there, 3 here"),
    ({"solver": SOLVERS[1]()}, 'solver: unipc there, euler here'),
    ({"scale": 2.0}, "cfg: 1.0 there, 2.0 here"),
], ids=["threshold", "policy", "budget", "seed", "schedule", "solver", "cfg"])  # fmt: skip
def test_another_setting_makes_another_film_and_is_named(change: dict[str, Any], said: str, setup: Callable[..., Setup], tmp_path: Path) -> None:
    usual: dict[str, Any] = {"policy": Chunkwise(0.5, 2), "kv": Compressor(Even(), 1.5), "given": GivenNoise(20, 5)}
    path, other = stopped(setup(**usual), tmp_path / "states"), setup(**{**usual, **change})
    film, report = other.make(States(tmp_path / "states"))
    same((film, report), other.make())
    (note,) = [note for note in report.notes if "another film" in note]
    assert re.match(r"a state of \d of 4 chunks was saved of another film, which differs in ", note)
    assert said in note
    assert path.is_file(), "the other film can still go on"


def test_other_noise_another_text_and_other_weights_are_another_film(setup: Callable[..., Setup], tmp_path: Path) -> None:
    made, folder = setup(), tmp_path / "states"
    with pytest.raises(Stopped):
        made.make(States(folder, film={"prompt": "a", "weights": "b"}), 14)
    for more, said in (
        ({"prompt": "c", "weights": "b"}, 'prompt: "a" there, "c" here'),
        ({"prompt": "a", "weights": "d"}, 'weights: "b" there, "d" here'),
    ):
        assert said in " ".join(made.make(States(folder, film=more))[1].notes)
    made.noise = made.noise + 1e-3
    assert "noise and given frames: " in " ".join(made.make(States(folder, film={"prompt": "a", "weights": "b"}))[1].notes)


def test_a_setting_that_names_a_file_counts_with_what_is_in_it(setup: Callable[..., Setup], head: Path, tmp_path: Path) -> None:
    made = setup(kv=Compressor(Salience(str(head)), 1.5))
    stopped(made, tmp_path / "states")
    torch.manual_seed(1)
    SalienceHead(HeadInfo(1, 128, 16, 3, "a test", "none", "none", 0, "none")).save(head)
    assert "history: policy: path: " in " ".join(made.make(States(tmp_path / "states"))[1].notes)


def test_fewer_than_one_chunk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="saved every 0 chunks: use 1 or more"):
        States(tmp_path, 0)


# the folder


def test_the_oldest_states_go_and_what_others_keep_there_stays(setup: Callable[..., Setup], tmp_path: Path) -> None:
    folder = tmp_path / "states"
    paths = []
    for number in range(states_of_runs.KEPT + 2):
        before = set(folder.glob("*.safetensors"))
        with pytest.raises(Stopped):
            setup(given=GivenNoise(0, number)).make(States(folder), 12)
        (path,) = set(folder.glob("*.safetensors")) - before
        os.utime(path, (number, number))
        paths.append(path)
    (folder / "mine.safetensors").write_bytes(b"")
    (folder / ".0123456789abcdef.01234567.partial").write_bytes(b"half")
    os.utime(folder / ".0123456789abcdef.01234567.partial", (0, 0))
    (folder / ".0123456789abcdef.76543210.partial").write_bytes(b"being written")
    States(folder).tidy()
    left = {path.name for path in folder.iterdir()}
    assert left == {*(path.name for path in paths[-states_of_runs.KEPT :]), "mine.safetensors", ".0123456789abcdef.76543210.partial"}


def test_a_full_disk_stops_neither_the_run_nor_the_earlier_state(
    setup: Callable[..., Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setup(policy=Chunkwise(0.5, 2))
    whole, path = made.make(), stopped(made, tmp_path / "states")
    before, sync = path.read_bytes(), os.fsync

    def full(file: int) -> None:
        sync(file)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state_file.os, "fsync", full)
    with pytest.raises(Stopped):
        made.make(States(tmp_path / "states"), 5)
    assert [file.read_bytes() for file in (tmp_path / "states").iterdir()] == [before]
    film, report = made.make(States(tmp_path / "states"))
    same(whole, (film, report))
    assert report.saves.count == 0
    (note,) = [note for note in report.notes if "cannot be saved" in note]
    assert note == "the state of this run cannot be saved (No space left on device): the run goes on, and a state that was saved before stays"


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(setup: Callable[..., Setup], tmp_path: Path) -> None:
    (tmp_path / "states").write_text("a file in its place")
    made = setup()
    film, report = made.make(States(tmp_path / "states"))
    same(made.make(), (film, report))
    assert [note for note in report.notes if note.startswith("the state of this run cannot be saved (File exists)")]
    assert (tmp_path / "states").read_text() == "a file in its place"


def test_two_runs_of_one_film_at_the_same_time_do_not_hurt_each_other(setup: Callable[..., Setup], tmp_path: Path) -> None:
    made, folder = setup(policy=Chunkwise(0.5, 2)), tmp_path / "states"
    whole, out = made.make(), list[tuple[Tensor, RunReport]]()

    def run() -> None:
        mine = replace(made)
        with torch.no_grad():
            for evaluations in (16, 8, None):
                try:
                    out.append(mine.make(States(folder), evaluations))
                except Stopped:
                    continue
                return

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(out) == 3
    for one in out:
        same(whole, one)


# what is remembered


def test_what_no_run_remembers_is_refused_when_it_is_written_and_the_run_goes_on(setup: Callable[..., Setup], tmp_path: Path) -> None:
    class Foreign:
        pass

    class Odd(type(SOLVERS[1]())):  # type: ignore[misc]
        name: ClassVar[str] = "odd"

        def start(self, rng: torch.Generator) -> Any:
            return Foreign()

    made = setup(solver=Odd())
    film, report = made.make(States(tmp_path / "states"))
    same(made.make(), (film, report))
    assert "loop.walk_of[1].memory is of type test_what_no" in " ".join(report.notes)
    with pytest.raises(TypeError, match="run is of type int64, which cannot be written down"):
        Writer(kinds_of()).write(np.int64(3))


def test_values_come_back_as_they_were() -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    value = {
        "numbers": [0, -1.5, float("inf"), True, None, "text"],
        ("a", 1): (shared, shared.mT, shared[:, 1:]),
        3: {torch.bfloat16: None}.get(torch.float, np.arange(4, dtype=np.int32)[::2]),
        "set": {1, 2},
        "empty": torch.empty(2, 0, 3),
        "one": torch.tensor(7, dtype=torch.int64),
        "code": torch.ones(3).to(torch.float8_e4m3fn),
    }
    writer = Writer(kinds_of())
    tree = writer.write(value)
    back = Reader(kinds_of(), lambda place: writer.tensors[place].clone(), torch.device("cpu")).read(tree)
    assert list(back) == list(value)
    assert back["numbers"] == value["numbers"]
    assert back["set"] == {1, 2}
    first, turned, part = back["a", 1]
    assert torch.equal(first, shared)
    assert torch.equal(turned, shared.mT)
    assert turned.stride() == shared.mT.stride(), "sums depend on the order in memory"
    assert torch.equal(part, shared[:, 1:])
    assert back[3].tolist() == [0, 2]
    assert back["empty"].shape == (2, 0, 3)
    assert back["one"].item() == 7
    assert back["code"].float().tolist() == [1, 1, 1]


def test_random_numbers_go_on_where_they_stopped() -> None:
    rng = torch.Generator().manual_seed(3)
    torch.randn(5, generator=rng)
    writer = Writer(kinds_of())
    tree = writer.write(rng)
    again = Reader(kinds_of(), lambda place: writer.tensors[place].clone(), torch.device("cpu")).read(tree)
    assert torch.equal(torch.randn(5, generator=rng), torch.randn(5, generator=again))


def test_every_attribute_that_a_run_changes_is_remembered(setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the objects that are there before a run: what differs after some rows is remembered, or follows from what is."""
    from flowcache_core.run.session import Session

    follows = {"_text", "_last", "_chunk_text", "_time_changes", "_caches", "_segments", "_lengths", "_shifts", "seconds", "_started", "_events",
               "told", "_closed", "visits", "_row", "_decisions", "kernels"}  # fmt: skip
    opened: list[tuple[Session, dict[str, set[str]]]] = []

    def parts(session: Session) -> dict[str, Any]:
        kv = session._kv
        report = session.report
        return {"session": session, "state": session.state, "report": report, "clock": report.clock, "history": report.history, "kv": kv,
                "layout": kv.layout, "keeper": kv.keeper}  # fmt: skip

    def seen(one: Any) -> dict[str, str]:
        return {key: repr(value) if not isinstance(value, dict) else repr(list(value)) for key, value in vars(one).items()}

    before: dict[str, dict[str, str]] = {}
    enter = Session.__enter__

    def entering(self: Session) -> Session:
        before.update({name: seen(one) for name, one in parts(self).items()})
        opened.append((self, {}))
        return enter(self)

    monkeypatch.setattr(Session, "__enter__", entering)
    monkeypatch.setattr(Session, "close", lambda self, error=None: None)
    with pytest.raises(Stopped):
        setup(policy=Motion(0.6, base=Chunkwise(0.6, 2, signature="latent"), coarse=0.3, min_refresh=0.0), kv=Compressor(Even(), 1.5)).make(None, 14)
    (session, _), changed = opened[0], {}
    for name, one in parts(session).items():
        changed[name] = {key for key, value in seen(one).items() if value != before[name][key]} - set(one.remembers) - follows
    assert not any(changed.values()), changed


def test_dataclasses_of_a_solver_are_known_by_its_file() -> None:
    assert {"UniPCMemory", "MultistepMemory", "ChunkState"} <= kinds_of(SOLVERS[0]()).keys()
    assert "Pace" in kinds_of(Target())
    assert "Pace" not in kinds_of(Planned())
    assert all(dataclasses.is_dataclass(kind) for kind in kinds_of(Target()).values())
