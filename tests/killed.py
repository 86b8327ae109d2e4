"""Every writer of results, in a process that the system kills in the middle of writing: python -m tests.killed FOLDER.

A limit on the size of files stands for a full disk, and its signal, which ends a process on the spot as kill -9 does, for the kill.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from flowcache_core.bench.frontier import Film, Kept, Setting
from flowcache_core.files import write_text
from flowcache_core.kv.scores.salience import HeadInfo, SalienceHead
from flowcache_core.show.film import write_film, write_picture
from flowcache_core.training.loop import Loop
from flowcache_core.training.salience import begin
from flowcache_core.training.salience_clips import Clip

ROOM = 1500
"""Bytes that a file may have: less than any of the writers makes."""


def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)


def clip(path: Path) -> None:
    counted, chunk = torch.ones(64, 3, dtype=torch.bool), torch.zeros(64, dtype=torch.long)
    Clip(torch.randn(1, 64, 8), torch.randn(1, 64, 3), counted, chunk, torch.randn(64, 24)).save(path)


def checkpoint(path: Path) -> None:
    with torch.enable_grad():
        Loop(nn.Linear(32, 32), path, 1, [], 0.9).save()


WRITERS: dict[str, Callable[[Path], None]] = {
    "film.mp4": lambda path: write_film(path, frames()),
    "map.png": lambda path: write_picture(path, Image.fromarray(frames()[0])),
    "report.json": lambda path: write_text(path, json.dumps(["row"] * ROOM)),
    "films.jsonl": lambda path: Kept(path, "float32").add(Film(Setting(), "p" * ROOM, 1, (), ()), []),
    "head.safetensors": lambda path: SalienceHead(HeadInfo(1, 32, 16, 3, "model", "sum", "teacher", 1, "licence")).save(path),
    "clip.safetensors": clip,
    "salience.pt": checkpoint,
    "plan.json": lambda path: begin(path.parent, {"model": "m" * ROOM}),
}


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond ROOM bytes: writing fails as it does where no space is left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def killed(write: Callable[[Path], None], path: Path) -> int:
    """Writes in a process of its own that dies when the file has grown to ROOM bytes -> the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        with full_disk():
            write(path)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) * -1


def main(folder: Path) -> None:
    """Prints what became of every file: JSON, by name, as `test_writing` reads it."""
    torch.set_num_threads(1)
    out = {}
    for name, write in WRITERS.items():
        path = folder / name / name
        path.parent.mkdir(parents=True)
        signals, there = [killed(write, path)], path.exists()
        write(path)
        whole = path.read_bytes()
        signals.append(killed(write, path))
        same = path.read_bytes() == whole
        write(path)
        names = [other.name for other in path.parent.iterdir() if other.name != name]
        out[name] = {"signals": signals, "half": there, "same": same, "size": len(whole), "left": names}
    print(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
