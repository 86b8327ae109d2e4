"""Films that this process makes together with a worker: those of one device, in the same process again and again, whatever became of the last."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores.importance import ImportanceRedundancy
from flowcache_core.models.adapter import DurationTexts, ModelAdapter
from flowcache_core.models.bundle import NETWORK, Bundle, files_of, load_bundle
from flowcache_core.models.magi_family import MAGI
from flowcache_core.policies import POLICIES, Motion, Planned
from flowcache_core.policies.motion import PRESETS
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.ranks.workers import IDLE, WorkerLost
from flowcache_core.run.follow import FilmWorker
from flowcache_core.run.generate import Guided, Job, generate, run_of
from flowcache_core.run.lead import Leader
from flowcache_core.run.report import RunReport
from flowcache_core.run.shared import FilmSettings
from flowcache_core.run.states import States
from flowcache_core.run.team import Source, Team
from flowcache_core.run.turn import Evaluate, Turn
from tests.resuming import ASIDE

JOB = Job("red circle moves right", frames=21, steps=3, size=32, seed=2, ar_step=2, cfg=3.0)
DEVICES = ("cpu", "cpu")
Around = Callable[[Leader, Evaluate], Evaluate]


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(torch.float64)


@pytest.fixture(scope="module")
def source(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("model") / NETWORK.name
    shutil.copy(NETWORK, path)
    return Source(path, (path,), bundle.family.name, torch.float64)


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """One worker for all tests of this file."""
    devices = Team(DEVICES)
    yield devices
    devices.end()


def film(team: Team, bundle: Bundle, source: Source, job: Job = JOB, policy: CachePolicy | None = None, compressor: Compressor | None = None,
         split_branches: bool = True, around: Around = lambda leader, evaluate: evaluate,
         states: States | None = None) -> tuple[Tensor, RunReport]:  # fmt: skip
    guided = Guided(bundle, job)
    with (
        torch.inference_mode(),
        team.sharing(run_of(bundle, job, policy, compressor), source, guided.branches, split_branches, lambda: None, states) as leader,
    ):
        return leader.sample(job.noise(bundle), around(leader, guided), None, states)


def deviation(mine: Tensor, bundle: Bundle, job: Job = JOB, policy: CachePolicy | None = None, compressor: Compressor | None = None) -> float:
    reference, _ = generate(bundle, job, policy, compressor=compressor)
    return float((mine - reference).abs().max() / reference.abs().max())


def pids(team: Team) -> list[int]:
    assert team.workers is not None
    return [worker.pid for worker in team.workers.all]


CASES: dict[str, dict[str, Any]] = {
    "uncached, branches split": {"split_branches": True},
    "planned, another size": {"policy": Planned(share=0.5), "job": replace(JOB, size=48, width=32, seed=5), "split_branches": False},
    "motion": {"policy": Motion(1.6), "job": replace(JOB, size=48, steps=4), "split_branches": False},
    "kv, branches split": {
        "job": replace(JOB, frames=33),
        "compressor": Compressor(ImportanceRedundancy(), 2.0, dtype="int8"),
        "split_branches": True,
    },
    "one text": {"job": replace(JOB, cfg=1.0), "split_branches": True},
}


@pytest.mark.parametrize("name", CASES)
def test_a_film_is_that_of_one_device(team: Team, bundle: Bundle, source: Source, name: str) -> None:
    case = CASES[name]
    known = pids(team) if team.workers else None
    latents, report = film(team, bundle, source, **case)
    assert deviation(latents, bundle, **{key: value for key, value in case.items() if key != "split_branches"}) <= 1e-12
    mesh = report.devices
    assert mesh["branches"] * mesh["heads"] == 2
    assert mesh["branches"] == 1 or case["split_branches"]
    assert mesh["bytes"] > 0
    assert report.notes[-2].startswith("2 devices, ")
    assert known in (None, pids(team)), "another process"
    assert known is None or team.loaded == [0.0]


def test_a_film_that_was_stopped_leaves_the_worker_and_the_next_film_right(team: Team, bundle: Bundle, source: Source) -> None:
    """Between two evaluations, and inside one, where the worker waits in the middle of a layer."""
    calls = 0

    def interrupted(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Interrupted

    def between(leader: Leader, evaluate: Evaluate) -> Evaluate:
        def call(turn: Turn, x: Tensor) -> Tensor:
            interrupted()
            return evaluate(turn, x)

        return call

    film(team, bundle, source)
    before, (reference, _) = pids(team), generate(bundle, JOB)
    for inside in (False, True):
        calls, hook = 0, bundle.network.blocks[1].register_forward_pre_hook(interrupted) if inside else None
        with pytest.raises(Interrupted):
            film(team, bundle, source, split_branches=False, **({} if inside else {"around": between}))
        if hook is not None:
            hook.remove()
        torch.testing.assert_close(film(team, bundle, source, split_branches=False)[0], reference, rtol=0, atol=1e-12)
        assert pids(team) == before
        assert team.loaded == [0.0]


def test_branches_that_the_run_itself_makes_are_shared_under_any_guider(team: Team) -> None:
    """And what hangs on a text without being in the checkpoint goes along: how many chunks are to come."""
    magi, path = load_bundle(torch.float64, family=MAGI), files_of(MAGI)[0]
    job = Job.usual(MAGI, "red circle moves right", frames=48, steps=4, size=32)
    durations = torch.randn(4, magi.network.config.text_dim, dtype=torch.float64)

    def with_durations(adapter: ModelAdapter, sigmas: Sequence[float]) -> ModelAdapter:
        return cast(DurationTexts, adapter).with_durations(durations)

    run, guided, source = run_of(magi, job), Guided(magi, job), Source(path, (path,), MAGI.name, torch.float64)
    timed = replace(run, adapter=with_durations(run.adapter, ()))
    with torch.inference_mode(), team.sharing(timed, source, guided.branches, False, lambda: None) as leader:
        latents, report = leader.sample(job.noise(magi), guided)
    reference, _ = generate(magi, job, adapter=with_durations)
    torch.testing.assert_close(latents, reference, rtol=0, atol=1e-12)
    assert not torch.allclose(reference, generate(magi, job)[0], atol=1e-6), "durations change nothing"
    assert (report.devices["branches"], report.devices["heads"]) == (2, 1)


# saved on the way


SAVED = replace(JOB, frames=57)
"""Three chunks."""


def at_chunk(index: int, act: Callable[[], object]) -> Around:
    """Does something before the first evaluation of this chunk, once."""
    acts = [act]

    def around(leader: Leader, evaluate: Evaluate) -> Evaluate:
        def call(turn: Turn, x: Tensor) -> Tensor:
            if turn.index == index and acts:
                acts.pop()()
            return evaluate(turn, x)

        return call

    return around


def interrupt() -> None:
    raise Interrupted


def stopped(team: Team, bundle: Bundle, source: Source, folder: Path, **case: Any) -> list[Path]:
    """The files of a film that was interrupted."""
    with pytest.raises(Interrupted):
        film(team, bundle, source, SAVED, states=States(folder), around=at_chunk(2, interrupt), **case)
    return sorted(folder.iterdir())


def counts(report: RunReport) -> dict[str, Any]:
    return {key: value for key, value in report.as_dict().items() if key not in {*ASIDE, "devices"}}


def resumed(report: RunReport) -> list[str]:
    return [note for note in report.notes if note.startswith("goes on from a saved state: ")]


SHARED: dict[str, dict[str, Any]] = {
    "branches": {"policy": Planned(share=0.6)},
    "heads, a budget": {"split_branches": False, "compressor": Compressor(ImportanceRedundancy(), 1.5, dtype="int8")},
}


@pytest.mark.parametrize("name", SHARED)
def test_an_interrupted_film_goes_on_on_all_devices(team: Team, bundle: Bundle, source: Source, tmp_path: Path, name: str) -> None:
    """Each with the state of its own share, under the name that the first one gave it."""
    folder, (whole, report) = tmp_path / "states", film(team, bundle, source, SAVED, **SHARED[name])
    before = pids(team)
    files = stopped(team, bundle, source, folder, **SHARED[name])
    assert [path.name.split(".", 1)[1] for path in files] == ["0.safetensors", "1.safetensors"]
    assert len({path.name.split(".")[0] for path in files}) == 1
    latents, told = film(team, bundle, source, SAVED, states=States(folder), **SHARED[name])
    assert torch.equal(latents, whole)
    assert resumed(told)
    assert counts(told) == counts(report)
    assert told.devices["calls"] < report.devices["calls"]
    assert not folder.exists(), "a finished film leaves nothing"
    assert pids(team) == before


def test_a_film_whose_worker_was_killed_goes_on_with_another(team: Team, bundle: Bundle, source: Source, tmp_path: Path) -> None:
    whole, _ = film(team, bundle, source, SAVED)
    (before,) = pids(team)
    with pytest.raises(WorkerLost, match=r"the process of device 2 of 2 has ended \(status -9\)"):
        film(team, bundle, source, SAVED, states=States(tmp_path), around=at_chunk(2, lambda: os.kill(before, signal.SIGKILL)))
    assert len(list(tmp_path.iterdir())) == 2
    latents, report = film(team, bundle, source, SAVED, states=States(tmp_path))
    assert resumed(report)
    assert torch.equal(latents, whole)
    assert pids(team) != [before]


def test_the_mesh_of_a_state_is_kept_though_another_is_faster(team: Team, bundle: Bundle, source: Source, tmp_path: Path) -> None:
    """What is fastest is timed anew in every process. A state of another film has no say."""
    folder = tmp_path / "states"
    stopped(team, bundle, source, folder, split_branches=False)
    _, other = film(team, bundle, source, replace(SAVED, seed=4), states=States(folder))
    latents, report = film(team, bundle, source, SAVED, states=States(folder))
    assert (other.devices["branches"], report.devices["branches"]) == (2, 1)
    assert not resumed(other)
    assert resumed(report)
    assert torch.equal(latents, film(team, bundle, source, SAVED, split_branches=False)[0])


def test_a_state_of_another_number_of_devices_is_named_and_stays(team: Team, bundle: Bundle, source: Source, tmp_path: Path) -> None:
    guided = Guided(bundle, SAVED)

    def alone(turn: Turn, x: Tensor) -> Tensor:
        if turn.index == 2:
            raise Interrupted
        return guided(turn, x)

    with torch.inference_mode(), pytest.raises(Interrupted):
        run_of(bundle, SAVED).sample(SAVED.noise(bundle), alone, None, States(tmp_path))
    (left,) = tmp_path.iterdir()
    latents, report = film(team, bundle, source, SAVED, states=States(tmp_path))
    (note,) = (note for note in report.notes if "another film" in note)
    assert 'devices: nothing there, "2 x 1" here' in note
    assert deviation(latents, bundle, SAVED) <= 1e-12
    assert list(tmp_path.iterdir()) == [left]


@pytest.mark.parametrize("part", [0, 1])
def test_all_devices_begin_anew_where_the_state_of_one_is_damaged(team: Team, bundle: Bundle, source: Source, tmp_path: Path, part: int) -> None:
    path = stopped(team, bundle, source, tmp_path / "states")[part]
    path.write_bytes(path.read_bytes()[:-1])
    latents, report = film(team, bundle, source, SAVED, states=States(tmp_path / "states"))
    assert not resumed(report)
    assert any("not by all of its devices, or not at the same row: the film begins anew" in note for note in report.notes)
    assert deviation(latents, bundle, SAVED) <= 1e-12
    assert not (tmp_path / "states").exists()


def listening() -> set[str]:
    """Addresses of the sockets of this process that wait for connections."""
    mine = {f"{path.readlink()}" for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")
def test_the_sockets_of_a_film_are_of_the_loopback_interface(team: Team, bundle: Bundle, source: Source) -> None:
    during = set()

    def looked(leader: Leader, evaluate: Evaluate) -> Evaluate:
        during.update(listening())
        return evaluate

    before = listening()
    film(team, bundle, source, around=looked)
    assert during - before == {"0100007F"}
    assert listening() == before


def test_a_file_that_has_changed_is_loaded_anew(team: Team, bundle: Bundle, source: Source) -> None:
    film(team, bundle, source)
    os.utime(source.path, ns=(0, 0))
    film(team, bundle, source)
    assert team.loaded > [0.0]


def test_films_that_cannot_be_shared_are_refused_and_the_worker_stays(team: Team, bundle: Bundle, source: Source) -> None:
    film(team, bundle, source)
    before = pids(team)
    with pytest.raises(ValueError, match="the shortest chunk has 3 tokens, which run at least 1 at a time, and 2 devices"):
        film(team, bundle, source, replace(JOB, size=16, cfg=1.0), Motion(1.6))
    assert pids(team) == before


def test_an_error_in_the_worker_is_a_sentence_and_the_next_film_starts_another(team: Team, bundle: Bundle, source: Source) -> None:
    def astray(leader: Leader, evaluate: Evaluate) -> Evaluate:
        def call(turn: Turn, x: Tensor) -> Tensor:
            if turn.index == 1:
                leader.send(do="evaluate", at=[7, 7, False], branches=[], texts=0, tensors={})
            return evaluate(turn, x)

        return call

    film(team, bundle, source)
    (before,) = pids(team)
    with pytest.raises(WorkerLost, match=r"^device 2 of 2 failed: RuntimeError: it is at chunk 2, .* the next film starts new processes$"):
        film(team, bundle, source, around=astray)
    assert team.workers is None
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


def test_a_worker_that_has_nothing_to_do_for_ten_minutes_ends() -> None:
    class Silence:
        waited: ClassVar[list[float]] = []

        def answer(self, **message: Any) -> None: ...

        def next(self, seconds: float) -> None:
            self.waited.append(seconds)

    FilmWorker(cast(Any, Silence()), 1, 2, torch.device("cpu")).serve()
    assert Silence.waited == [IDLE] == [600]


def test_where_another_pack_uses_several_devices_a_sentence_names_it(bundle: Bundle, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    none = Team(DEVICES)
    with pytest.raises(ValueError, match=r"torch.distributed is in use in this process, by another node pack"):
        film(none, bundle, source)
    assert none.workers is None


def test_an_interrupt_while_a_worker_starts_ends_it(bundle: Bundle, source: Source) -> None:
    started: list[int] = []

    def interrupted() -> None:
        assert none.workers is not None
        started.extend(pids(none))
        raise Interrupted

    none, guided = Team(DEVICES), Guided(bundle, JOB)
    with pytest.raises(Interrupted), none.sharing(run_of(bundle, JOB), source, guided.branches, True, interrupted):
        pass
    assert (none.workers, none.busy) == (None, False)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_settings_of_a_film_are_the_same_on_the_other_side(bundle: Bundle) -> None:
    for case in CASES.values():
        run = run_of(bundle, case.get("job", JOB), case.get("policy"), case.get("compressor"))
        settings = FilmSettings.of(run, ("positive", "negative"))
        assert FilmSettings.from_json(settings.as_json()) == settings


@pytest.mark.parametrize("policy", [*PRESETS.values(), *(kind() for kind in POLICIES)], ids=lambda policy: type(policy).__name__)
def test_every_policy_is_the_same_on_the_other_side(policy: CachePolicy, bundle: Bundle) -> None:
    settings = FilmSettings.of(run_of(bundle, replace(JOB, steps=20), policy), ("positive", "negative"))
    assert FilmSettings.from_json(settings.as_json()) == settings


def test_a_policy_of_another_package_is_refused_before_a_process_starts(bundle: Bundle) -> None:
    class Foreign(Planned):
        name = "foreign"

    run = run_of(bundle, JOB, Foreign(share=0.5))
    with pytest.raises(ValueError, match="Foreign, which cannot be written down, so that no other device can be given it"):
        FilmSettings.of(run, ("positive",)).as_json()


def test_a_model_that_is_not_there_is_refused_before_a_process_starts(bundle: Bundle, tmp_path: Path) -> None:
    away, none = Source(tmp_path / "x.safetensors", (tmp_path / "x.safetensors",), bundle.family.name, torch.float64), Team(DEVICES)
    with pytest.raises(FileNotFoundError):
        film(none, bundle, away)
    assert none.workers is None
