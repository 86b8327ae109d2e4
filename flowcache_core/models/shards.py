"""Which files make one checkpoint and what they hold. Only headers are read until a tensor is asked for; networks are unknown here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..untrusted import JSON_BYTES, entries, json_file, open_tensors, short, torch_file

SUFFIX = ".safetensors"
TORCH_SUFFIX = ".pt"
INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]+)-of-(?P<count>[0-9]+)\.safetensors")
GLANCE_BYTES = 4 << 20
"""Of an index that only may have to do with the chosen file, no more is read."""
NAME_BYTES = 255
"""No file system has longer names."""

ReadFile = Callable[[Path], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that has not been read: where it lies, its shape and dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk. `stored`: by key as in the files."""

    name: str
    files: tuple[Path, ...]
    stored: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]

    def tensors(self, keys: Iterable[str] | None = None, read_file: ReadFile | None = None) -> Iterator[tuple[str, Tensor]]:
        """Key and tensor, file after file; a file is let go when its last tensor has been handed out. `read_file`: reads safetensors files.

        A tensor is a view of the mapped file: whoever keeps it as it is takes up no memory of its own, whoever converts it
        holds the converted values and at most one file.
        """
        wanted = set(self.stored if keys is None else keys)
        for file in self.files:
            tensors = torch_file(file) if file.suffix == TORCH_SUFFIX else (read_file or (lambda path: read(path)[0]))(file)
            for key in [k for k in tensors if k in wanted]:
                yield key, tensors.pop(key)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file -> tensors and metadata. Raises ValueError for a missing, foreign or truncated file."""
    path = Path(path)
    with open_tensors(path) as file:
        return {key: file.get_tensor(key) for key in entries(file, path.name)}, dict(file.metadata() or {})


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A folder, a file, or any file of a set -> the whole checkpoint.

    Raises ValueError, before a tensor is read, for a shard that is missing, a folder with several models, or shards that do
    not belong together: the same key twice, or keys other than the index lists.
    """
    files, listed = _files_of(Path(path))
    stored: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        here, more = _header(file)
        if twice := sorted(stored.keys() & here.keys()):
            first = stored[twice[0]].file.name
            raise ValueError(f"{len(twice)} keys ({short(twice[0])}, ...) are both in {first} and in {file.name}: the shards are of different models")
        stored.update(here)
        metadata.update(more)
    if listed and listed != stored.keys():
        gone, extra = sorted(listed - stored.keys()), sorted(stored.keys() - listed)
        first = short((gone or extra)[0])
        what = f"lack {len(gone)} keys of their index ({first}, ...)" if gone else f"hold {len(extra)} keys their index lacks ({first}, ...)"
        raise ValueError(f"the shards {files[0].name}, ... {what}: they are of different models or downloads; download the set again")
    path = Path(path)
    return Checkpoint(f"{path.parent.name}/{path.name}" if SHARD.fullmatch(path.name) else path.name, files, stored, metadata)


def _files_of(path: Path) -> tuple[tuple[Path, ...], set[str]]:
    """The files of a checkpoint, and the keys that an index lists for them (none without an index)."""
    if path.is_dir():
        return _files_in(path)
    if not path.is_file():
        raise ValueError(f"there is no file {short(path.name)}: choose another, or download it again")
    if path.suffix not in (SUFFIX, ".sft", TORCH_SUFFIX):
        raise ValueError(
            f"{path.name} is no safetensors file: only .safetensors files, and {TORCH_SUFFIX} files of tensors alone, are read, because other "
            "kinds can run code when opened"
        )
    if match := _numbered(path.name):
        return _of_numbers(path.parent, match["stem"], match["count"])
    for index in _named(path.parent, INDEX):
        if _claims(path.parent / index, path):
            return _of_index(path.parent / index)
    return (path,), set()


def _files_in(folder: Path) -> tuple[tuple[Path, ...], set[str]]:
    names = [name for name in _named(folder, SUFFIX) if (folder / name).is_file()]
    sets = sorted({(m["stem"], m["count"]) for m in map(_numbered, names) if m})
    indices = _named(folder, INDEX)
    if len(sets) > 1:
        found = " and ".join(f"{short(stem)}-...-of-{count}" for stem, count in sets[:3])
        raise ValueError(f"{folder.name} holds shards of {len(sets)} models ({found}): choose a file of the one you want")
    if sets:
        return _of_numbers(folder, *sets[0])
    if len(names) == 1:
        return (folder / names[0],), set()
    if len(indices) == 1:
        return _of_index(folder / indices[0])
    what = f"{len(names)} safetensors files that are no shards of one model ({', '.join(map(short, names[:3]))})" if names else "no safetensors file"
    raise ValueError(f"{folder.name} holds {what}: choose a file, or a folder with the shards of one model")


