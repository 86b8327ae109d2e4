"""Results are written whole or not at all: on a full disk, in a folder that nobody may write to, by a process that is killed."""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flowcache_core import __main__ as cli
from flowcache_core.files import refused, whole, write_text
from flowcache_core.kv.scores.salience import BUNDLED, SalienceHead
from flowcache_core.models.bundle import NETWORK
from flowcache_core.models.checkpoint import load_network_file
from flowcache_core.run.report import RunReport
from flowcache_core.training import salience
from tests.killed import ROOM, WRITERS, full_disk

ROOT = Path(__file__).parent.parent
OLD = b"what was there before"
NOBODY = 65534


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("before", [None, OLD], ids=["new", "over another"])
def test_on_a_full_disk_nothing_is_half_written(name: str, before: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if before is not None and name not in ("films.jsonl", "plan.json", "salience.pt"):  # these are read before they are written
        path.write_bytes(before)
    there = path.read_bytes() if path.exists() else None
    with full_disk(), pytest.raises(OSError, match=name) as raised:
        WRITERS[name](path)
    assert raised.value.errno in (errno.EFBIG, errno.EIO)
    assert refused(raised.value).startswith(f"the system refuses {path} (")
    assert (path.read_bytes() if path.exists() else None) == there
    assert list(tmp_path.iterdir()) == ([path] if there is not None else []), "no partial file is left"
    path.unlink(missing_ok=True)
    WRITERS[name](path)
    assert path.stat().st_size > ROOM, "the limit is met by every writer"


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file_or_none(tmp_path: Path) -> None:
    """Twice, without a file there and over a whole one; what is left has a hidden name of its own and does not stand in the way."""
    done = subprocess.run([sys.executable, "-m", "tests.killed", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found.keys() == WRITERS.keys()
    for name, one in found.items():
        assert one["signals"] == [signal.SIGXFSZ] * 2, name
        assert (one["half"], one["same"]) == (False, True), name
        assert one["size"] > ROOM, name
        assert all(left.startswith(".") for left in one["left"]), name


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_is_raised_while_writing_is_raised_and_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"

    def write() -> None:
        with whole(path) as partial:
            partial.write_text("half")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        write()
    assert not list(path.parent.iterdir())


def test_a_name_keeps_its_old_content_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(OLD)
    with whole(path) as partial:
        partial.write_text("new")
        assert path.read_bytes() == OLD
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".json")
    write_text(path, "{}")
    assert path.read_text() == "{}"


Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """-> exit status, and what is said on stderr."""

    def run(main: Callable[[], int], *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["flowcache_core", *map(str, arguments)])
        return main(), capsys.readouterr().err

    return run


def test_the_demo_on_a_full_disk_says_so(run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "demo"
    monkeypatch.setattr(cli.demo, "warm_up", lambda bundle: None)
    monkeypatch.setattr(cli.demo, "run_arm", lambda bundle, job, arm, states, world: (torch.zeros(1), RunReport(1, 2)))
    monkeypatch.setattr(cli.demo, "decode", lambda bundle, latents: torch.rand(9, 3, 64, 64))
    with full_disk():
        status, said = run_cli(cli.main, "demo", "--frames", 9, "--steps", 2, "--arms", "uncached", "--out", out)
    assert status == 2
    assert f"flowcache: the system refuses {out}" in said
    assert said.rstrip().endswith("free space on the disk, look at permissions, or name another folder")
    assert "Traceback" not in said
    assert not list(out.iterdir())


def test_a_bench_whose_result_cannot_be_written_says_so(run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.reuse, "run", lambda args: {"rows": [{"share": 0.5, "psnr": 30.0, "rule": "r" * ROOM}]})
    with full_disk():
        status, said = run_cli(cli.main, "bench", "reuse", "--json", tmp_path / "rows.json")
    assert status == 2
    assert "flowcache: the system refuses" in said
    assert not list(tmp_path.iterdir())


def test_a_training_whose_plan_cannot_be_written_says_so(run_cli: Cli, tmp_path: Path) -> None:
    work = tmp_path / "file"
    work.write_text("no folder")
    status, said = run_cli(salience.main, "--model", "bundled", "--work", work, "--clips", 1, "--steps", 1)
    assert status == 2
    assert said.startswith("flowcache: ")
    assert "Traceback" not in said


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that may be read and not written to; root, who may do anything, becomes somebody else for the time of the test."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(NETWORK, folder / "net.safetensors")
        shutil.copy(BUNDLED, folder / "head.safetensors")
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(NOBODY)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_a_folder_that_may_not_be_written_to_is_named(closed: Path) -> None:
    with pytest.raises(PermissionError) as raised:
        write_text(closed / "report.json", "{}")
    assert str(closed) in refused(raised.value)


def test_models_are_read_from_a_folder_that_may_not_be_written_to(closed: Path) -> None:
    before = sorted(path.name for path in closed.iterdir())
    assert load_network_file(closed / "net.safetensors").config == load_network_file(NETWORK).config  # type: ignore[union-attr]
    assert SalienceHead.load(closed / "head.safetensors").info == SalienceHead.load(BUNDLED).info
    assert sorted(path.name for path in closed.iterdir()) == before


def test_a_model_that_may_not_be_read_is_refused_by_name(closed: Path) -> None:
    path = closed / "net.safetensors"
    with locked(path), pytest.raises(ValueError, match="the system does not open net"):
        load_network_file(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The file belongs to the one who made it, so it is changed as that one."""
    me = os.geteuid()
    os.seteuid(os.getuid())
    path.chmod(0)
    os.seteuid(me)
    yield


WRITERS_OF_FILES = {"write_text", "write_bytes", "save", "save_file", "imwrite", "open", "dump"}
WRITE_THEMSELVES = ("files.py", "film_file.py", "state_file.py")
"""Each has a partial file and its own tests."""
ELSEWHERE = {
    "write_text(": "of files.py",
    "av.open(made, 'w'": "into memory",
    "Image.open(": "reads",
    ".open('rb')": "reads",
    "OPENER.open(": "asks a server",
    "safe_open(": "reads",
    "self.save()": "a Loop's, which is whole",
    "loop.save()": "the same",
    "save(made, self._file(number, place))": "of trajectories.py, which is whole",
    "head.save(out)": "a SalienceHead's, which is whole",
    "taught_by).save(path)": "a Clip's, which is whole",
    "save(fold(weights), out / 'vae.safetensors')": "of vae.py, which is whole",
    "save(vae.state_dict(), out / 'vae.safetensors')": "the same",
    "picture.save(file, 'JPEG', quality=quality)": "into memory",
}


def test_nothing_is_written_but_through_files() -> None:
    """Every call in the core that can write a file lies in a `with whole(...)`, or is known not to."""
    wrong = []
    for path in (ROOT / "flowcache_core").rglob("*.py"):
        tree = ast.parse(path.read_text())
        inside = {id(inner) for one in ast.walk(tree) if isinstance(one, ast.With) and is_whole(one) for inner in ast.walk(one)}
        for call in (one for one in ast.walk(tree) if isinstance(one, ast.Call) and id(one) not in inside):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""
            if name in WRITERS_OF_FILES and path.name not in WRITE_THEMSELVES and not any(part in ast.unparse(call) for part in ELSEWHERE):
                wrong.append(f"{path.name}:{call.lineno} {ast.unparse(call)[:60]}")
    assert not wrong


def is_whole(one: ast.With) -> bool:
    call = one.items[0].context_expr
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "whole"
