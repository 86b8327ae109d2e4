"""A film on its way to disk: an mp4 that plays as far as it was written, whatever stops it. How its frames are made is unknown here.

While it grows it is `NAME.partial.mp4`, in fragments that each play without what follows. When it is whole, its packets are copied,
without encoding them again, into an ordinary mp4, which then gets its name: nothing called NAME.mp4 is ever half a film.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np

FRAGMENT_SECONDS = 1.0
"""Of film between two writes to disk."""
LOOKAHEAD = 20
"""Frames that the encoder holds back to spread bits: with those of a fragment, what an end without warning may cost."""


class FilmFile:
    """Use it with `with`. An exception that leaves the block leaves the partial film, if it has a frame; else nothing is left."""

    def __init__(self, path: Path, size: tuple[int, int], fps: float, crf: float = 19, metadata: Mapping[str, str] | None = None) -> None:
        """`size`: height and width in pixels; `crf`: 0 (lossless) to 51, of H.264.

        Raises ValueError for an odd size, which H.264 with colours at half resolution cannot have, and OSError if the file cannot be made.
        """
        height, width = size
        if height % 2 or width % 2:
            raise ValueError(f"the film is {width} x {height} pixels and mp4 needs even numbers: scale or crop it to {width & ~1} x {height & ~1}")
        self.path, self.partial, self.frames = path, path.with_name(f"{path.stem}.partial.mp4"), 0
        self.metadata = dict(metadata or {})
        flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof+use_metadata_tags", "frag_duration": f"{round(FRAGMENT_SECONDS * 1e6)}"}
        self._file = av.open(str(self.partial), "w", format="mp4", options={**flags, "flush_packets": "1"})
        self._file.metadata.update(self.metadata)
        self._stream = self._file.add_stream("libx264", rate=Fraction(round(fps * 1000), 1000))
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._stream.options = {"crf": f"{crf:g}", "rc-lookahead": f"{LOOKAHEAD}"}
        with self._sentence():
            self._file.start_encoding()

    def add(self, frames: np.ndarray) -> None:
        """uint8 [T, H, W, 3]. Raises OSError, with a way out, when they cannot be written."""
        for frame in frames:
            with self._sentence():
                self._file.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            self.frames += 1

    def __enter__(self) -> FilmFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self.frames:
            self._finish()
        else:
            self._give_up()

    def _finish(self) -> None:
        try:
            with self._sentence():
                self._flush()
                self._whole()
        except BaseException:
            self._give_up()
            raise
        self.partial.unlink()

    def _flush(self) -> None:
        self._file.mux(self._stream.encode(None))
        self._file.close()

    def _whole(self) -> None:
        """The same packets in an ordinary mp4: its index in front, so that it can be wound to any place while it loads.

        Its first frame stands at time 0. In fragments, where no packet has a time below 0, it stands as late as the encoder reorders frames.
        """
        copy = self.path.with_name(f"{self.path.stem}.mp4.unfinished")
        try:
            with av.open(str(self.partial)) as source, av.open(
                str(copy), "w", format="mp4", options={"movflags": "use_metadata_tags+faststart"}
            ) as whole:  # fmt: skip
                whole.metadata.update(self.metadata)
                stream, late = whole.add_stream_from_template(source.streams.video[0]), None
                for packet in source.demux(source.streams.video[0]):
                    if packet.pts is not None and packet.dts is not None:
                        late = packet.pts if late is None else late
                        packet.pts, packet.dts, packet.stream = packet.pts - late, packet.dts - late, stream
                        whole.mux(packet)
            copy.replace(self.path)
        finally:
            copy.unlink(missing_ok=True)

    def _give_up(self) -> None:
        """What the encoder still holds goes into the partial film where there is room for it."""
        for last in (self._flush, self._file.close):
            with contextlib.suppress(av.FFmpegError, OSError, ValueError):
                last()
        with contextlib.suppress(OSError):
            if not self.frames or not cut(self.partial):
                self.partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _sentence(self):  # type: ignore[no-untyped-def]
        """Errors of the disk, with what is left of the film and what to do."""
        try:
            yield
        except OSError as error:
            left = f" What was written until then plays: {self.partial}." if self.frames else ""
            raise OSError(
                f"{self.path.name} could not be written after {self.frames} frames: {error.strerror or error}.{left} "
                f"Make room in {self.path.parent} or choose another folder, and run again."
            ) from error


def cut(path: Path) -> int:
    """Cuts an mp4 in fragments after its last whole one, so that it ends where it stops to play -> how many there are.

    A file is boxes, each of a size (four bytes), a kind (four) and what it holds; a fragment is a `moof` and the `mdat` behind it
    (ISO/IEC 14496-12, sections 4.2 and 8.8).
    """
    whole, fragments, at, end = 0, 0, 0, path.stat().st_size
    with path.open("r+b") as file:
        while at + 8 <= end:
            file.seek(at)
            size, kind = int.from_bytes(file.read(4), "big"), file.read(4)
            at += size
            if size < 8 or at > end:
                break
            if kind == b"mdat":
                whole, fragments = at, fragments + 1
        if fragments:
            file.truncate(whole)
    return fragments
