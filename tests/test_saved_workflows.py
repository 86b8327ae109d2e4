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


@pytest.mark.skipif(not shutil.which("node"), reason="the code of the page is run by node")
def test_whatever_a_saved_workflow_holds_the_page_loads_it(tmp_path: Path) -> None:
    """Every node keeps its widgets, and saves as many values as it has; what values mean, the host checks."""
    shutil.copytree(PACK / "web", tmp_path / "extensions" / "flowcache", ignore=shutil.ignore_patterns("docs"))
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "app.js").write_text(APP)
    (tmp_path / "scripts" / "api.js").write_text(API)
    command = ["node", str(PACK / "tests" / "web" / "hostile_workflows.mjs"), str(tmp_path / "extensions" / "flowcache"), str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["classes"] == [], "every node with rules is among those that are tried"
    assert not found["faults"], "\n".join(found["faults"][:5])
