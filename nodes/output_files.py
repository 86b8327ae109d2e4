"""Where files of the output folder go."""

from __future__ import annotations

from pathlib import Path, PurePath

import folder_paths

from ..flowcache_core.untrusted import short

LONGEST = 200
"""Bytes of a name: file systems take 255, with number, ending and the name of the partial file."""


def place_of(prefix: str, node: str, width: int = 0, height: int = 0) -> tuple[Path, str, str]:
    """-> folder, name with its number, and the folder's name in the output folder. `prefix`: a name, or a folder and a name; the host counts.

    Raises ValueError for a place outside the output folder, and for a name that file systems do not take.
    """
    if not (path := PurePath(prefix)).name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{node}: filename_prefix {short(repr(prefix))} is no place in the output folder: use a name such as video/flowcache")
    if not prefix.isprintable() or len(path.name.encode()) > LONGEST:
        raise ValueError(f"{node}: filename_prefix {short(repr(prefix))} is no name of a file: use at most {LONGEST} bytes of printable letters")
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory(), width, height)
    return Path(folder), f"{name}_{counter:05}_", subfolder
