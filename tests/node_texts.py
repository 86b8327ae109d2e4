"""What nodes and page say in English, read from schemas and from web/strings.js without a host; `python -m tests.node_texts` writes locales/en.

What the nodes import of the host is stood in for, so that only schemas can be read here: nothing runs.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

PACK = Path(__file__).resolve().parent.parent
LOCALES = PACK / "locales"
LANGUAGES = ("en", "zh", "ja", "ko")
FILES = ("nodeDefs.json", "main.json")
HOST = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "server", "nodes")
"""Top packages of the host that nodes import."""
Texts = dict[str, Any]


class StandIn(type):
    """A class whose attributes are such classes too: what a module takes from the host when it is imported."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stand_in(name)


def stand_in(name: str) -> StandIn:
    return StandIn(name, (), {"__init__": lambda self, *given, **named: None})


class Slots:
    """`io.Model` and its like: inputs and outputs as they were written down."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def Input(self, id: str, display_name: str = "", tooltip: str = "", advanced: bool = False, **rest: Any) -> SimpleNamespace:
        return SimpleNamespace(id=id, name=display_name or id, tooltip=tooltip, advanced=advanced)

    def Output(self, id: str = "", display_name: str = "", tooltip: str = "", **rest: Any) -> SimpleNamespace:
        return SimpleNamespace(name=display_name, tooltip=tooltip)


class Schema(SimpleNamespace):
    __dataclass_fields__ = ()


class Io(ModuleType):
    """`comfy_api.latest.io`, as far as schemas need it."""

    ComfyNode = type("ComfyNode", (), {})
    Schema, Custom, Hidden = Schema, Slots, stand_in("Hidden")

    def __getattr__(self, name: str) -> Slots:
        return Slots(name)


class Module(ModuleType):
    """A module of the host in which whatever is asked for is a stand-in."""

    __path__: list[str]
    models_dir = "models"
    io = Io("io")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return no_files if name in ("get_filename_list", "get_folder_paths") else stand_in(name)


def no_files(*kind: str) -> list[str]:
    return []


class HostFinder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in HOST else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Module(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


@contextmanager
def stood_in() -> Iterator[None]:
    """While it is entered, imports of the host's modules find stand-ins; afterwards all that was imported is forgotten."""
    before, finder = dict(sys.modules), HostFinder()
    for name in [name for name in sys.modules if name.partition(".")[0] in HOST]:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.startswith("flowcache_as_pack") or name.partition(".")[0] in HOST]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name.partition(".")[0] in HOST})


def schemas() -> list[Schema]:
    """Of all nodes that the pack gives the host, in its order."""
    with stood_in():
        spec = importlib.util.spec_from_file_location("flowcache_as_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
        assert spec is not None
        assert spec.loader is not None
        pack = sys.modules["flowcache_as_pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pack)
        return asyncio.run(_schemas(pack))


async def _schemas(pack: Any) -> list[Schema]:
    extension = await pack.comfy_entrypoint()
    return [node.define_schema() for node in await extension.get_node_list()]


def texts_of(schema: Schema) -> Texts:
    """As the host's front end looks them up. An output without a name of its own is called by its type, in every language."""
    outputs = {str(n): {**({"name": one.name} if one.name else {}), "tooltip": one.tooltip} for n, one in enumerate(schema.outputs)}
    inputs = {one.id: {"name": one.name, "tooltip": one.tooltip} for one in schema.inputs}
    return {"display_name": schema.display_name, "description": schema.description, "inputs": inputs, "outputs": outputs}


def english() -> dict[str, Texts]:
    """By file of locales/en."""
    return {"nodeDefs.json": {schema.node_id: texts_of(schema) for schema in schemas()}, "main.json": {"flowcache": page_texts()}}


def page_texts() -> Texts:
    """What web/strings.js names, by its names."""
    source = (PACK / "web" / "strings.js").read_text(encoding="utf-8")
    block = source.partition("const ENGLISH = {\n")[2].partition("\n};\n")[0]
    found = [re.fullmatch(r'  (\w+): (".*"),', line) for line in block.split("\n")]
    return {one[1]: json.loads(one[2]) for one in found if one}


def read(language: str, file: str) -> Texts:
    texts: Texts = json.loads((LOCALES / language / file).read_text(encoding="utf-8"))
    return texts


def keys(texts: Any, at: str = "") -> dict[str, str]:
    """All texts by the path to them, such as FlowCacheLatent/inputs/width/tooltip."""
    if not isinstance(texts, dict):
        return {at: texts}
    return {path: text for name, one in texts.items() for path, text in keys(one, f"{at}/{name}" if at else name).items()}


def apart(language: str, file: str) -> str:
    """What a language lacks of the English texts, and has beyond them, by key; "" where it has just these."""
    wanted, there = keys(read("en", file)), keys(read(language, file))
    missing = [f"{key}: {text}" for key, text in wanted.items() if key not in there]
    more = [key for key in there if key not in wanted]
    lines = [*(f"  missing: {one}" for one in missing), *(f"  superfluous: {one}" for one in more)]
    return "\n".join([f"locales/{language}/{file}:", *lines]) if lines else ""


def main() -> None:
    """Writes the English texts, and says which of them other languages lack."""
    for file, texts in english().items():
        (LOCALES / "en" / file).write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for language in LANGUAGES[1:]:
        for file in FILES:
            if text := apart(language, file):
                print(text)


if __name__ == "__main__":
    main()
