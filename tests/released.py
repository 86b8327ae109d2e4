"""Released code in the tests: modules of a checkout, imported without what they need a GPU or a whole installation for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def checkout(variable: str, holds: str) -> Path:
    """The folder that an environment variable names; skips the test without it. `holds`: a file by which it is known."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set: it names the folder of a checkout of the released code")
    if not (Path(folder) / holds).is_file():
        pytest.fail(f"{variable} is {folder}, which has no {holds}")
    return Path(folder)


def module(name: str, **contents: Any) -> ModuleType:
    out = ModuleType(name)
    out.__dict__.update(contents)
    return out


def imported(root: Path, name: str, stubs: Mapping[str, ModuleType]) -> Any:
    """A module of the folder `root`. The packages above it are bare: their own `__init__` does not run. Afterwards nothing of all this can be
    imported any more; the module itself stays usable."""
    before = dict(sys.modules)
    parts = name.split(".")
    bare = {}
    for depth in range(1, len(parts)):
        package = module(".".join(parts[:depth]))
        package.__path__ = [str(root.joinpath(*parts[:depth]))]
        bare[package.__name__] = package
    for package in bare.keys() & stubs.keys():
        bare[package].__dict__.update({key: value for key, value in vars(stubs[package]).items() if not key.startswith("__")})
    sys.modules.update({**stubs, **bare})
    try:
        return importlib.import_module(name)
    finally:
        for key in sys.modules.keys() - before.keys():
            del sys.modules[key]
        sys.modules.update(before)


class Torch:
    """`torch` as released code sees it: with some of its names replaced."""

    def __init__(self, **instead: Any) -> None:
        self.__dict__.update(instead)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
