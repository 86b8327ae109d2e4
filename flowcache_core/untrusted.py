"""JSON, safetensors, PyTorch and NumPy files from outside: read within bounds or refused with a sentence. What they are for is unknown here."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

JSON_BYTES = 16 << 20
"""No index and no report of a run comes near."""
HEADER_BYTES = 32 << 20
"""Those of the largest models take less than one MB; what tools write into the metadata may take a few."""
OUTLINE_BYTES = 4 << 20
"""What a PyTorch file says of its tensors. That of a training state with two networks of 40 layers takes less than one MB."""
NESTED = 4
"""Dictionaries within each other."""
TENSORS = 1 << 16
KEY_LENGTH = 1024
DIMENSIONS = 8
ELEMENTS = 1 << 48
"""More than a file can hold. A size of 0 beside larger ones would let a shape pass that torch cannot count."""
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

Entry = tuple[tuple[int, ...], torch.dtype]


def short(value: object, most: int = 120) -> str:
    """A value from outside as it may stand in a sentence: on one line, printable, and cut."""
    text = str(value)
    return "".join(c if c.isprintable() else "?" for c in text[:most]) + "..." * (len(text) > most)


def parsed(text: str, most: int = JSON_BYTES) -> Any:
    """JSON -> values. Raises ValueError with the reason alone, as part of a sentence."""
    if len(text) > most:
        raise ValueError(f"it has {len(text)} characters, and at most {most} are read")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    except ValueError:  # Python reads no whole number of more than some thousand digits
        raise ValueError("a number in it has too many digits") from None


def json_file(path: Path, most: int = JSON_BYTES) -> Any:
    """A file -> values. Raises ValueError with the reason alone, as part of a sentence."""
    if not path.is_file():
        raise ValueError("it is no file")
    return parsed(_text_of(path, most), most)


def lines_of(path: Path, most: int = JSON_BYTES) -> list[str]:
    """A text file -> its lines without spaces around them, and none that is empty. Raises ValueError with the reason alone."""
    if not path.is_file():
        raise ValueError("it is no file")
    return [line for line in map(str.strip, _text_of(path, most).splitlines()) if line]


def _text_of(path: Path, most: int) -> str:
    """Raises ValueError with the reason alone."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            read = file.read(most) if size <= most else b""
    except OSError as error:
        raise ValueError(f"the system does not open it ({error.strerror})") from None
    if size > most:
        raise ValueError(f"it has {size} bytes, and at most {most} are read")
    try:
        return read.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8") from None


def open_tensors(path: Path) -> safe_open:
    """A safetensors file, to be opened by `with`. Raises ValueError for a missing, foreign or truncated file, or a header beyond its bounds."""
    if not path.is_file():
        raise ValueError(f"there is no file {short(path.name)}: choose another, or download it again")
    try:
        size = path.stat().st_size
        _check_header(path, size)
        return safe_open(path, framework="pt")
    except OSError as error:
        raise ValueError(f"the system does not open {short(path.name)} ({error.strerror}): look at its permissions") from None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{short(path.name)} ({size} bytes) is not a whole safetensors file: {short(error)}; download it again") from None


def _check_header(path: Path, size: int) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size >= 8 and length > size - 8:
        raise ValueError(f"its header should be {length} bytes long, and only {size - 8} follow")
    if size >= 8 and length > HEADER_BYTES:
        raise ValueError(f"its header is {length} bytes long, and at most {HEADER_BYTES} are read")


def entries(opened: Any, name: str) -> dict[str, Entry]:
    """Key -> shape and dtype of every tensor of an opened file. Raises ValueError for what torch could not hold, or this pack not use."""
    keys = list(opened.keys())
    if len(keys) > TENSORS:
        raise ValueError(f"{short(name)} holds {len(keys)} tensors, and at most {TENSORS} are read: it is no file of one model")
    if long := [key for key in keys if len(key) > KEY_LENGTH]:
        raise ValueError(
            f"{short(name)}: the key {short(long[0])} has {len(long[0])} characters, and at most {KEY_LENGTH} are read; use another file"
        )
    return {key: _entry(opened, key, name) for key in keys}


def _entry(opened: Any, key: str, name: str) -> Entry:
    part = opened.get_slice(key)
    kind, shape = part.get_dtype(), tuple(part.get_shape())
    if kind not in DTYPES:
        raise ValueError(
            f"{short(name)}: {short(key)} is stored as {short(kind)}, which cannot be read here; use a bf16, fp16 or fp8 file of the model"
        )
    if len(shape) > DIMENSIONS or math.prod(max(n, 1) for n in shape) > ELEMENTS:
        raise ValueError(f"{short(name)}: {short(key)} has shape {short(shape)}, which no tensor of a model has; download the file again")
    return shape, DTYPES[kind]


