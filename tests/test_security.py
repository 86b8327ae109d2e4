"""What SECURITY.md promises: model files are data, nothing goes over the network, and no other folder is read or written."""

from __future__ import annotations

import ast
import json
import socket
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flowcache_core.kv.scores.salience import SalienceHead
from flowcache_core.models.bundle import Bundle, load_bundle
from flowcache_core.models.checkpoint import load_network_file
from flowcache_core.models.shards import open_checkpoint
from flowcache_core.run.generate import Job, decode, generate
from flowcache_core.show.film import frames_of, write_film
from flowcache_core.training.loop import load_saved

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "__init__.py", *(ROOT / "flowcache_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]
RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "runpy", "code"}
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "huggingface_hub", "webbrowser"}
PROCESSES = {
    ("flowcache_core/device.py", "subprocess"),
    ("flowcache_core/kernels/choice.py", "subprocess"),
    ("flowcache_core/bench/sweep.py", "multiprocessing"),
    ("flowcache_core/ranks/workers.py", "subprocess"),
}
"""`git`, for the benches and the demo alone; the name of an error of Triton's compiler; the workers of a bench; those of the node Devices."""
LOADS = {("flowcache_core/training/loop.py", "torch.load"), ("flowcache_core/untrusted.py", "torch.load")}
"""The checkpoints that a training has written itself, and model files of tensors alone."""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    """First names of what a file imports from outside the pack, in functions too."""
    found = set()
    for one in ast.walk(tree(path)):
        if isinstance(one, ast.Import):
            found |= {alias.name.split(".")[0] for alias in one.names}
        elif isinstance(one, ast.ImportFrom) and not one.level and one.module:
            found.add(one.module.split(".")[0])
    return found


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for one in ast.walk(tree(path)):
        if isinstance(one, ast.Call) and isinstance(one.func, ast.Name):
            yield one.func.id, one
        elif isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and isinstance(one.func.value, ast.Name | ast.Attribute):
            yield ast.unparse(one.func), one


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# no code


def test_nothing_that_runs_code_from_files_is_imported() -> None:
    assert not {(name(path), found) for path in SOURCES for found in imported(path) & RUNS_CODE}


def test_no_text_is_run_as_code() -> None:
    assert not [(name(path), said) for path in SOURCES for said, _ in calls(path) if said in ("eval", "exec", "compile", "__import__")]


def test_torch_load_is_called_in_two_places_and_with_weights_only() -> None:
    found = [(name(path), call) for path in SOURCES for said, call in calls(path) if said in ("torch.load", "torch.jit.load", "torch.hub.load")]
    assert {(file, ast.unparse(call.func)) for file, call in found} == LOADS
    for _, call in found:
        assert [ast.unparse(one.value) for one in call.keywords if one.arg == "weights_only"] == ["True"]


class Evil:
    """Pickled, it would write a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "this was run")


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for file in ("net.pt", "net.ckpt", "net.pth", "net.bin", "net.safetensors"):
        torch.save({"x": Evil(mark)}, tmp_path / file)
        for call in (load_network_file, open_checkpoint, SalienceHead.load, load_saved):
            with pytest.raises(ValueError, match=r"safetensors|salience|training"):
                call(tmp_path / file)
    assert not mark.exists()


# no network, no processes


def test_nothing_that_speaks_to_a_network_is_imported() -> None:
    """But for what answers the page, through the server that the host runs anyway, devices of this machine that share a film, over the loopback
    interface, and `render` where its command line names other machines."""
    fleet = {("flowcache_core/fleet/hosts.py", "urllib"), ("flowcache_core/fleet/hosts.py", "http"), ("flowcache_core/fleet/ray_fleet.py", "socket")}
    loopback = ("flowcache_core/ranks/rendezvous.py", "socket")
    assert {(name(path), found) for path in SOURCES for found in imported(path) & NETWORK} == {("nodes/latest_runs.py", "aiohttp"), loopback, *fleet}


def test_ray_and_fsspec_are_imported_by_the_fleet_alone() -> None:
    assert {(name(path), found) for path in SOURCES for found in imported(path) & {"ray", "fsspec"}} == {
        ("flowcache_core/fleet/ray_fleet.py", "ray"), ("flowcache_core/fleet/destination.py", "fsspec"),
    }  # fmt: skip


def test_no_process_is_started_but_for_what_is_named() -> None:
    assert {(name(path), found) for path in SOURCES for found in imported(path) & {"subprocess", "multiprocessing", "pty"}} == PROCESSES
    starts = ("os.system", "os.popen", "os.exec", "os.spawn", "os.fork", "subprocess.")
    assert {name(path) for path in SOURCES for said, _ in calls(path) if said.startswith(starts)} == {
        "flowcache_core/device.py", "flowcache_core/ranks/workers.py",
    }  # fmt: skip


@pytest.fixture
def heard() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """What Python tells of while the test runs: connections, processes, opened files."""
    events: list[tuple[str, tuple[Any, ...]]] = []
    listening = [True]

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if listening[0] and event.startswith(("socket.", "subprocess.", "os.system", "open", "os.remove", "os.rename", "shutil.")):
            events.append((event, args))

    sys.addaudithook(hear)
    yield events
    listening[0] = False


def test_a_film_is_made_without_network_and_without_other_files(
    heard: list[tuple[str, tuple[Any, ...]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From loading the model to the written film, with every connection refused."""

    def no(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", no)
    monkeypatch.setattr(socket, "create_connection", no)
    monkeypatch.setattr(socket, "getaddrinfo", no)
    bundle: Bundle = load_bundle()
    heard.clear()
    latents, _ = generate(bundle, Job("red circle moves right", frames=9, steps=2, size=32))
    write_film(tmp_path / "film.mp4", frames_of(decode(bundle, latents)))
    assert not [event for event, _ in heard if event.startswith(("socket.", "subprocess.", "os.system"))]
    written = {str(args[0]) for event, args in heard if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")}
    assert all(Path(path).parent == tmp_path for path in written), written
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


# no other folder


@pytest.mark.parametrize("where", ["../out.safetensors", "{}/out.safetensors", "..\\out.safetensors", "sub/out.safetensors"])
def test_an_index_reads_nothing_outside_its_folder(where: str, tmp_path: Path, heard: list[tuple[str, tuple[Any, ...]]]) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "out.safetensors", folder / "sub" / "out.safetensors"):
        save_file({"x": torch.zeros(2)}, path)
    save_file({"y": torch.zeros(2)}, folder / "a.safetensors")
    save_file({"z": torch.zeros(2)}, folder / "b.safetensors")
    index = {"weight_map": {"x": where.format(tmp_path), "y": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    heard.clear()
    with pytest.raises(ValueError, match=r"only \.safetensors files in its own folder are read"):
        open_checkpoint(folder)
    assert not [args for event, args in heard if event == "open" and str(args[0]).endswith("out.safetensors")]


def test_every_promise_has_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    named = [word.strip("`.,;()") for word in text.split() if word.strip("`.,;()").startswith("test_") and not word.strip("`.,;()").endswith(".py")]
    here = {one.name for path in (ROOT / "tests").glob("test_*.py") for one in ast.walk(tree(path)) if isinstance(one, ast.FunctionDef)}
    assert len(named) >= 6
    assert set(named) <= here
