"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

STEM = 80
"""Characters of a name that its partial file repeats: no file system has names of more than 255 bytes."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Around writing the file `path`: what is written to the place that it yields takes the name when the block has ended well.

    Until then the name stays as it was, with the content that it had, and after an error nothing is left. A process that is killed can
    leave the partial file, under a hidden name of its own. Makes the folder. Raises OSError, with the name, where the system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem[:STEM]}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        _to_disk(partial)
        partial.replace(path)
    except torch.OutOfMemoryError:
        raise
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except (SafetensorError, RuntimeError) as error:  # what safetensors and torch.save make of a write that the system refuses
        raise OSError(errno.EIO, f"writing failed: {error}", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """UTF-8, as `whole`."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def refused(error: OSError) -> str:
    """What a system that refuses a file says, as a sentence with the way out."""
    name = f" {error.filename}" if error.filename else " a file"
    return f"the system refuses{name} ({error.strerror or error}): free space on the disk, look at permissions, or name another folder"


def _to_disk(path: Path) -> None:
    """Before the name changes: the other way round a power cut could leave the name without the content."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
