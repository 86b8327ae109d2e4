"""Modules of nodes/ that need nothing of the host but its server, loaded without one."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.host import PACK

NAME = "flowcache_as_the_host_has_it"


class Server:
    """Of the host, as far as the live panel knows it."""

    client_id = "page"

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone: Exception | None = None

    def send_sync(self, event: str, data: dict[str, Any], sid: str | None) -> None:
        if self.gone:
            raise self.gone
        self.sent.append(data)


def core(name: str) -> Any:
    """A module of the core, as the loaded pack has it."""
    return importlib.import_module(f"{NAME}.flowcache_core.{name}")


@contextmanager
def loaded() -> Iterator[Callable[[str], Any]]:
    """The pack, without its entry point for the host -> name -> module of nodes/."""
    spec = importlib.util.spec_from_file_location(NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    assert spec
    assert spec.loader
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])
    try:
        yield lambda name: importlib.import_module(f"{NAME}.nodes.{name}")
    finally:
        for name in [name for name in sys.modules if name.startswith(NAME)]:
            del sys.modules[name]