def torch_file(path: Path) -> dict[str, Tensor]:
    """A file of torch.save -> its tensors, the keys of nested dictionaries joined by dots; what else it holds is left out.

    Tensors are views of the mapped file, and nothing in it is run: the file may name no code but that of plain tensors. Raises ValueError for
    a missing, foreign or damaged file, and for one that names other code.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {short(path.name)}: choose another, or download it again")
    try:
        _check_archive(path)
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:
        raise _no_torch_file(path, error) from None
    if named:
        raise ValueError(
            f"{short(path.name)} holds code or objects beside tensors ({short(', '.join(sorted(map(str, named))))}), and a file that can run code is "
            "not opened: use a safetensors file of this model, or save its tensors alone"
        )
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {key: _plain_tensor(key, tensor) for key, tensor in _tensors_in(held)}
    except Exception as error:
        raise _no_torch_file(path, error) from None


def _check_archive(path: Path) -> None:
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise ValueError(f"PyTorch {torch.__version__} cannot look into it without opening it, 2.6 and newer can")
    with zipfile.ZipFile(path) as packed:
        inside = packed.infolist()
    outline = sum(one.file_size for one in inside if one.filename.endswith(".pkl"))
    if len(inside) > 2 * TENSORS or outline > OUTLINE_BYTES or any(one.compress_type for one in inside):
        raise ValueError(f"it has {len(inside)} parts and {outline} bytes that describe them, and at most {2 * TENSORS} and {OUTLINE_BYTES} are read")


def _no_torch_file(path: Path, why: Exception) -> ValueError:
    first = str(why).partition("\n")[0]
    return ValueError(
        f"{short(path.name)} ({path.stat().st_size} bytes) is not a whole PyTorch file of tensors: {short(first)}; download it again, or use a "
        "safetensors file"
    )


def _tensors_in(held: object) -> Iterator[tuple[str, Tensor]]:
    """Raises ValueError for more entries than any model has."""
    waiting: list[tuple[str, object, int]] = [("", held, 0)]
    for _ in range(TENSORS):
        if not waiting:
            return
        key, value, depth = waiting.pop()
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, Mapping) and depth < NESTED:
            if len(value) > TENSORS:
                break
            waiting += [(f"{key}.{name}" if depth else str(name), one, depth + 1) for name, one in value.items() if isinstance(name, str)]
    raise ValueError(f"it holds more than {TENSORS} entries")


def _plain_tensor(key: str, tensor: Tensor) -> Tensor:
    """Raises ValueError for what a safetensors file could not hold either."""
    dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.dtype not in DTYPES.values():
        raise ValueError(f"{short(key)} is no plain tensor of numbers ({tensor.dtype}, {tensor.layout})")
    if len(key) > KEY_LENGTH or tensor.ndim > DIMENSIONS or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError(f"{short(key)} has shape {short(tuple(tensor.shape))} and only {tensor.untyped_storage().nbytes()} bytes")
    return tensor.detach()


def array_file(path: Path, members: int, most: int) -> dict[str, NDArray[Any]]:
    """A file of named NumPy arrays (.npz). Raises ValueError for a missing, foreign or damaged file, and for arrays that hold no numbers.

    At most `members` arrays of `most` bytes together are read. Nothing in them is run.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {short(path.name)}: choose another, or download it again")
    try:
        with zipfile.ZipFile(path) as packed:
            inside = packed.infolist()
            size = sum(one.file_size for one in inside)
            if len(inside) > members or size > most:
                raise ValueError(f"it holds {len(inside)} arrays of {size} bytes, and at most {members} of {most} are read")
            return {one.filename.removesuffix(".npy"): _array(packed.read(one)) for one in inside}
    except (OSError, ValueError, SyntaxError, TypeError, EOFError, RuntimeError, TokenError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{short(path.name)} is not a whole file of NumPy arrays: {short(error)}; download it again") from None


def _array(read: bytes) -> NDArray[Any]:
    """A header says shape and kind of the numbers; it is believed only where as many follow."""
    file = io.BytesIO(read)
    header = np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(file) == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, kind = header(file)
    if kind.kind not in "fiu" or kind.itemsize > 8 or len(shape) > DIMENSIONS or any(n < 0 for n in shape):
        raise ValueError(f"it has an array of {kind} with shape {shape}")
    if math.prod(shape) * kind.itemsize != len(read) - file.tell():
        raise ValueError(f"an array of shape {shape} should have {math.prod(shape) * kind.itemsize} bytes, and {len(read) - file.tell()} follow")
    return np.frombuffer(read, kind, offset=file.tell()).reshape(shape, order="F" if by_columns else "C")
