"""Where states are saved: those of another film are left alone and what differs is named, and neither a full disk nor another run harms them."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flowcache_core.run.state_file as state_file
import flowcache_core.run.states as states_of_runs
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores import Even, Salience
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.planned import Planned
from flowcache_core.run.report import RunReport
from flowcache_core.run.run import Film
from flowcache_core.run.states import States
from flowcache_core.sampling.given import GivenNoise
from flowcache_core.sampling.schedule import sections_of
from flowcache_core.sampling.solvers import SOLVERS
from tests.resuming import LONG, STEPS, Setup, Stopped, same, save_head, stopped


@pytest.mark.parametrize(("change", "said"), [
    ({"policy": Chunkwise(0.4, 2)}, "cache: threshold: 0.5 there, 0.4 here"),
    ({"policy": None}, "cache: threshold there, null here"),
    ({"kv": Compressor(Even(), 2.0)}, "history: budget: 1.5 there, 2.0 here"),
    ({"given": GivenNoise(20, 6)}, "seed: 5 there, 6 here"),
    ({"film": replace(LONG, ar_step=3)}, "ar_step: 2 there, 3 here"),
    ({"solver": SOLVERS[1]()}, 'solver: unipc there, euler here'),
    ({"scale": 2.0}, "cfg: 1.0 there, 2.0 here"),
], ids=["threshold", "policy", "budget", "seed", "schedule", "solver", "cfg"])  # fmt: skip
def test_another_setting_makes_another_film_and_is_named(change: dict[str, Any], said: str, resumable: Callable[..., Setup], tmp_path: Path) -> None:
    usual: dict[str, Any] = {"policy": Chunkwise(0.5, 2), "kv": Compressor(Even(), 1.5), "given": GivenNoise(20, 5)}
    path, other = stopped(resumable(**usual), tmp_path / "states"), resumable(**{**usual, **change})
    film, report = other.make(States(tmp_path / "states"))
    same((film, report), other.make())
    (note,) = [note for note in report.notes if "another film" in note]
    assert re.match(r"a state of \d of 4 chunks was saved of another film, which differs in ", note)
    assert said in note
    assert path.is_file(), "the other film can still go on"


@pytest.mark.parametrize("film", [LONG, sections_of(15, 3, STEPS, 2, 9, 3)], ids=["chunks", "sections"])
def test_what_is_said_of_states_stays_where_an_evaluation_is_timed(film: Film, resumable: Callable[..., Setup], tmp_path: Path) -> None:
    (tmp_path / "states").write_text("a file in place of the folder")
    said: list[str] = []
    watch = SimpleNamespace(begin=lambda report, notes: said.extend(notes), step=lambda *what: None)
    _, report = resumable(film, Planned(seconds=1e-6), apart=True).make(States(tmp_path / "states"), observer=watch)
    assert [sum("cannot be saved" in line for line in lines) for lines in (report.notes, said)] == [1, 1]
    assert len(said) == len(set(said))


def test_other_noise_another_text_and_other_weights_are_another_film(resumable: Callable[..., Setup], tmp_path: Path) -> None:
    made, folder = resumable(), tmp_path / "states"
    with pytest.raises(Stopped):
        made.make(States(folder, film={"prompt": "a", "weights": "b"}), 14)
    for more, said in (
        ({"prompt": "c", "weights": "b"}, 'prompt: "a" there, "c" here'),
        ({"prompt": "a", "weights": "d"}, 'weights: "b" there, "d" here'),
    ):
        assert said in " ".join(made.make(States(folder, film=more))[1].notes)
    made.noise = made.noise + 1e-3
    assert "noise and given frames: " in " ".join(made.make(States(folder, film={"prompt": "a", "weights": "b"}))[1].notes)


def test_a_setting_that_names_a_file_counts_with_what_is_in_it(resumable: Callable[..., Setup], salience_head: Path, tmp_path: Path) -> None:
    made = resumable(kv=Compressor(Salience(str(salience_head)), 1.5))
    stopped(made, tmp_path / "states")
    torch.manual_seed(1)
    save_head(salience_head)
    assert "history: policy: path: " in " ".join(made.make(States(tmp_path / "states"))[1].notes)


def test_fewer_than_one_chunk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="saved every 0 chunks: use 1 or more"):
        States(tmp_path, 0)


# the folder


def test_the_oldest_states_go_and_what_others_keep_there_stays(resumable: Callable[..., Setup], tmp_path: Path) -> None:
    folder = tmp_path / "states"
    paths = []
    for number in range(states_of_runs.KEPT + 2):
        before = set(folder.glob("*.safetensors"))
        with pytest.raises(Stopped):
            resumable(given=GivenNoise(0, number)).make(States(folder), 12)
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


def test_a_finished_film_takes_the_states_of_all_its_devices_along_and_no_others(tmp_path: Path) -> None:
    """Whichever of them is the last: one that was lost leaves its own behind."""
    film, other = {"seed": "1"}, {"seed": "2"}
    parts = [States(tmp_path, part=part) for part in range(3)]
    for path in (*(part.path(film) for part in parts), parts[0].path(other)):
        path.touch()
    parts[0].drop(film)
    assert list(tmp_path.iterdir()) == [parts[0].path(other)]


def test_the_oldest_states_of_devices_go_together(tmp_path: Path) -> None:
    films = [{"seed": f"{number}"} for number in range(states_of_runs.KEPT + 1)]
    parts = [States(tmp_path, part=part) for part in range(2)]
    for number, film in enumerate(films):
        for part in parts:
            part.path(film).touch()
            os.utime(part.path(film), (number, number))
    parts[0].tidy()
    assert set(tmp_path.iterdir()) == {part.path(film) for part in parts for film in films[1:]}


def test_a_full_disk_stops_neither_the_run_nor_the_earlier_state(
    resumable: Callable[..., Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = resumable(policy=Chunkwise(0.5, 2))
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


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(resumable: Callable[..., Setup], tmp_path: Path) -> None:
    (tmp_path / "states").write_text("a file in its place")
    made = resumable()
    film, report = made.make(States(tmp_path / "states"))
    same(made.make(), (film, report))
    assert [note for note in report.notes if note.startswith("the state of this run cannot be saved (File exists)")]
    assert (tmp_path / "states").read_text() == "a file in its place"


def test_two_runs_of_one_film_at_the_same_time_do_not_hurt_each_other(resumable: Callable[..., Setup], tmp_path: Path) -> None:
    made, folder = resumable(policy=Chunkwise(0.5, 2)), tmp_path / "states"
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
