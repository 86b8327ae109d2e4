"""Workers: they answer, fail with a sentence, and end with the process that has started them, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowcache_core.ranks.workers import WorkerLost, Workers

PROGRAM = "tests.worker_program"
ROOT = Path(__file__).parent.parent
PARENT = f"""
import time
from flowcache_core.ranks.workers import Workers
workers = Workers(("a", "b", "c"), {PROGRAM!r})
workers.send(do="echo", text="x")
workers.wait("echo", 30)
workers.send(do="hang")
print(*(worker.pid for worker in workers.all), flush=True)
time.sleep(600)
"""


@pytest.fixture
def workers() -> Iterator[Workers]:
    started = Workers(("a", "b", "c"), PROGRAM, "more")
    yield started
    started.end()


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether there is no process of this number, nor a zombie, within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_each_worker_knows_its_place_and_answers(workers: Workers) -> None:
    workers.send(do="echo", text="ä\n")
    assert workers.wait("echo", 30) == [["1", "3", "b", "more", "ä\n"], ["2", "3", "c", "more", "ä\n"]]
    assert workers.alive
    assert workers.loss(0) == ""


def test_a_worker_that_is_busy_ends_when_it_is_asked_to(workers: Workers) -> None:
    workers.send(do="hang")
    began = time.monotonic()
    workers.end(grace=10)
    assert time.monotonic() - began < 10, "it had to be killed"
    assert all(gone(worker.pid) for worker in workers.all)
    assert not workers.alive


def test_what_fails_in_a_worker_is_a_sentence(workers: Workers) -> None:
    workers.all[0].send({"do": "echo", "text": ""})
    workers.all[1].send({"do": "fail", "text": "out of memory"})
    with pytest.raises(WorkerLost, match=r"^device 3 of 3 failed: out of memory$"):
        workers.wait("echo", 30)


def test_a_worker_that_was_killed_is_named_and_leaves_no_zombie(workers: Workers) -> None:
    os.kill(workers.all[0].pid, signal.SIGKILL)
    assert workers.loss(10) == "the process of device 2 of 3 has ended (status -9)"
    assert gone(workers.all[0].pid)
    assert not workers.alive
    workers.send(do="echo", text="to one that is not there any more")


def test_waiting_ends_after_its_time_and_where_the_caller_ends_it(workers: Workers) -> None:
    workers.send(do="hang")
    with pytest.raises(WorkerLost, match="device 2 of 3 does not answer"):
        workers.wait("echo", 0.3)
    with pytest.raises(KeyboardInterrupt):
        workers.wait("echo", 30, _interrupted)


def _interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_the_process_that_has_started_it(number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.send_signal(number)
        parent.wait()
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)
