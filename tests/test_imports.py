"""Which way imports go: a folder imports from those before it, and from no other; what only types need counts too."""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "flowcache_core"
MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in CORE.rglob("*.py") if p.name != "__init__.py")
IMPORTABLE = [m for m in MODULES if not m.endswith("__main__") and (not m.endswith("_triton") or importlib.util.find_spec("triton"))]

ORDER: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "settings memory device network untrusted files kernels",
        "sampling",
        "policies kv models",
        "ranks",
        "run",
        "show",
        "training",
        "demo fleet",
        "bench",
        "__main__",
    )
)
"""Folders and root modules; those on one line import nothing from each other."""
ALONE = frozenset({"settings", "memory", "device", "network", "untrusted", "files"})


def imports_of(module: str) -> set[str]:
    """Full names of what a module imports, under TYPE_CHECKING and inside functions too."""
    tree = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            names.update({whole, *(f"{whole}.{alias.name}" for alias in node.names)})
    return names


def room(name: str) -> str:
    return name.split(".")[1]


def level(name: str) -> int:
    return next(number for number, rooms in enumerate(ORDER) if room(name) in rooms)


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_imports_only_from_those_before_it(module: str) -> None:
    mine = {name for name in imports_of(module) if name.startswith("flowcache_core.")}
    back = {name for name in mine if room(name) != room(module) and level(name) >= level(module)}
    assert not back
    assert not ALONE & {room(module)} or not mine


@pytest.mark.parametrize("module", MODULES)
def test_the_core_imports_neither_the_host_nor_the_nodes(module: str) -> None:
    roots = {name.split(".")[0] for name in imports_of(module)}
    assert not roots & {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server"}


def test_every_folder_has_its_place() -> None:
    assert {room(m) for m in MODULES} == {name for rooms in ORDER for name in rooms}


def test_the_root_holds_only_what_all_folders_share() -> None:
    assert {p.stem for p in CORE.glob("*.py")} == {"__init__", "__main__"} | ALONE


def needed_by(module: str) -> set[str]:
    """Modules that run before `module` does, the packages around them too."""
    tree, names = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text()), set[str]()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*module.split(".")[: -node.level], *([node.module] if node.module else [])]
            names.update(".".join([*base, *more]) for more in ([], *([alias.name] for alias in node.names)))
    return {name for name in names if name in MODULES}


def test_there_is_no_import_cycle() -> None:
    """So each of them can be the first to be imported; `prepare` raises an error that names the cycle."""
    graphlib.TopologicalSorter({module: needed_by(module) for module in MODULES}).prepare()


def test_every_module_can_be_imported() -> None:
    script = f"import importlib\nfor name in {IMPORTABLE!r}: importlib.import_module(name)"
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


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_node_imports_is_there(path: Path) -> None:
    """Without a host the nodes cannot be imported; what they ask of the core and of each other can be looked up."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        names = [alias.name for alias in node.names]
        if node.level == 2:
            module = importlib.import_module(node.module or "flowcache_core")
            missing = [name for name in names if not hasattr(module, name) and not importlib.util.find_spec(f"{node.module}.{name}")]
        else:
            tree = ast.parse((path.parent / f"{node.module or '__init__'}.py").read_text())
            there = {name.id for top in tree.body for name in ast.walk(top) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
            there |= {top.name for top in tree.body if isinstance(top, ast.FunctionDef | ast.ClassDef)}
            missing = [name for name in names if name not in there and not (path.parent / f"{name}.py").exists()]
        assert not missing, f"{path.name} imports {missing} from {node.module}"
