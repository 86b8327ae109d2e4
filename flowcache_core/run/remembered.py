"""What a run remembers, as plain JSON values and a list of tensors, and back. Which run it is of, and where it is kept, is unknown here.

Two sorts of objects come in. Those that go along with a run (`Remembers`) are there before anything is read, made from the run's settings:
their attributes are put in place. All others are values, made anew: numbers, texts, tensors, lists, tuples, sets, dicts, and dataclasses
of the kinds that are allowed. Anything else is refused, when it is written and when it is read. No name in a file is ever imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, ClassVar, Literal, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from ..kv.keeper import Kept, Middle
from ..kv.waiting import Waiting
from ..memory import Remembers, RunMemory, TakesIn
from ..policies.protocol import Compute, Part, Refresh, Reuse
from ..policies.state import ChunkState, Prediction
from ..sampling.histories import Histories
from ..sampling.plan import Plan
from .session import Which

Kinds = Mapping[str, type]
KINDS: tuple[type, ...] = (ChunkState, Prediction, Compute, Reuse, Refresh, Part, Plan, Histories, Waiting, Kept, Middle, Which)
"""Values that any run may remember. What a policy or a solver remembers besides is made of dataclasses of its own file."""


def kinds_of(*settings: object) -> dict[str, type]:
    """By name: `KINDS`, and the dataclasses of the files in which these settings, and what they inherit from, are defined."""
    files = {kind.__module__ for one in settings if one is not None for kind in type(one).__mro__} - {"builtins", "typing"}
    own = [kind for name in sorted(files) for kind in vars(sys.modules[name]).values() if _defined_in(kind, name)]
    return {kind.__qualname__: kind for kind in (*own, *KINDS)}


def _defined_in(kind: object, module: str) -> bool:
    return isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module


class Writer:
    """Values -> JSON. `tensors`: what the JSON names by its place in this list; they are not copied."""

    def __init__(self, kinds: Kinds) -> None:
        self.kinds, self.tensors = kinds, list[Tensor]()
        self._seen: dict[int, tuple[int, object]] = {}
        """By id: a number, and the object itself, so that no other one gets its id."""

    def write(self, value: Any, where: str = "run") -> Any:
        """Raises TypeError, with the place, for what is of no known kind."""
        match value:
            case None | bool() | int() | float() | str():
                return value
            case Tensor():
                return self._tensor("tensor", value)
            case np.ndarray():
                return self._tensor("array", torch.from_numpy(value))
            case torch.Generator():
                return self._tensor("random", value.get_state())
            case list():
                return [self.write(one, f"{where}[{k}]") for k, one in enumerate(value)]
            case tuple():
                return {"tuple": [self.write(one, f"{where}[{k}]") for k, one in enumerate(value)]}
            case set() | frozenset():
                return {type(value).__name__: [self.write(one, where) for one in value]}
            case dict():
                return {"dict": [[self.write(key, where), self.write(one, f"{where}[{key}]")] for key, one in value.items()]}
        return self._once(value, where)

    def _tensor(self, kind: str, tensor: Tensor) -> dict[str, Any]:
        """Sums depend on the order in which numbers lie in memory, so it is kept: `order` has the dimensions from the outermost in."""
        order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
        dense = tensor.permute(order).is_contiguous() and not tensor.is_contiguous()
        if id(tensor) not in self._seen:
            self._seen[id(tensor)] = len(self.tensors), tensor
            self.tensors.append(tensor.permute(order) if dense else tensor)
        place = {kind: self._seen[id(tensor)][0]}
        return {**place, **({"order": order} if dense else {}), **({"away": True} if tensor.device.type != "cpu" else {})}

    def _once(self, value: object, where: str) -> dict[str, Any]:
        if id(value) in self._seen:
            return {"again": self._seen[id(value)][0]}
        number = len(self._seen)
        self._seen[id(value)] = number, value
        if isinstance(value, RunMemory):  # weights are no memory: they are loaded anew
            return {"memory": [self.write(one, where) for one in value.all() if not isinstance(one, nn.Module)], "number": number}
        name = type(value).__qualname__
        if not isinstance(value, Remembers) and self.kinds.get(name) is not type(value):
            raise TypeError(f"{where} is of type {name}, which cannot be written down")
        named = {key: self.write(getattr(value, key), f"{where}.{key}") for key in _attributes(value)}
        return {"object": name, "fields": named, "number": number}


class Reader:
    """JSON -> values. `tensor_of`: the tensor at a place of the list, in memory that nobody else writes to; `device`: that of the run."""

    def __init__(self, kinds: Kinds, tensor_of: Callable[[int], Tensor], device: torch.device) -> None:
        self.kinds, self.tensor_of, self.device = kinds, tensor_of, device
        self._tensors: dict[int, Tensor] = {}
        self._seen: dict[int, object] = {}

    def put(self, now: Any, data: Any) -> Any:
        """What was written into an object that is there, or a dict of such; any other value is made anew and returned.

        Raises ValueError, KeyError, TypeError, IndexError, AttributeError or RuntimeError for what no `Writer` has written of such an object.
        """
        if isinstance(now, Remembers):
            self._fill(now, data)
            return now
        if isinstance(now, dict) and now and all(isinstance(one, Remembers) for one in now.values()):
            return {key: self.put(now[key], one) for name, one in data["dict"] for key in [self.read(name)]}
        made = self.read(data)
        if not _alike(now, made):
            raise ValueError(f"{type(made).__name__} in place of {type(now).__name__}, or of another size")
        return made

    def _fill(self, now: Any, data: Any) -> None:
        if data["object"] != type(now).__qualname__ or data["fields"].keys() != set(now.remembers):
            raise ValueError("it is of another make")
        self._seen[data["number"]] = now
        for key in now.remembers:
            if isinstance(now, TakesIn) and key == now.copied:
                now.take_in(_fitting(now, key, self._here(getattr(now, key), data["fields"][key])), self.device)
            else:
                setattr(now, key, _fitting(now, key, self.put(getattr(now, key), data["fields"][key])))

    def _here(self, now: Any, data: Any) -> Any:
        """As `put`, with all tensors in the computer's memory, and none of them kept."""
        return Reader(self.kinds, self.tensor_of, torch.device("cpu")).put(now, data)

    def read(self, data: Any) -> Any:
        match data:
            case None | bool() | int() | float() | str():
                return data
            case list():
                return [self.read(one) for one in data]
            case {"tuple": list(each)}:
                return tuple(self.read(one) for one in each)
            case {"set": list(each)}:
                return {self.read(one) for one in each}
            case {"frozenset": list(each)}:
                return frozenset(self.read(one) for one in each)
            case {"dict": list(pairs)}:
                return {self.read(key): self.read(one) for key, one in pairs}
            case {"tensor": int(place)}:
                return self._tensor(place, data)
            case {"array": int(place)}:
                return self._tensor(place, data).numpy()
            case {"random": int(place)}:
                return torch.Generator().set_state(self._tensor(place, data))
            case {"again": int(number)}:
                return self._seen[number]
            case {"memory": list(things), "number": int(number)}:
                self._seen[number] = memory = RunMemory()
                memory.put(self.read(one) for one in things)
                return memory
            case {"object": str(name), "fields": dict(named), "number": int(number)}:
                return self._made(self.kinds[name], named, number)
        raise ValueError("it holds something that no run remembers")

    def _tensor(self, place: int, data: Mapping[str, Any]) -> Tensor:
        if place not in self._tensors:
            tensor, order = self.tensor_of(place), data.get("order")
            tensor = tensor.to(self.device) if data.get("away") else tensor
            self._tensors[place] = tensor if order is None else tensor.permute([order.index(dim) for dim in range(tensor.ndim)])
        return self._tensors[place]

    def _made(self, kind: type, named: Mapping[str, Any], number: int) -> object:
        made: object = object.__new__(kind)
        self._seen[number] = made
        if named.keys() != set(_attributes(made)):
            raise ValueError("it is of another make")
        for key, data in named.items():
            object.__setattr__(made, key, _fitting(made, key, self.read(data)))
        return made


