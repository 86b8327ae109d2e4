"""The page's modules are plain JavaScript with types in comments, which TypeScript checks."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.host import PACK

TSC = os.environ.get("TSC") or shutil.which("tsc")


@pytest.mark.skipif(TSC is None, reason="set TSC to TypeScript's tsc, or install it, to check the types of the page")
def test_types_of_the_page_fit() -> None:
    done = subprocess.run([str(TSC), "-p", str(PACK / "tests" / "web" / "tsconfig.json")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_every_module_of_the_page_is_checked() -> None:
    assert [path.name for path in (PACK / "web").glob("*.js") if not path.read_text().startswith("// @ts-check\n")] == []
