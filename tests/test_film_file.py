"""A film on its way to disk: whole under its name, or a part that plays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest

from flowcache_core.show.film_file import FilmFile, cut
from tests.films import read_film
from tests.host import PACK

SIZE = (32, 48)


def noise(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (frames, *SIZE, 3), dtype=np.uint8)


def frames_in(path: Path) -> int:
    with av.open(str(path)) as film:
        return sum(1 for _ in film.decode(video=0))


def test_a_film_in_pieces_comes_back_whole(tmp_path: Path) -> None:
    """With its frames, its rate and what was written beside them, at the start of the file."""
    shades = np.linspace(30, 220, 40).astype(np.uint8)[:, None, None, None] * np.ones((1, *SIZE, 3), np.uint8)
    with FilmFile(tmp_path / "film.mp4", SIZE, 24, metadata={"prompt": '{"1": {}}'}) as film:
        for piece in np.array_split(shades, [1, 5, 21]):
            film.add(piece)
    back = read_film(tmp_path / "film.mp4")
    assert back.shape == shades.shape
    assert np.abs(back.astype(int) - shades).max() < 8
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]
    with av.open(str(tmp_path / "film.mp4")) as whole:
        assert whole.metadata["prompt"] == '{"1": {}}'
        assert whole.streams.video[0].average_rate == 24
        assert whole.duration == pytest.approx(40 / 24 * 1e6, rel=1e-3)
    raw = (tmp_path / "film.mp4").read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat")
    assert b"moof" not in raw


def test_a_whole_film_begins_at_once_and_its_frames_are_evenly_apart(tmp_path: Path) -> None:
    """Also where the encoder reorders frames."""
    with FilmFile(tmp_path / "film.mp4", SIZE, 23.976) as film:
        film.add(noise(40))
    with av.open(str(tmp_path / "film.mp4")) as whole:
        assert whole.streams.video[0].start_time == 0
        assert [frame.time for frame in whole.decode(video=0)] == pytest.approx([k / 23.976 for k in range(40)], abs=1e-4)


def test_a_lower_crf_keeps_more(tmp_path: Path) -> None:
    for crf in (10, 40):
        with FilmFile(tmp_path / f"{crf}.mp4", SIZE, 24, crf) as film:
            film.add(noise(10))
    assert (tmp_path / "10.mp4").stat().st_size > 2 * (tmp_path / "40.mp4").stat().st_size


def test_an_odd_size_is_refused_before_a_file_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the film is 49 x 32 pixels and mp4 needs even numbers: scale or crop it to 48 x 32"):
        FilmFile(tmp_path / "film.mp4", (32, 49), 24)
    assert not list(tmp_path.iterdir())


def test_a_stopped_film_is_left_as_a_part_with_all_its_frames(tmp_path: Path) -> None:
    def stopped() -> None:
        with FilmFile(tmp_path / "film.mp4", SIZE, 24) as film:
            film.add(noise(50))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [path.name for path in tmp_path.iterdir()] == ["film.partial.mp4"]
    assert frames_in(tmp_path / "film.partial.mp4") == 50


def test_a_film_without_a_frame_leaves_nothing(tmp_path: Path) -> None:
    def stopped() -> None:
        with FilmFile(tmp_path / "film.mp4", SIZE, 24):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not list(tmp_path.iterdir())


KILLED = """
import sys
from pathlib import Path
import numpy as np
from flowcache_core.show.film_file import FilmFile
with FilmFile(Path(sys.argv[1]), (32, 48), 24) as film:
    while True:
        film.add(np.random.default_rng(film.frames).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8))
        if film.frames == 240:
            print("written", flush=True)
            sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_killed_film_plays_but_for_the_last_seconds(tmp_path: Path) -> None:
    """What may be missing: a fragment, the frames that the encoder looks ahead, and those of its threads."""
    run = [sys.executable, "-c", KILLED, str(tmp_path / "film.mp4")]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PACK) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == b"written\n"
        writer.send_signal(signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["film.partial.mp4"]
    assert 240 - 4 * 24 <= frames_in(tmp_path / "film.partial.mp4") <= 240


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from flowcache_core.show.film_file import FilmFile
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    with FilmFile(Path(sys.argv[1]), (32, 48), 24) as film:
        for k in range(40):
            film.add(np.random.default_rng(k).integers(0, 255, (10, 32, 48, 3), dtype=np.uint8))
except OSError as error:
    print(film.frames, error)
"""


@pytest.mark.skipif(os.name == "nt", reason="files have no limit there")
def test_without_room_a_sentence_says_so_and_the_part_plays_to_its_end(tmp_path: Path) -> None:
    run = [sys.executable, "-c", FULL, str(tmp_path / "film.mp4"), "120000"]
    said = subprocess.run(run, capture_output=True, text=True, check=True, cwd=PACK).stdout
    frames = int(said.split()[0])
    assert f"film.mp4 could not be written after {frames} frames: File too large." in said
    assert "film.partial.mp4. Make room in" in said
    assert [path.name for path in tmp_path.iterdir()] == ["film.partial.mp4"]
    assert 0 < frames_in(tmp_path / "film.partial.mp4") < frames < 400


def test_where_the_whole_film_has_no_room_beside_the_part_all_of_it_is_kept(tmp_path: Path) -> None:
    """The disk fills while the packets are copied: here a folder stands where the copy should be."""
    (tmp_path / "film.mp4.unfinished").mkdir()

    def written() -> None:
        with FilmFile(tmp_path / "film.mp4", SIZE, 24) as film:
            film.add(noise(50))

    with pytest.raises(OSError, match=r"film\.mp4 could not be written after 50 frames: .* plays: .*film\.partial\.mp4"):
        written()
    assert frames_in(tmp_path / "film.partial.mp4") == 50
    assert not (tmp_path / "film.mp4").exists()


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"film\.mp4 could not be written after 0 frames: No such file or directory\. Make room in"):
        FilmFile(tmp_path / "none" / "film.mp4", SIZE, 24)


def test_a_part_is_cut_after_its_last_whole_fragment(tmp_path: Path) -> None:
    path = tmp_path / "part.mp4"
    head, fragment = (8).to_bytes(4, "big") + b"moov", (8).to_bytes(4, "big") + b"moof" + (12).to_bytes(4, "big") + b"mdat1234"
    path.write_bytes(head + 3 * fragment + fragment[:-1])
    assert cut(path) == 3
    assert path.read_bytes() == head + 3 * fragment
    path.write_bytes(head + fragment[:10])
    assert cut(path) == 0


def test_a_longer_film_needs_no_more_memory(tmp_path: Path) -> None:
    """Of Python's own memory: the frames are given in pieces, and none of them is kept."""

    def peak(pieces: int) -> int:
        with FilmFile(tmp_path / f"{pieces}.mp4", SIZE, 24) as film:
            film.add(noise(8))
            tracemalloc.start()
            for k in range(pieces):
                film.add(noise(8, k))
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return most

    assert peak(40) < peak(4) + noise(1).nbytes
