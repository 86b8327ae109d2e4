"""Processes that share what their parent has imported and made."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def forked(devices: int, call: Callable[[int], None]) -> list[int]:
    """Processes that call it with their rank -> the status of each."""
    children = []
    for rank in range(devices):
        if (child := os.fork()) == 0:
            status = 1
            try:
                call(rank)
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
