"""Which way imports go."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "flowcache_core"
MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in CORE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))
IMPORTABLE = [m for m in MODULES if not m.endswith("_triton") or importlib.util.find_spec("triton")]
LEAVES = ("chunk", "schedule", "given", "path", "plan", "planner", "decision", "state", "rows", "footprint", "report", "solvers")


def imports_of(module: str) -> set[str]:
    """Full names of what a module imports when it runs; what stands under TYPE_CHECKING does not run."""
    tree = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())
    idle = {node for branch in ast.walk(tree) if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test) for node in ast.walk(branch)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in idle:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            names.update({whole, *(f"{whole}.{alias.name}" for alias in node.names)})
    return names


def inside(names: set[str], *folders: str) -> set[str]:
    wanted = [f"flowcache_core.{folder}" for folder in folders]
    return {name for name in names if any(name == w or name.startswith(w + ".") for w in wanted)}


def of(folder: str) -> list[str]:
    return [m for m in MODULES if m.startswith(f"flowcache_core.{folder}.")]


@pytest.mark.parametrize("module", [*MODULES, "flowcache_core.__main__"])
def test_the_core_imports_neither_the_host_nor_the_nodes(module: str) -> None:
    roots = {name.split(".")[0] for name in imports_of(module)}
    assert not roots & {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server"}


@pytest.mark.parametrize("module", of("policies"))
def test_policies_import_no_models_and_no_kv(module: str) -> None:
    assert not inside(imports_of(module), "models", "kv", "session")


@pytest.mark.parametrize("module", of("models"))
def test_models_import_no_policies_and_no_kv(module: str) -> None:
    assert not inside(imports_of(module), "policies", "kv", "session")


@pytest.mark.parametrize("module", of("kv"))
def test_the_kv_cache_imports_no_models_and_no_policies(module: str) -> None:
    assert not inside(imports_of(module), "policies", "models", "session")


@pytest.mark.parametrize("module", [f"flowcache_core.{leaf}" for leaf in LEAVES])
def test_leaves_import_only_leaves(module: str) -> None:
    mine = {name for name in imports_of(module) if name.startswith("flowcache_core.")}
    assert {name.split(".")[1] for name in mine} <= set(LEAVES)


def test_session_is_where_policies_kv_and_models_meet() -> None:
    meeting = [m for m in MODULES if m.count(".") == 1 and all(inside(imports_of(m), part) for part in ("policies", "kv", "models"))]
    assert meeting == ["flowcache_core.session"]


def test_the_sampler_knows_neither_networks_nor_policies() -> None:
    assert not inside(imports_of("flowcache_core.sampler"), "policies", "models", "kv", "session")


def test_every_module_can_be_imported_first() -> None:
    script = (
        "import importlib, sys\n"
        f"for name in {IMPORTABLE!r}:\n"
        "    for key in [k for k in sys.modules if k.startswith('flowcache_core')]: del sys.modules[key]\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_root_package_imports_without_the_host() -> None:
    spec = importlib.util.spec_from_file_location("pack_root", ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    root = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(root)
    assert callable(root.comfy_entrypoint)
    assert (ROOT / root.WEB_DIRECTORY).is_dir()
