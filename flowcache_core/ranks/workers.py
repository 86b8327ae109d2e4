"""Processes of this package that make films together with the process that starts them: how they start, are spoken to, and end.

Commands go to a worker as JSON, a line each, by its standard input, and answers come back by its standard output. The input ends when the process
that holds its other end does, for whatever reason, and a worker ends with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import IO, Any

Message = Mapping[str, Any]
"""Plain JSON values."""
IDLE = 600.0
"""Seconds after which a worker that was given nothing to do ends."""
ENDED = "ended"
"""Key of the last message of a worker: its status."""
FAILED = "failed"
"""Key of a worker's sentence about the error that ends it."""
POLL, GRACE = 0.1, 2.0
"""Seconds: how often a wait looks around, and after which a worker that was asked to end is killed."""
PDEATHSIG = 1
ROOT = Path(__file__).resolve().parents[2]
START = "import sys; sys.path.insert(0, sys.argv[1]); from {0} import main; main()"


class WorkerLost(RuntimeError):
    """A worker has ended, or does not answer."""


class Worker:
    """One process, and the thread that starts it, reads its answers and waits for its end, so that no zombie is left."""

    def __init__(self, rank: int, command: Sequence[str]) -> None:
        self.rank, self.answers = rank, SimpleQueue[Message]()
        self._command, self._started, self._over = command, Event(), Event()
        self._process: subprocess.Popen[str] | None = None
        Thread(target=self._attend, name=f"FlowCache worker {rank}", daemon=True).start()
        self._started.wait()

    def _attend(self) -> None:
        """Linux signals the end of a parent at the end of the thread that has started the child: this one lasts as long as the worker."""
        status: int | str = "it could not be started"
        try:
            self._process = process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
            self._started.set()
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    self.answers.put(json.loads(line))
            status = process.wait()
        except (OSError, ValueError) as error:
            status = f"{error}"
        finally:
            self._over.set()
            self._started.set()
            self.close()
            self.answers.put({ENDED: status})

    @property
    def alive(self) -> bool:
        return not self._over.is_set()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def send(self, message: Message) -> None:
        """To a worker that has ended too: that is learnt from its answers."""
        with suppress(OSError, ValueError):
            assert self._process is not None
            _write(self._process.stdin, message)

    def close(self) -> None:
        with suppress(OSError):
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()

    def kill(self, after: float) -> None:
        """Waits so many seconds for the end."""
        if not self._over.wait(after) and self._process is not None:
            self._process.kill()
            self._over.wait(GRACE)


class Workers:
    """Of one set of devices, by rank, of which this process has the first. `program`: a module with `main`, which each of the others runs with its
    rank, their number, this process, its device, and these arguments."""

    def __init__(self, devices: Sequence[str], program: str, *arguments: str) -> None:
        start, count = [sys.executable, "-c", START.format(program), f"{ROOT}"], len(devices)
        self.all = [Worker(rank, [*start, f"{rank}", f"{count}", f"{os.getpid()}", devices[rank], *arguments]) for rank in range(1, count)]

    @property
    def alive(self) -> bool:
        return all(worker.alive for worker in self.all)

    def send(self, **message: Any) -> None:
        for worker in self.all:
            worker.send(message)

    def wait(self, key: str, seconds: float, check: Callable[[], object] = lambda: None) -> list[Any]:
        """From each worker what its next answer with this key holds. `check` is called all the while, and may raise. Raises WorkerLost."""
        return [self._answer(worker, key, time.monotonic() + seconds, check) for worker in self.all]

    def _answer(self, worker: Worker, key: str, end: float, check: Callable[[], object]) -> Any:
        while time.monotonic() < end:
            check()
            with suppress(Empty):
                answer = worker.answers.get(timeout=POLL)
                if key in answer:
                    return answer[key]
                if ENDED in answer or FAILED in answer:
                    raise WorkerLost(self._sentence(worker, answer))
        raise WorkerLost(f"device {worker.rank + 1} of {len(self.all) + 1} does not answer")

    def loss(self, seconds: float = GRACE) -> str:
        """Why a worker has ended or is about to, in a sentence; "" where none is within so many seconds."""
        end = time.monotonic() + seconds
        while True:
            for worker in self.all:
                with suppress(Empty):
                    while True:
                        answer = worker.answers.get_nowait()
                        if ENDED in answer or FAILED in answer:
                            return self._sentence(worker, answer)
            if time.monotonic() > end:
                return ""
            time.sleep(POLL)

    def _sentence(self, worker: Worker, answer: Message) -> str:
        name = f"device {worker.rank + 1} of {len(self.all) + 1}"
        return f"{name} failed: {answer[FAILED]}" if FAILED in answer else f"the process of {name} has ended (status {answer[ENDED]})"

    def end(self, grace: float = GRACE) -> None:
        """All of them, and waits for it. Those that do not end by themselves within `grace` seconds are killed."""
        for worker in self.all:
            worker.close()
        for worker in self.all:
            worker.kill(grace)


class Commands:
    """Of the process that has started this one. When that ends, so does this, at once and wherever it is."""

    def __init__(self, parent: int) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print is no answer
        self._queue = SimpleQueue[Message]()
        end_with_parent(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the parent, which ends or stops what runs here
        Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin.buffer:
            self._queue.put(json.loads(line))
        os._exit(0)

    def next(self, seconds: float | None = None) -> Message | None:
        """None after so many seconds without one."""
        with suppress(Empty):
            return self._queue.get(timeout=seconds)
        return None

    def answer(self, **message: Any) -> None:
        with suppress(OSError):
            _write(self._out, message)


def end_with_parent(parent: int) -> None:
    """On Linux the kernel kills this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def _write(to: IO[str] | None, message: Message) -> None:
    assert to is not None
    to.write(json.dumps(message) + "\n")
    to.flush()
