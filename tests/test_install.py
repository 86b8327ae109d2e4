"""A clone in `custom_nodes` works as it is: the pack imports nothing that ComfyUI does not bring."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path

from tests.host import NEEDS_HOST, PACK

NAMES = {"pillow": "PIL"}
"""Of a requirement, what it is imported as, where that differs."""
HOST = {"aiohttp", "comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server", "torch"}
OPTIONAL = {"fsspec", "lpips", "ray", "triton"}
"""Used where they are installed, and named where they are missing."""


def required(path: Path) -> set[str]:
    """The names of the packages in a requirements file, in small letters."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in lines if line}


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports absolutely, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found


def test_the_pack_imports_what_it_requires_and_nothing_else() -> None:
    files = [PACK / "__init__.py", *(PACK / "nodes").rglob("*.py"), *(PACK / "flowcache_core").rglob("*.py")]
    used = set().union(*map(imported, files)) - sys.stdlib_module_names - {"flowcache_core"}
    names = {NAMES.get(name, name) for name in required(PACK / "requirements.txt")}
    assert used - HOST - OPTIONAL == names


class TestHost:
    pytestmark = NEEDS_HOST

    def test_comfyui_brings_all_that_the_pack_requires(self) -> None:
        assert required(PACK / "requirements.txt") <= required(Path(os.environ["COMFYUI_PATH"]) / "requirements.txt")