def _alike(now: object, made: object) -> bool:
    """Whether one value can take the place of the other: of one type, and arrays of one size; numbers or a plan for nothing."""
    if now is None or made is None:
        return isinstance(made if now is None else now, Tensor | np.ndarray | Plan | tuple | None)
    if isinstance(now, np.ndarray) and isinstance(made, np.ndarray):
        return now.shape == made.shape and now.dtype == made.dtype
    if isinstance(now, Tensor) and isinstance(made, Tensor) and now.numel():
        return now.dtype == made.dtype and now.ndim == made.ndim
    return type(now) is type(made)


def _fitting(owner: object, name: str, value: Any) -> Any:
    """The value itself. Raises ValueError where the owner's class says that the attribute is of another type."""
    if not fits(value, _types_of(cast(Hashable, type(owner))).get(name, Any)):
        raise ValueError(f"{name} of {type(owner).__qualname__} is of another type")
    return value


@cache
def _types_of(kind: Hashable) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(cast(type, kind)).items() if get_origin(hint) is not ClassVar}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value, with all that its lists, tuples, sets and dicts hold, is of a type as annotations write it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in args)
    if origin is Literal:
        return value in args
    if origin is tuple and args[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(args) and all(map(fits, value, args))
    if origin in (list, tuple, set, frozenset):
        return isinstance(value, origin) and all(fits(one, args[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(key, args[0]) and fits(one, args[1]) for key, one in value.items())
    if kind is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if kind is int:
        return type(value) is int
    return kind is Any or not isinstance(kind, type) or getattr(kind, "_is_protocol", False) or isinstance(value, kind)


def _attributes(value: Any) -> Iterable[str]:
    return value.remembers if isinstance(value, Remembers) else [field.name for field in fields(value)]
