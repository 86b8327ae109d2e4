"""The state of a run as one file: a safetensors file of numbered tensors, with what names them as JSON, and a checksum at its end.

It is written beside its place, brought to the disk, and moved there in one step: whoever is stopped in between leaves the earlier file as
it was. One tensor after the other is written and read, so a state need not fit into memory a second time. What a state is, is unknown here.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..untrusted import DTYPES, entries, open_tensors, parsed, short

FORMAT = "flowcache-state-2"
"""Another number wherever what a run remembers, or what it makes of it, changes: a state of another format is not read."""
PARTIAL = ".partial"
ALIGNED = 8
PIECE = 1 << 24
"""Bytes that are written or read at a time."""
TREE, SUM = "tree", "sha256"
SUM_BYTES = 32
TREE_BYTES = 1 << 28
"""Of the JSON beside the tensors: of an hour of film it takes some MB."""
METADATA_BYTES = 1 << 20
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StateFile:
    """A whole state. `metadata`: which run it is of, and how far that is; `tree`: JSON values that name tensors by their place."""

    path: Path
    metadata: dict[str, Any]
    tree: Any

    @contextmanager
    def tensors(self) -> Iterator[Callable[[int], Tensor]]:
        """Place -> tensor, on the processor, in memory of its own. Raises ValueError for a place where none is."""
        with open_tensors(self.path) as file:
            yield lambda place: _tensor(file, place)


def _tensor(file: Any, place: int) -> Tensor:
    try:
        return cast(Tensor, file.get_tensor(str(place))).clone()
    except SafetensorError as error:
        raise ValueError(short(error)) from None


def write_state(path: Path, metadata: Mapping[str, Any], tree: Any, tensors: Sequence[Tensor], written: Callable[[], None] = lambda: None) -> int:
    """-> bytes. Raises OSError where the system does not write it; what lay at `path` is then still there. `written`: called when the file is on
    the disk and not yet in its place; where it raises, it does not come there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            _write(file, metadata, tree, tensors)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        written()
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(path.parent)
    return size


def _write(file: BinaryIO, metadata: Mapping[str, Any], tree: Any, tensors: Sequence[Tensor]) -> None:
    text = json.dumps(tree, separators=(",", ":")).encode()
    sizes = {**{str(k): (NAMES[t.dtype], list(t.shape), t.nbytes) for k, t in enumerate(tensors)},
             TREE: ("U8", [len(text)], len(text)), SUM: ("U8", [SUM_BYTES], SUM_BYTES)}  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "metadata": json.dumps(metadata)}}
    at = 0
    for key, (dtype, shape, size) in sizes.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % ALIGNED)
    checksum = hashlib.sha256()

    def put(part: bytes | memoryview) -> None:
        checksum.update(part)
        file.write(part)

    put(len(head).to_bytes(8, "little"))
    put(head)
    for tensor in tensors:
        for part in _bytes_of(tensor).split(PIECE):
            put(memoryview(part.numpy()))
    put(text)
    file.write(checksum.digest())


def _bytes_of(tensor: Tensor) -> Tensor:
    """uint8 [bytes], on the processor."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def _sync_folder(folder: Path) -> None:
    """That the new name is on the disk too; not every system can be asked for that."""
    with suppress(OSError):
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def metadata_of(path: Path) -> dict[str, Any]:
    """The metadata of a state, without reading the state. Raises ValueError, with the reason, for what is no state of this format."""
    with open_tensors(path) as file:
        return _metadata(file.metadata() or {}, path.name)


def read_state(path: Path) -> StateFile:
    """Raises ValueError, with the reason, for what is no whole state of this format, and OSError."""
    with open_tensors(path) as file:
        metadata, found = _metadata(file.metadata() or {}, path.name), entries(file, path.name)
        if found.keys() != {*map(str, range(len(found) - 2)), TREE, SUM} or found[SUM] != ((SUM_BYTES,), torch.uint8):
            raise ValueError(f"{short(path.name)} holds other tensors than a state does")
        if found[TREE][1] != torch.uint8 or len(found[TREE][0]) != 1 or found[TREE][0][0] > TREE_BYTES:
            raise ValueError(f"{short(path.name)} does not say what its tensors are")
        _check_sum(path)
        try:
            tree = parsed(bytes(file.get_tensor(TREE).numpy()).decode(), TREE_BYTES)
        except ValueError as error:
            raise ValueError(f"{short(path.name)} does not say what its tensors are ({short(error)})") from None
    return StateFile(path, metadata, tree)


def _metadata(header: Mapping[str, str], name: str) -> dict[str, Any]:
    if header.get("format") != FORMAT:
        raise ValueError(f"{short(name)} is no state of a run as this version writes it: its format is {short(header.get('format', 'not said'))}")
    try:
        metadata = parsed(header.get("metadata", ""), METADATA_BYTES)
    except ValueError as error:
        raise ValueError(f"{short(name)} does not say which run it is of ({short(error)})") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{short(name)} does not say which run it is of")
    return metadata


def _check_sum(path: Path) -> None:
    checksum, left = hashlib.sha256(), path.stat().st_size - SUM_BYTES
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(PIECE, left))):
            checksum.update(part)
            left -= len(part)
        if file.read() != checksum.digest():
            raise ValueError(f"{short(path.name)} is damaged: its checksum is not that of what it holds")
