"""What a film depends on, in words and digests: two runs are of the same film where all of it is equal."""

from __future__ import annotations

import dis
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any
from uuid import UUID

import torch
from torch import Tensor, nn

from ..untrusted import short

if TYPE_CHECKING:
    from .run import Run

Film = Mapping[str, str]
"""By the name of a setting, its value as people read it."""
DEPTH = 12
PIECE = 1 << 22
"""Numbers that are brought to the processor at a time."""


def film_of(run: Run, noise: Tensor | None, more: Mapping[str, object]) -> dict[str, str]:
    """`noise`: latents that the run is handed, given frames among them; None: all else that is known of the film. `more`: what it depends on besides,
    by name."""
    family, place = run.family, run.place
    values: dict[str, object] = {
        "model": family.name,
        "weights": None,
        **_schedule(run),
        "steps' noise levels": digest(run.sigmas),
        "solver": run.solver,
        "seed": run.given.seed,
        "addnoise_condition": run.given.level,
        "fps": run.fps,
        "cfg": run.scale,
        **({"recache": sorted(run.recache)} if run.recache else {}),
        "cache": run.policy,
        "history": run.compressor,
        "branches": place.branches,
        **({"devices": f"{run.spread.mesh.branches} x {run.spread.mesh.heads}"} if run.spread.mesh.devices > 1 else {}),
        "device": place.device.type,
        "bytes of a number": place.itemsize,
        "adapter": type(run.adapter).__qualname__,
        **more,
        **({} if noise is None else {"latents": list(noise.shape), "noise and given frames": noise}),
    }
    return {name: value for key, one in values.items() for name, value in _named(key, one)}


def _schedule(run: Run) -> dict[str, object]:
    first, last = run.schedule, run.sections[-1].schedule if run.sections else run.schedule
    end = run.sections[-1].end if run.sections else first.frames
    return {
        "attention": "bidirectional" if run.sections else "block-causal", "latent frames": end, "chunk_frames": first.chunk_frames,
        "steps": first.steps, "ar_step": first.ar_step, "window": first.window, "given frames": [first.prefix, last.suffix],
        "sections": [[section.start, section.end] for section in run.sections],
    }  # fmt: skip


def _named(name: str, value: object) -> Iterator[tuple[str, str]]:
    """A value, or a dataclass field by field."""
    if not is_dataclass(value) or isinstance(value, type):
        yield name, _word(value)
        return
    yield name, str(getattr(value, "name", type(value).__qualname__))
    for field in fields(value):
        yield from _named(f"{name}: {field.name}", getattr(value, field.name))


def _word(value: object) -> str:
    """As people read it, where it is short; a file counts with what is in it."""
    if isinstance(value, str) and _is_file(value):
        return f"{value} ({hashlib.sha256(Path(value).read_bytes()).hexdigest()[:12]})"
    if isinstance(value, Tensor):
        return digest(value)
    text = json.dumps(plain(value), sort_keys=True)
    return text if len(text) <= 200 else digest(value)


def _is_file(text: str) -> bool:
    """A prompt is text, and may be longer than any name of a file."""
    try:
        return bool(text) and Path(text).is_file()
    except (OSError, ValueError):
        return False


def key_of(film: Film) -> str:
    return hashlib.sha256(json.dumps(film, sort_keys=True).encode()).hexdigest()[:16]


def differences(there: Film, here: Film) -> tuple[str, ...]:
    """The settings in which two films differ, with both values."""
    names = [name for name in dict.fromkeys((*here, *there)) if there.get(name) != here.get(name)]
    return tuple(f"{short(name)}: {short(there.get(name, 'nothing'))} there, {short(here.get(name, 'nothing'))} here" for name in names)


def digest(value: object) -> str:
    """Of anything that `plain` knows, twelve hexadecimal digits."""
    if isinstance(value, Tensor):
        return str(plain(value))
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:12]


def plain(value: object, depth: int = DEPTH) -> Any:
    """A value as JSON, the same in every process: tensors by their digest, functions by name and what they hold, objects by what they are made of.

    What has a new name in every process, a UUID or a place in memory, is left out.
    """
    if depth == 0:
        return type(value).__qualname__
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Tensor():
            return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} {_digest_of_tensor(value)}"
        case UUID():
            return None
        case Enum() | Path() | torch.dtype() | torch.device() | bytes():
            return str(value)
        case list() | tuple():
            return [plain(one, depth - 1) for one in value]
        case set() | frozenset():
            return sorted(json.dumps(plain(one, depth - 1), sort_keys=True) for one in value)
        case dict():
            return {str(plain(key, depth - 1)): plain(one, depth - 1) for key, one in value.items()}
        case type() | BuiltinFunctionType():
            return value.__qualname__
        case FunctionType():
            kept = rebound(value)
            held = [cell.cell_contents for cell in value.__closure__ or () if cell not in kept and _is_filled(cell)]
            return [value.__qualname__, plain(held, depth - 1)]
        case MethodType():
            return [value.__qualname__, plain(value.__self__, depth - 1)]
        case nn.Module():
            return [type(value).__qualname__, plain(dict(value.state_dict(keep_vars=True)), depth - 1)]
    named = {field.name: getattr(value, field.name) for field in fields(value)} if is_dataclass(value) else getattr(value, "__dict__", {})
    return [type(value).__qualname__, plain(dict(named), depth - 1)]


def rebound(function: Any) -> tuple[CellType, ...]:
    """The variables from around a function that it sets itself: what it keeps from one call to the next."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or not cells:
        return ()
    written = _written(code)
    return tuple(cell for name, cell in zip(code.co_freevars, cells, strict=True) if name in written)


def _written(code: CodeType) -> set[str]:
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    own = {str(one.argval) for one in dis.get_instructions(code) if one.opname == "STORE_DEREF"}
    return own.union(*map(_written, inner))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _digest_of_tensor(value: Tensor) -> str:
    if value.is_meta:
        return "meta"
    if hasattr(value, "full_tensor"):  # of weights that devices share: all of them ask for the same digests
        value = value.full_tensor()
    out, flat = hashlib.sha256(), value.detach().contiguous().view(-1)
    for part in flat.split(PIECE) if flat.numel() else ():
        out.update(memoryview(part.cpu().contiguous().view(torch.uint8).numpy()))
    return out.hexdigest()[:12]