def _named(folder: Path, end: str) -> list[str]:
    """Whatever is in the folder under a name with this end."""
    try:
        return sorted(path.name for path in folder.iterdir() if path.name.endswith(end))
    except OSError as error:
        raise ValueError(f"the folder {short(folder.name)} cannot be listed ({error.strerror}): look at its permissions") from None


def _numbered(name: str) -> re.Match[str] | None:
    """Stem, number and count of a shard; None for a name that no set of shards has."""
    match = SHARD.fullmatch(name)
    fits = match and len(match["number"]) == len(match["count"]) and 0 < int(match["number"]) <= int(match["count"])
    return match if fits else None


def _is_of(name: str, stem: str, count: str) -> bool:
    match = _numbered(name)
    return match is not None and (match["stem"], match["count"]) == (stem, count)


def _of_numbers(folder: Path, stem: str, count: str) -> tuple[tuple[Path, ...], set[str]]:
    """Numbered shards: as the index of their name says, where there is one and it is about them."""
    index = folder / f"{stem}{INDEX}"
    if os.path.lexists(index) and any(_is_of(name, stem, count) for name in set(_listed(index).values())):
        return _of_index(index)
    return _of_set(folder, stem, count), set()


def _of_set(folder: Path, stem: str, count: str) -> tuple[Path, ...]:
    """The count is only what a name says, so nothing here is as long as it."""
    there = [name for name in _named(folder, SUFFIX) if _is_of(name, stem, count) and (folder / name).is_file()]
    total, width, known = int(count), len(count), set(there)
    if len(there) < total:
        names = (f"{stem}-{number:0{width}d}-of-{count}{SUFFIX}" for number in range(1, total + 1))
        raise _incomplete(folder, total - len(there), total, list(islice((name for name in names if name not in known), 3)))
    return tuple(folder / name for name in there)


def _of_index(index: Path) -> tuple[tuple[Path, ...], set[str]]:
    listed, folder = _listed(index), index.parent
    names, there = sorted(set(listed.values())), set(_named(index.parent, SUFFIX))
    if gone := [name for name in names if name not in there or not (folder / name).is_file()]:
        raise _incomplete(folder, len(gone), len(names), gone[:3], f", or remove {short(index.name)} if it is of another model")
    return tuple(folder / name for name in names), set(listed)


def _claims(index: Path, path: Path) -> bool:
    """Whether the index is one that is right about the file: it lists the keys that the file holds, and no others, for it."""
    try:
        listed = _listed(index, GLANCE_BYTES)
    except ValueError:
        return False
    mine = {key for key, name in listed.items() if name == path.name}
    return bool(mine) and mine == _header(path)[0].keys()


def _listed(index: Path, most: int = JSON_BYTES) -> dict[str, str]:
    """Key -> file name, as an index says. Raises ValueError for what is no index, and for names of files elsewhere."""
    try:
        values = json_file(index, most)
    except ValueError as why:
        raise _refused(index, f"cannot be read: {why}") from None
    listed = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise _refused(index, 'is no index: one is a JSON object with a "weight_map" of keys to file names')
    if not listed:
        raise _refused(index, "lists no files")
    if outside := [name for name in set(listed.values()) if not _is_plain(name)]:
        raise _refused(index, f"names {short(min(outside))!r}, and only {SUFFIX} files in its own folder are read")
    return listed


def _is_plain(name: str) -> bool:
    """Whether it is a file name of ours on every system, and no path."""
    return not set(name) & set("/\\:") and name.endswith(SUFFIX) and name.isprintable() and len(name.encode()) <= NAME_BYTES


def _refused(index: Path, why: str) -> ValueError:
    return ValueError(f"{short(index.name)} {why}: download it again, or remove it if the shards are numbered ...-of-00012")


def _incomplete(folder: Path, gone: int, total: int, first: Sequence[str], otherwise: str = "") -> ValueError:
    named = f"{', '.join(map(short, first))}{', ...' if gone > len(first) else ''}"
    return ValueError(f"{gone} of {total} shards are not in {folder.name}: {named}; download them into the same folder{otherwise}")


def _header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    if file.suffix == TORCH_SUFFIX:
        return {key: StoredTensor(file, tuple(tensor.shape), tensor.dtype) for key, tensor in torch_file(file).items()}, {}
    with open_tensors(file) as opened:
        stored = {key: StoredTensor(file, shape, dtype) for key, (shape, dtype) in entries(opened, file.name).items()}
        return stored, dict(opened.metadata() or {})
