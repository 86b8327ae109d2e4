"""Saved workflows of removed nodes, with too few, too many or wrong values, in the code of the page: it needs node alone, no browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.host import PACK

COUNT = 2000
APP = "export const extensions = [];\nexport const app = { registerExtension: (one) => extensions.push(one) };\n"
API = "export const api = { addEventListener() {} };\n"


def page_without_browser(folder: Path) -> Path:
    """A copy of web/ beside what it imports of the host -> its place."""
    pack = folder / "extensions" / "flowcache"
    shutil.copytree(PACK / "web", pack, ignore=shutil.ignore_patterns("docs"))
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "scripts").mkdir()
    (folder / "scripts" / "app.js").write_text(APP)
    (folder / "scripts" / "api.js").write_text(API)
    return pack


@pytest.mark.skipif(not shutil.which("node"), reason="the code of the page is run by node")
def test_whatever_a_saved_workflow_holds_the_page_loads_it(tmp_path: Path) -> None:
    """Every node keeps its widgets, and saves as many values as it has; what values mean, the host checks."""
    command = ["node", str(PACK / "tests" / "web" / "hostile_workflows.mjs"), str(page_without_browser(tmp_path)), str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["classes"] == [], "every node with rules is among those that are tried"
    assert not found["faults"], "\n".join(found["faults"][:5])
