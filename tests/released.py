"""Released code in the tests: modules of a checkout, imported without what they need a GPU or a whole installation for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def checkout(variable: str, holds: str) -> Path:
    """The folder that an environment variable names; skips the test without it. `holds`: a file by which it is known."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set: it names the folder of a checkout of the released code")
    if not (Path(folder) / holds).is_file():
        pytest.fail(f"{variable} is {folder}, which has no {holds}")
    return Path(folder)


def module(name: str, path: Path | None = None, **held: Any) -> ModuleType:
    """`path`: of a package, whose __init__ is then not run."""
    made = ModuleType(name)
    vars(made).update(held)
    if path:
        made.__path__ = [str(path)]
    return made


def sdpa(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """PyTorch's attention in the place of a compiled one: [B, L, heads, D] each, key heads shared."""
    q, k, v = (x.transpose(1, 2) for x in (q, k.to(q), v.to(q)))
    return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


@contextmanager
def importing(root: Path, stand_ins: Mapping[str, ModuleType], tops: Collection[str]) -> Iterator[None]:
    """Modules of a checkout are found, their compiled functions left as they are, and forgotten afterwards, since several checkouts have modules of
    the same names. `tops`: how the names of all of them, and of `stand_ins`, begin, up to the first dot."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in tops]

    before, compiled = {name: sys.modules.pop(name) for name in ours()}, torch.compile
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(root))
    torch.compile = lambda made=None, **_: made or (lambda function: function)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiled
        sys.path.remove(str(root))
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)


def imported(root: Path, name: str, stubs: Mapping[str, ModuleType]) -> Any:
    """A module of the folder `root`. The packages above it are bare: their own `__init__` does not run. Afterwards nothing of all this can be
    imported any more; the module itself stays usable."""
    parts, bare = name.split("."), {}
    for depth in range(1, len(parts)):
        package = module(".".join(parts[:depth]), root.joinpath(*parts[:depth]))
        bare[package.__name__] = package
    for package in bare.keys() & stubs.keys():
        bare[package].__dict__.update({key: value for key, value in vars(stubs[package]).items() if not key.startswith("__")})
    with importing(root, {**stubs, **bare}, {each.partition(".")[0] for each in (name, *stubs)}):
        return importlib.import_module(name)


class Torch:
    """`torch` as released code sees it: with some of its names replaced."""

    def __init__(self, **instead: Any) -> None:
        self.__dict__.update(instead)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
