"""The file of a run's state: written whole or not at all, and never trusted. Whatever lies in its place, the film comes out right."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import flowcache_core.run.state_file as state_file
from flowcache_core.models.bundle import load_bundle
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.run.generate import Job, generate
from flowcache_core.run.report import RunReport
from flowcache_core.run.run import Run
from flowcache_core.run.state_file import FORMAT, SUM_BYTES, metadata_of, read_state, write_state
from flowcache_core.run.states import States
from flowcache_core.run.turn import Turn
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule

ROOT = Path(__file__).parent.parent


class Stopped(Exception):
    pass


Make = Callable[..., tuple[Tensor, RunReport]]


@pytest.fixture
def make(make_net: Callable[..., SkyReelsV2], texts: Tensor, noise_of: Callable[..., Tensor]) -> Make:
    """Two chunks, one after the other; with `stop`, no more than so many evaluations."""
    run = Run(SKYREELS, SkyReelsAdapter(make_net(layers=1)), ChunkSchedule(6, 3, 3, 3), flow_sigmas(3), (16, 4, 4))

    def made(folder: Path | None = None, stop: int | None = None) -> tuple[Tensor, RunReport]:
        left = iter(range(stop or 10**6))

        def evaluate(turn: Turn, x: Tensor) -> Tensor:
            if next(left, None) is None:
                raise Stopped
            return turn.denoise(x, texts[:1], ("cond",))

        return run.sample(noise_of(6), evaluate, states=States(folder) if folder else None)

    return made


@pytest.fixture
def state(make: Make, tmp_path: Path) -> Path:
    with pytest.raises(Stopped):
        make(tmp_path / "states", 5)
    (path,) = (tmp_path / "states").iterdir()
    return path


def tampered(path: Path, change: Callable[[dict[str, Any]], None], head: Callable[[dict[str, Any]], None] = lambda header: None) -> None:
    """Another tree, or another header, under a checksum that is right."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    begin, end = header["tree"]["data_offsets"]
    tree = json.loads(data[8 + length + begin : 8 + length + end])
    change(tree)
    text = json.dumps(tree).encode()
    header["tree"].update(shape=[len(text)], data_offsets=[begin, begin + len(text)])
    header["sha256"]["data_offsets"] = [begin + len(text), begin + len(text) + SUM_BYTES]
    head(header)
    front = json.dumps(header).encode()
    whole = struct.pack("<Q", len(front)) + front + data[8 + length : 8 + length + begin] + text
    path.write_bytes(whole + hashlib.sha256(whole).digest())


def flipped(at: float) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 4
        path.write_bytes(data)

    return flip


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def put(*way: str, value: Any) -> Callable[[Path], None]:
    """A crafted file: another value at a place of the tree."""

    def change(tree: dict[str, Any]) -> None:
        for key in way[:-1]:
            tree = tree[key] if key in tree else tree["fields"][key]
        tree = tree["fields"] if "fields" in tree and way[-1] not in tree else tree
        tree[way[-1]] = value

    return lambda path: tampered(path, change)


def with_metadata(**metadata: Any) -> Callable[[Path], None]:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"]["metadata"] = json.dumps(metadata)

    return lambda path: tampered(path, lambda tree: None, change)


