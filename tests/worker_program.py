"""A worker that does what it is asked to: `test_workers` starts it. It needs no PyTorch."""

from __future__ import annotations

import os
import sys
import time

from flowcache_core.ranks.workers import FAILED, Commands


def main() -> None:
    commands = Commands(int(sys.argv[4]))
    print("what a library prints")
    while (message := commands.next(60)) is not None:
        if message["do"] == "echo":
            commands.answer(echo=[*sys.argv[2:4], *sys.argv[5:], message["text"]])
        elif message["do"] == "fail":
            commands.answer(**{FAILED: message["text"]})
            os._exit(1)
        elif message["do"] == "hang":
            time.sleep(600)
    os._exit(0)
