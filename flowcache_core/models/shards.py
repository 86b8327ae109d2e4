"""Which files make one checkpoint and what they hold. Only headers are read until a tensor is asked for; networks are unknown here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

ReadFile = Callable[[Path], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that has not been read: where it lies, its shape and dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk. `slots`: key as in the files -> what lies there."""

    name: str
    files: tuple[Path, ...]
    slots: Mapping[str, Slot]
    metadata: Mapping[str, str]

    def tensors(self, keys: Iterable[str] | None = None, read_file: ReadFile | None = None) -> Iterator[tuple[str, Tensor]]:
        """Key and tensor, file after file; a file is let go when its last tensor has been handed out.

        A tensor is a view of the mapped file: whoever keeps it as it is takes up no memory of its own, whoever converts it
        holds the converted values and at most one file.
        """
        wanted = set(self.slots if keys is None else keys)
        for file in self.files:
            tensors = (read_file or (lambda path: read(path)[0]))(file)
            for key in [k for k in tensors if k in wanted]:
                yield key, tensors.pop(key)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file -> tensors and metadata. Raises ValueError for a missing, foreign or truncated file."""
    with _opened(Path(path)) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A folder, a file, or any file of a set -> the whole checkpoint.

    Raises ValueError, before a tensor is read, for a shard that is missing, a folder with several models, or shards that do
    not belong together: the same key twice, or keys other than the index lists.
    """
    files, listed = _files_of(Path(path))
    slots: dict[str, Slot] = {}
    metadata: dict[str, str] = {}
    for file in files:
        here, said = _header(file)
        if twice := sorted(slots.keys() & here.keys()):
            first = slots[twice[0]].file.name
            raise ValueError(f"{len(twice)} keys ({twice[0]}, ...) are both in {first} and in {file.name}: the shards are of different models")
        slots.update(here)
        metadata.update(said)
    if listed and listed != slots.keys():
        gone, extra = sorted(listed - slots.keys()), sorted(slots.keys() - listed)
        what = f"lack {len(gone)} keys of their index ({gone[0]}, ...)" if gone else f"hold {len(extra)} keys their index lacks ({extra[0]}, ...)"
        raise ValueError(f"the shards {files[0].name}, ... {what}: they are of different models or downloads; download the set again")
    return Checkpoint(Path(path).name, files, slots, metadata)


def _files_of(path: Path) -> tuple[tuple[Path, ...], set[str]]:
    """The files of a checkpoint, and the keys that an index lists for them (none without an index)."""
    if path.is_dir():
        return _files_in(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix not in (SUFFIX, ".sft"):
        raise ValueError(f"{path.name} is no safetensors file: only .safetensors files are read, because other kinds can run code when opened")
    for index in sorted(path.parent.glob(f"*{INDEX}")):
        if path.name in _listed(index).values():
            return _of_index(index)
    if match := SHARD.fullmatch(path.name):
        return _of_set(path.parent, match["stem"], match["count"]), set()
    return (path,), set()


def _files_in(folder: Path) -> tuple[tuple[Path, ...], set[str]]:
    names = sorted(file.name for file in folder.glob(f"*{SUFFIX}"))
    matches = [m for m in map(SHARD.fullmatch, names) if m]
    sets = sorted({(m["stem"], m["count"]) for m in matches})
    indices = sorted(folder.glob(f"*{INDEX}"))
    if len(sets) > 1:
        found = " and ".join(f"{stem}-...-of-{count}" for stem, count in sets)
        raise ValueError(f"{folder.name} holds shards of {len(sets)} models ({found}): choose a file of the one you want")
    if len(indices) == 1 and (sets or len(names) != 1):
        return _of_index(indices[0])
    if sets:
        return _of_set(folder, *sets[0]), set()
    if len(names) == 1:
        return (folder / names[0],), set()
    what = f"{len(names)} safetensors files that are no shards of one model ({', '.join(names[:3])})" if names else "no safetensors file"
    raise ValueError(f"{folder.name} holds {what}: choose a file, or a folder with the shards of one model")


def _of_set(folder: Path, stem: str, count: str) -> tuple[Path, ...]:
    files = tuple(folder / f"{stem}-{number:0{len(count)}d}-of-{count}{SUFFIX}" for number in range(1, int(count) + 1))
    return _present(files)


def _of_index(index: Path) -> tuple[tuple[Path, ...], set[str]]:
    listed = _listed(index)
    if not listed:
        raise ValueError(f"{index.name} lists no files: download it again, or remove it if the shards are numbered ...-of-00012")
    return _present(tuple(index.parent / name for name in sorted(set(listed.values())))), set(listed)


def _listed(index: Path) -> dict[str, str]:
    """Key -> file name, as an index says; empty when it says nothing of the kind."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
    except (ValueError, AttributeError):
        return {}
    return {str(key): Path(str(name)).name for key, name in listed.items()}


def _present(files: tuple[Path, ...]) -> tuple[Path, ...]:
    if gone := [file.name for file in files if not file.is_file()]:
        named = f"{', '.join(gone[:3])}{', ...' if len(gone) > 3 else ''}"
        raise ValueError(f"{len(gone)} of {len(files)} shards are not in {files[0].parent.name}: {named}; download them into the same folder")
    return files


def _header(file: Path) -> tuple[dict[str, Slot], dict[str, str]]:
    with _opened(file) as opened:
        slots = {}
        for key in opened.keys():  # noqa: SIM118
            part = opened.get_slice(key)
            kind = part.get_dtype()
            if kind not in DTYPES:
                raise ValueError(f"{file.name}: {key} is stored as {kind}, which cannot be read here; use a bf16, fp16 or fp8 file of the model")
            slots[key] = Slot(file, tuple(part.get_shape()), DTYPES[kind])
        return slots, dict(opened.metadata() or {})


def _opened(path: Path) -> safe_open:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(f"{path.name} ({size} bytes) is not a whole safetensors file: {error}; download it again") from error