def deep(path: Path) -> None:
    value: Any = 0
    for _ in range(500):
        value = [value]
    put("session", "plan", value=value)(path)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a state"),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "endless header": lambda path: path.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    **{f"cut at {share:.0%}": cut(share) for share in (0.001, 0.1, 0.5, 0.9, 0.9999)},
    **{f"a bit at {at:.0%}": flipped(at) for at in (0.0, 0.003, 0.2, 0.6, 0.97, 1.0)},
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "a model": lambda path: save_file({"weight": torch.zeros(3)}, path),
    "another format": lambda path: save_file({"0": torch.zeros(3)}, path, {"format": "flowcache-state-0", "metadata": "{}"}),
    "of another film": with_metadata(film={"seed": "9"}),
    "of no film": with_metadata(),
    "nothing in it": lambda path: tampered(path, lambda tree: tree.clear()),
    "no session": lambda path: tampered(path, lambda tree: tree.pop("session")),
    "a list": put("session", value=[]),
    "deep": deep,
    "another object": put("session", "state", "object", value="Session"),
    "an unknown kind": put("session", "plan", value={"object": "Popen", "fields": {"args": "true"}, "number": 99}),
    "an attribute of its own": put("session", "fields", "close", value=1),
    "another number of steps": put("session", "report", "map", value={"array": 1}),
    "no such tensor": put("session", "report", "map", value={"array": 10**6}),
    "numbers for texts": put("session", "report", "notes", value=5),
    "no cache": put("session", "_kv", "held", value=None),
    "another film's latents": put("loop", "moved", value={"tensor": 0}),
    "another section": put("loop", "section", value=7),
    "no number": put("loop", "row", value="first"),
    "beyond the end": put("loop", "row", value=10**9),
    "before the beginning": put("loop", "row", value=-1),
    "never written so": put("loop", "rng", value={"random": "x"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_or_foreign_state_is_named_and_the_film_is_right(kind: str, make: Make, state: Path) -> None:
    HOSTILE[kind](state)
    film, report = make(state.parent)
    assert torch.equal(film, make()[0])
    (note,) = [note for note in report.notes if "cannot be used" in note]
    assert note.startswith("a state of this film was saved, but cannot be used: ")
    assert note.endswith("The film begins anew")
    assert note.isprintable()
    assert len(note) < 500


def test_untampered_it_is_used(make: Make, state: Path) -> None:
    tampered(state, lambda tree: None)
    film, report = make(state.parent)
    assert torch.equal(film, make()[0])
    assert any("goes on" in note for note in report.notes)


def test_a_folder_or_a_broken_neighbour_is_no_state(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "states"
    folder.mkdir()
    (folder / "0123456789abcdef.safetensors").write_bytes(b"broken")
    (folder / "fedcba9876543210.safetensors").mkdir()
    _, report = make(folder)
    assert not report.notes
    assert report.saves.count == 1


# the file


def test_it_is_a_safetensors_file_as_others_read_it(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 2), torch.ones(4, dtype=torch.bfloat16), torch.tensor(5), torch.empty(0, 3), torch.tensor([True, False]),
               torch.arange(6).reshape(2, 3).mT, torch.ones(2).to(torch.float8_e4m3fn)]  # fmt: skip
    path = tmp_path / "a" / "state.safetensors"
    size = write_state(path, {"film": {}}, {"any": "JSON"}, tensors)
    assert size == path.stat().st_size
    read = load_file(path)
    assert all(torch.equal(read[str(k)].float(), tensor.float()) for k, tensor in enumerate(tensors))
    state = read_state(path)
    assert state.tree == {"any": "JSON"}
    assert state.metadata == metadata_of(path) == {"film": {}}
    with state.tensors() as tensor_of:
        assert torch.equal(tensor_of(5), tensors[5])
    assert [file.name for file in path.parent.iterdir()] == ["state.safetensors"]


def test_what_stops_the_writing_leaves_the_earlier_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    write_state(path, {}, 1, [])
    before = path.read_bytes()
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with monkeypatch.context() as patch:
            patch.setattr(state_file, "_bytes_of", lambda tensor, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)):
                write_state(path, {}, 2, [torch.zeros(3)])
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    assert path.read_bytes() == before
    assert FORMAT in before.decode(errors="replace")


# killed

JOB = Job("red circle moves left", frames=57, steps=4, seed=3, size=32, cfg=1.0, ar_step=2)
SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from flowcache_core.models.bundle import load_bundle
from flowcache_core.run.generate import generate
from flowcache_core.run.states import States
from tests.test_state_file import JOB

torch.set_num_threads(1)
bundle, states, chance = load_bundle(), States(Path(sys.argv[1])), random.Random(8)


def begun():
    mine, its = os.pipe()
    child = os.fork()
    if child:
        os.close(its)
        return child, mine
    film, _ = generate(bundle, JOB, on_step=lambda chunk: os.write(its, b"."), states=states)
    torch.save(film, sys.argv[2])
    os._exit(0)


for _ in range(5):
    child, steps = begun()
    for _ in range(chance.randrange(2, 10)):
        os.read(steps, 1)
    time.sleep(chance.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(steps)
child, steps = begun()
count = 0
while os.read(steps, 1):
    count += 1
assert os.waitpid(child, 0)[1] == 0
print(count)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="one process that is ready makes all others")
def test_a_film_that_was_killed_five_times_is_the_film_in_one_go(tmp_path: Path) -> None:
    """Each process is killed after a few more steps, at a moment that a seed chooses, also while it writes."""
    folder, out, env = tmp_path / "states", tmp_path / "film.pt", {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), str(out)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 5 * JOB.steps, "it went on where another had stood"
    assert torch.equal(torch.load(out), generate(load_bundle(), JOB)[0])
